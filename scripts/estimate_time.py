"""Time of one update of the ppo stage by phase: arithmetic, memory traffic, collectives and the disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from scripts.bench_ppo_models import Flops, forward_flops
from scripts.estimate_memory import kv_bytes, memory, roles
from scripts.estimate_plan import (
    DISK,
    LINK_SHARE,
    MASTER,
    MAX_SEQUENCES,
    MBU,
    MFU,
    PACK_RATE,
    PACK_SECONDS,
    REDUCED,
    ROW_SECONDS,
    STEP_SECONDS,
    Gpu,
    Plan,
)

OPTIMISER_BYTES = 28
"""Traffic of Adam per weight and step: weight, gradient and two moments read; weight and moments written."""
Bound = Literal["compute", "memory bandwidth", "communication", "host", "disk"]


@dataclass(frozen=True)
class Phase:
    """One phase of an update: wall seconds, what bounds them, and what each resource alone would take.

    Attributes:
        flops: floating point operations of all ranks.
        parts: seconds by resource; those that overlap do not add up to `seconds`.
    """

    name: str
    seconds: float
    bound: Bound
    flops: float
    parts: dict[Bound, float]


@dataclass(frozen=True)
class Times:
    """One update.

    Attributes:
        overlapped: sampling runs beside the rest, on GPUs of its own.
    """

    phases: list[Phase]
    overlapped: bool

    @property
    def seconds(self) -> float:
        """Wall seconds of an update."""
        generate, *rest = (phase.seconds for phase in self.phases)
        return max(generate, sum(rest)) if self.overlapped else generate + sum(rest)

    def phase(self, name: str) -> Phase:
        """One of the phases."""
        return next(phase for phase in self.phases if phase.name == name)


def once(plan: Plan) -> Flops:
    """One forward of one model over a rollout batch, the response tokens projected on the vocabulary."""
    batch, length = plan.recipe.ppo.rollout_batch_size, plan.prompt_tokens + plan.response_tokens
    pairs = batch * length * (length + 1) / 2
    return forward_flops(plan.shape, batch * length, pairs, batch * plan.response_tokens)


def generate_flops(plan: Plan) -> tuple[float, float]:
    """Operations of prefill (the last position is projected) and of decoding."""
    batch, prompt, response = plan.recipe.ppo.rollout_batch_size, plan.prompt_tokens, plan.response_tokens
    prefill = forward_flops(plan.shape, batch * prompt, batch * prompt * (prompt + 1) / 2, batch)
    pairs = batch * (response * prompt + response * (response + 1) / 2)
    decode = forward_flops(plan.shape, batch * response, pairs, batch * response)
    return total(prefill), total(decode)


def experience_flops(plan: Plan) -> float:
    """Policy and reference with their projections, critic unless it shares the policy's forward, reward models."""
    one = once(plan)
    bodies = 2 + (not plan.critic_on_policy) + plan.reward_models
    return bodies * (one.trunk + one.attention) + 2 * one.projection


def update_flops(plan: Plan) -> float:
    """Forward 1, gradients of activations 1, of weights 1 (none where they are frozen), per epoch.

    The projection's forward is done again in the backward pass, and with checkpointing so is the trunk's:
    6 x parameters x tokens, or 8. For the settings of the benchmark it is `scripts.bench_ppo_models.update_flops`.
    """
    one, ppo = once(plan), plan.recipe.ppo
    again = int(ppo.gradient_checkpointing)
    policy = 3 if ppo.sharing == "full" else 2
    trunks = [policy]
    if not plan.critic_on_policy:
        trunks.append(2 if ppo.sharing == "lora" else 3)
    work = sum((passes + again) * one.trunk + (3 + again) * one.attention for passes in trunks)
    return ppo.num_ppo_epochs * (work + (policy + 1) * one.projection)


def total(flops: Flops) -> float:
    """All of them."""
    return flops.trunk + flops.attention + flops.projection


def times(plan: Plan) -> Times:
    """Every phase of one update."""
    phases = [_generate(plan), _experience(plan), _update(plan), _sync(plan)]
    return Times(phases, overlapped=plan.mode == "server" and plan.overlap)


def reduced_link(plan: Plan) -> float:
    """Bytes per second and rank of a collective: the network where there are several machines."""
    return LINK_SHARE * (plan.gpu.network if plan.machines > 1 else plan.gpu.link)


def _rate(gpu: Gpu) -> float:
    return gpu.flops * MFU[gpu.kind]


def _traffic(gpu: Gpu) -> float:
    return gpu.bandwidth * MBU


