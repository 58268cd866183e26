"""What `scripts.estimate` says of a plan: whether it fits, what bounds it, and which keys of the recipe change that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from scripts.estimate_memory import memory, roles
from scripts.estimate_plan import Plan
from scripts.estimate_time import Phase, times

MOST_MACHINES = 128
FEW_ROWS = 8
"""Sequences per rank under which ranks wait for the one with the longest answers more than they work. Assumed."""
DOMINATES = 0.5
SMALL = 10**8
"""Parameters of a role that is not worth sharding."""


@dataclass(frozen=True)
class Change:
    """One change to a plan, in words, and the plan that it makes."""

    words: str
    plan: Plan


def advise(plan: Plan) -> list[str]:
    """Lines for a person, the most important first."""
    return [_verdict(plan), *_memory_lines(plan), *_time_lines(plan)]


def bottleneck(plan: Plan) -> Phase:
    """The phase that takes most of an update."""
    return max(times(plan).phases, key=lambda phase: phase.seconds)


def _verdict(plan: Plan) -> str:
    found = memory(plan)
    most = max(found.items, key=lambda item: item.gib)
    if not found.engine_fits:
        return (
            f"DOES NOT FIT: the engine's weights are {plan.shape.parameters * plan.model_bytes / 2**30:.1f} GiB whole, "
            f"more than its share of {plan.tensor_parallel} GPU{'s' * (plan.tensor_parallel > 1)} holds."
        )
    words = f"{found.total_gib:.1f} GiB per GPU of {found.limit_gib:.1f} GiB; the most is {most.name} ({most.gib:.1f})."
    return f"fits: {words}" if found.fits else f"DOES NOT FIT: {words}"


def _memory_lines(plan: Plan) -> Iterator[str]:
    found = memory(plan)
    if not found.fits:
        for change in changes(plan):
            after = memory(change.plan)
            if after.total_gib < found.total_gib or after.engine_fits > found.engine_fits:
                fits = "fits" if after.fits else "not enough alone" if after.engine_fits else "the engine does not fit"
                yield f"{change.words}: {after.total_gib:.1f} GiB, {fits}"
    whole = [name for name, role in roles(plan).items() if role.weights > SMALL and not plan.sharded(name)]
    if plan.sharding == "fsdp2" and whole:
        yield f"whole on every GPU: {', '.join(whole)} (ppo.shard; a base under adapters cannot be sharded)"
    if found.engine_fits and found.kv_gib < 0.5 * found.wanted_kv_gib:
        key = "rollout.kv_cache_gib" if plan.gpu.kind == "cpu" else "rollout.gpu_memory_utilization"
        yield (
            f"the cache holds {found.kv_gib:.1f} of the {found.wanted_kv_gib:.1f} GiB that its sequences fill, "
            f"so they take turns: raise {key}, or rollout.mode: server"
        )


def changes(plan: Plan) -> Iterator[Change]:
    """What makes a plan smaller, one change at a time."""
    ppo = plan.recipe.ppo
    if plan.sharding == "ddp" and plan.world > 1:
        yield Change("launch.accelerate: configs/accelerate/fsdp2.yaml", replace(plan, sharding="fsdp2"))
    if plan.mode == "colocate" and plan.gpu.kind == "cuda":
        yield _server(plan)
    if not ppo.gradient_checkpointing:
        yield _with(plan, "ppo.gradient_checkpointing: true", gradient_checkpointing=True)
    if plan.micro_batch_tokens > 2 * plan.longest:
        half = int(plan.micro_batch_tokens) // 2
        yield _with(plan, f"ppo.max_tokens_per_micro_batch: {half}", max_tokens_per_micro_batch=half)
    if not plan.critic_on_policy:
        yield _with(plan, "ppo.critic: shared", critic="shared")
    if ppo.sharing != "lora":
        words = "ppo.sharing: lora, rm.lora: true, ppo.shard: []"
        yield _with(plan, words, sharing="lora", shard=())
    if plan.sharding == "fsdp2":
        yield from _machines(plan)


def _with(plan: Plan, words: str, **settings: Any) -> Change:
    ppo = plan.recipe.ppo.model_copy(update=settings)
    return Change(words, replace(plan, recipe=plan.recipe.model_copy(update={"ppo": ppo})))


def _server(plan: Plan) -> Change:
    """The engine on GPUs of its own, as few of them as hold it."""
    for cards in (1, 2, 4, 8):
        served = replace(plan, mode="server", server_gpus=cards, tensor_parallel=cards)
        if memory(served).engine_fits:
            break
    return Change(f"rollout.mode: server on {cards} more GPU{'s' * (cards > 1)}", served)


def _machines(plan: Plan) -> Iterator[Change]:
    """The fewest machines that hold the plan."""
    count = plan.machines
    while count < MOST_MACHINES:
        count *= 2
        larger = replace(plan, machines=count)
        if memory(larger).fits:
            yield Change(f"launch.machines: {count}", larger)
            return


def _time_lines(plan: Plan) -> Iterator[str]:
    spent = times(plan)
    slowest = bottleneck(plan)
    share = slowest.seconds / sum(phase.seconds for phase in spent.phases)
    yield f"bottleneck: {slowest.name}, {share:.0%} of an update, bounded by {slowest.bound}"
    if slowest.name == "generate" and share > DOMINATES:
        yield _faster_sampling(plan)
    update = spent.phase("update")
    if update.bound == "communication":
        yield (
            "the update waits for weights and gradients on their way: raise ppo.max_tokens_per_micro_batch or "
            "ppo.rollout_batch_size, lower ppo.num_minibatches, or use fewer machines"
        )
    if spent.phase("sync").seconds > 0.2 * spent.seconds:
        yield "handing the weights over takes long: put rollout.server.weights_dir on a faster file system"
    if plan.rows < FEW_ROWS:
        yield (
            f"only {plan.rows} sequences per rank and update: raise ppo.rollout_batch_size, or use fewer GPUs; beyond "
            "it more of them make nothing faster"
        )


def _faster_sampling(plan: Plan) -> str:
    if plan.mode == "colocate":
        return (
            "sampling dominates: lower data.max_response_tokens, or rollout.mode: server with rollout.async_steps: 1, "
            "which samples the next batch meanwhile"
        )
    if not plan.overlap:
        return (
            "sampling dominates: rollout.async_steps: 1 with ppo.importance_level: token samples the next batch while "
            "this one is learnt from"
        )
    return "sampling dominates even beside the rest: give the server more GPUs"


def as_dict(plan: Plan) -> Mapping[str, Any]:
    """Everything that is printed, for --json; bytes in GiB, times in seconds."""
    found, spent = memory(plan), times(plan)
    return {
        "parameters": plan.shape.parameters,
        "world": plan.world,
        "gpu": plan.gpu.name,
        "sharding": plan.sharding,
        "mode": plan.mode,
        "fits": found.fits,
        "memory_gib": {item.name: item.gib for item in found.items},
        "total_gib": found.total_gib,
        "limit_gib": found.limit_gib,
        "kv_cache_gib": found.kv_gib,
        "host_gib_while_loading": found.host_gib,
        "seconds": {phase.name: phase.seconds for phase in spent.phases},
        "bound": {phase.name: phase.bound for phase in spent.phases},
        "flops": {phase.name: phase.flops for phase in spent.phases},
        "seconds_per_update": spent.seconds,
        "bottleneck": bottleneck(plan).name,
        "advice": advise(plan),
    }
