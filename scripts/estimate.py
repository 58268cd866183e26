"""Memory per GPU and time per update of the ppo stage, before anything is started.

    python -m scripts.estimate 8b 8
    python -m scripts.estimate 70b 8 --machines 8 --gpu h200 --mode server --server-gpus 8 --tensor-parallel 8
    python -m scripts.estimate runs/demo/sft 1 --gpu cpu --recipe recipes/demo.yaml --ppo.sharing lora

MODEL is a name of the table below, a directory with config.json or a hub id; GPUS is the number per machine. Settings
come from --recipe, and any of its keys can be given as for `tristage`. Formulas and what they rest on: docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from pipeline.errors import UserError
from pipeline.load import load_recipe
from pipeline.recipe import Recipe
from scripts.estimate_advice import advise, as_dict
from scripts.estimate_memory import memory
from scripts.estimate_plan import GPUS, Gpu, Plan, Sharding
from scripts.estimate_shapes import NAMED, load_shape
from scripts.estimate_time import times

RECIPE = "recipes/llama3-8b-fsdp.yaml"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the plan's tables, or JSON."""
    options, overrides = _parser().parse_known_args(arguments)
    try:
        plan = make_plan(options, overrides)
        text = json.dumps(as_dict(plan), indent=2) if options.json else report(plan)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    print(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.estimate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"{', '.join(NAMED)}, a directory, or a hub id")
    add("gpus", metavar="GPUS", type=int, help="per machine, of the trainer")
    add("--machines", type=int, help="default: launch.machines")
    add("--gpu", choices=GPUS, default="h100-80g")
    add("--memory-gib", type=float, help="of one GPU, in place of --gpu's; likewise:")
    add("--tflops", type=float, help="its dense peak, 1e12 per second")
    add("--bandwidth", type=float, help="of its memory, GB/s")
    add("--link", type=float, help="to the other GPUs of a machine, GB/s one way")
    add("--network", type=float, help="to other machines, GB/s per GPU")
    add("--recipe", default=RECIPE, help=f"default: {RECIPE}")
    add("--sharding", choices=["ddp", "fsdp2"], help="default: by launch.accelerate")
    add("--mode", choices=["colocate", "server"], help="default: rollout.mode")
    add("--server-gpus", type=int, default=8, help="GPUs of the rollout server beside the trainer's")
    add("--tensor-parallel", type=int, default=1, help="GPUs of one engine on the server")
    add("--prompt-tokens", type=float, help="mean; default: half of data.max_prompt_tokens")
    add("--response-tokens", type=float, help="mean; default: half of data.max_response_tokens")
    add("--json", action="store_true")
    return parser


def make_plan(options: argparse.Namespace, overrides: Sequence[str]) -> Plan:
    """The plan of a command line; `overrides` are keys of the recipe.

    Errors:
        UserError: the model or the recipe cannot be read, or numbers that no cluster has.
    """
    mode_words = ["--rollout.mode", options.mode] if options.mode else []
    recipe = load_recipe(options.recipe, [*overrides, *mode_words])
    machines = recipe.launch.machines if options.machines is None else options.machines
    numbers = {
        "GPUS": options.gpus,
        "--machines": machines,
        "--server-gpus": options.server_gpus,
        "--tensor-parallel": options.tensor_parallel,
    }
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"{name} is {number}.", mend="Give at least 1.")
    mode = options.mode or recipe.rollout.mode
    served = mode == "server"
    if served and options.server_gpus % options.tensor_parallel:
        raise UserError(
            f"--server-gpus {options.server_gpus} is no multiple of --tensor-parallel {options.tensor_parallel}.",
            mend="Make it one: every engine of the server is spread over that many GPUs.",
        )
    return Plan(
        shape=load_shape(options.model),
        recipe=recipe,
        gpu=_gpu(options),
        gpus=options.gpus,
        machines=machines,
        sharding=options.sharding or _sharding(recipe),
        mode=mode,
        prompt_tokens=options.prompt_tokens or recipe.data.max_prompt_tokens / 2,
        response_tokens=options.response_tokens or recipe.data.max_response_tokens / 2,
        server_gpus=options.server_gpus if served else 0,
        tensor_parallel=options.tensor_parallel if served else 1,
        overlap=recipe.rollout.async_steps > 0,
    )


def _gpu(options: argparse.Namespace) -> Gpu:
    given = {
        "memory_gib": options.memory_gib,
        "flops": options.tflops and options.tflops * 1e12,
        "bandwidth": options.bandwidth and options.bandwidth * 1e9,
        "link": options.link and options.link * 1e9,
        "network": options.network and options.network * 1e9,
    }
    return replace(GPUS[options.gpu], **{name: value for name, value in given.items() if value is not None})


def _sharding(recipe: Recipe) -> Sharding:
    """fsdp2 where launch.accelerate is a file that says FSDP."""
    file = recipe.launch.accelerate
    if file is None:
        return "ddp"
    if not Path(file).is_file():
        raise UserError(f"launch.accelerate: {file} does not exist.", mend="Name a file such as fsdp2.yaml.")
    content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    return "fsdp2" if content.get("distributed_type") == "FSDP" else "ddp"


def report(plan: Plan) -> str:
    """The tables and the advice as text."""
    found, spent, ppo = memory(plan), times(plan), plan.recipe.ppo
    size = ppo.rollout_batch_size
    head = (
        f"{plan.shape.parameters:,} parameters on {plan.machines} x {plan.gpus} {plan.gpu.name}, {plan.sharding}, "
        f"rollouts {plan.mode}, {plan.recipe.model.dtype}; sharing {ppo.sharing}, critic {ppo.critic}"
    )
    lines = [
        head,
        f"update: {size} sequences of {plan.prompt_tokens:.0f} + {plan.response_tokens:.0f} tokens (means), "
        f"{ppo.num_ppo_epochs} epochs x {ppo.num_minibatches} steps, {plan.micro_batches} micro-batches per rank",
        "",
        "memory per GPU                 GiB  formula",
        *(f"  {item.name:24} {item.gib:7.2f}  {item.formula}" for item in found.items),
        f"  {'sum, at the peak':24} {found.total_gib:7.2f}  of {found.limit_gib:.1f} that can be planned for",
        f"  engine's key-value cache {found.kv_gib:7.2f}  its sequences fill {found.wanted_kv_gib:.2f} together",
        f"  host while loading     {found.host_gib:9.2f}  of a machine: a sharded model is read by one rank at a time",
        "",
        "time per update            seconds  bounded by         each resource alone",
    ]
    for phase in spent.phases:
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in phase.parts.items())
        lines.append(f"  {phase.name:24} {phase.seconds:7.2f}  {phase.bound:17}  {parts}")
    rate = size * (plan.prompt_tokens + plan.response_tokens) / spent.seconds
    beside = ", sampling beside the rest" if spent.overlapped else ""
    lines.append(f"  {'update':24} {spent.seconds:7.2f}  {rate:,.0f} tokens/s{beside}")
    return "\n".join([*lines, "", *(f"- {line}" for line in advise(plan))])


if __name__ == "__main__":
    main(sys.argv[1:])