def _generate(plan: Plan) -> Phase:
    """Prefill by arithmetic; decoding by arithmetic or by reading weights and keys and values, whichever is slower."""
    prefill, decode = generate_flops(plan)
    batch, response = plan.recipe.ppo.rollout_batch_size, plan.response_tokens
    cards = plan.engines * plan.tensor_parallel
    rows = math.ceil(batch / plan.engines)
    at_once = _at_once(plan, rows)
    steps = max(float(plan.recipe.data.max_response_tokens), rows * response / at_once)
    weights = steps * plan.shape.parameters * plan.model_bytes
    cache = rows * kv_bytes(plan) * response * (plan.prompt_tokens + response / 2)
    share = rows * plan.engines / batch / cards  # the engine with the most rows
    parts: dict[Bound, float] = {
        "compute": (prefill + decode) * share / _rate(plan.gpu),
        "memory bandwidth": (weights + cache) / plan.tensor_parallel / _traffic(plan.gpu),
        "host": steps * STEP_SECONDS[plan.gpu.kind] + rows * response * ROW_SECONDS[plan.gpu.kind],
    }
    first, arithmetic = (flops * share / _rate(plan.gpu) for flops in (prefill, decode))
    seconds = first + max(arithmetic, parts["memory bandwidth"]) + parts["host"]
    return Phase("generate", seconds, _slowest(parts), prefill + decode, parts)


def _at_once(plan: Plan, rows: int) -> int:
    """Sequences that one engine decodes together."""
    one = (plan.prompt_tokens + plan.response_tokens) * kv_bytes(plan)
    held = int(memory(plan).kv_gib * 1024**3 / one)
    return max(1, min(rows, MAX_SEQUENCES, held))


def _experience(plan: Plan) -> Phase:
    flops = experience_flops(plan)
    gathered = plan.passes * sum(_gather_bytes(plan, role) for role in roles(plan))
    parts: dict[Bound, float] = {
        "compute": flops * _imbalance(plan) / plan.world / _rate(plan.gpu),
        "communication": gathered / reduced_link(plan),
    }
    return Phase("experience", max(parts.values()), _slowest(parts), flops, parts)


def _update(plan: Plan) -> Phase:
    """Arithmetic with the optimiser's traffic; sharded weights travel meanwhile, summed gradients afterwards."""
    flops = update_flops(plan)
    overlapped = alone = stepped = 0.0
    for name, role in roles(plan).items():
        pieces = plan.pieces if plan.sharded(name) else 1
        stepped += plan.steps * role.trained / pieces * OPTIMISER_BYTES
        if name in ("policy", "critic", "base"):
            overlapped += plan.micro_batches * 2 * _gather_bytes(plan, name)
            if pieces > 1:
                overlapped += plan.micro_batches * _ring(plan) * role.trained * REDUCED
            else:
                alone += plan.steps * 2 * _ring(plan) * role.trained * MASTER
    parts: dict[Bound, float] = {
        "compute": flops * _imbalance(plan) / plan.world / _rate(plan.gpu),
        "memory bandwidth": stepped / _traffic(plan.gpu),
        "communication": (overlapped + alone) / reduced_link(plan),
    }
    link = reduced_link(plan)
    seconds = max(parts["compute"], overlapped / link) + alone / link + parts["memory bandwidth"]
    return Phase("update", seconds, _slowest(parts), flops, parts)


def _sync(plan: Plan) -> Phase:
    """The policy's weights, gathered where they are sharded, and copied into the engine or handed over as a file."""
    weights = plan.shape.parameters
    gathered = _ring(plan) * weights * MASTER if plan.sharded("policy") else 0.0
    parts: dict[Bound, float] = {"communication": gathered / reduced_link(plan)}
    if plan.mode == "server":
        parts["disk"] = 2 * weights * plan.model_bytes / DISK
    elif plan.gpu.kind == "cpu":
        parts["host"] = PACK_SECONDS + weights / PACK_RATE
    else:
        parts["memory bandwidth"] = weights * (MASTER + plan.model_bytes) / _traffic(plan.gpu)
    return Phase("sync", sum(parts.values()), _slowest(parts), 0.0, parts)


def _gather_bytes(plan: Plan, name: str) -> float:
    """What a rank receives when a role's weights are gathered once; nothing where they are whole."""
    return _ring(plan) * roles(plan)[name].weights * plan.model_bytes if plan.sharded(name) else 0.0


def _ring(plan: Plan) -> float:
    """Share of a tensor that each rank receives in a gather, and sends in a reduction."""
    return (plan.world - 1) / plan.world


def _imbalance(plan: Plan) -> float:
    """Rows of the rank with the most, over their mean."""
    return plan.rows * plan.world / plan.recipe.ppo.rollout_batch_size


def _slowest(parts: dict[Bound, float]) -> Bound:
    return max(parts, key=lambda bound: parts[bound])
