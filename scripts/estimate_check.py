"""The estimates beside what was measured: `python -m scripts.estimate_check` prints the table of docs/scaling.md.

Measured is the ppo stage on two CPU cores (benchmarks/bench_ppo_*_cpu.json). The peak of each file's own matrix
products and its mean response length are given to the estimate; everything else it must find.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.recipe import Recipe
from scripts.bench_ppo_models import Shape
from scripts.bench_ppo_report import PEER
from scripts.estimate_memory import memory
from scripts.estimate_plan import GPUS, Plan
from scripts.estimate_shapes import ModelShape
from scripts.estimate_time import times

ROOT = Path(__file__).resolve().parent.parent
FILES = ("benchmarks/bench_ppo_a_cpu.json", "benchmarks/bench_ppo_b_cpu.json")


@dataclass(frozen=True)
class Comparison:
    """One number: of which run, what, and in what unit."""

    run: str
    what: str
    unit: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted / measured."""
        return self.predicted / self.measured


def bench_shape(shape: Shape) -> ModelShape:
    """A benchmark's model: heads of hidden / heads channels, a tied head, norms, and Qwen2's biases."""
    head = shape.hidden_size // shape.num_attention_heads
    biases = (shape.num_attention_heads + 2 * shape.num_key_value_heads) * head if shape.family == "qwen2" else 0
    return ModelShape(**vars(shape), head_size=head, tied=True, small=2 * shape.hidden_size + biases)


def bench_plan(run: dict[str, Any], side: str) -> Plan:
    """The plan of one side of a benchmark."""
    workload, settings = run["workload"], run["settings"][side]
    lengths = {"max_prompt_tokens": workload["prompt_tokens"], "max_response_tokens": workload["response_tokens"]}
    recipe = Recipe.model_validate(
        {
            "name": "bench",
            "model": {"name_or_path": "bench", **settings["model"]},
            "data": lengths,
            "ppo": settings["ppo"],
            "rollout": settings["rollout"],
        }
    )
    peak = statistics.median(gemm["flops"] for gemm in run["gemm"])
    return Plan(
        shape=bench_shape(Shape(**workload["shape"])),
        recipe=recipe,
        gpu=replace(GPUS["cpu"], flops=peak),
        gpus=1,
        machines=1,
        sharding="ddp",
        mode="colocate",
        prompt_tokens=workload["prompt_tokens"],
        response_tokens=run["summary"][side]["response_length"]["median"],
    )


def comparisons() -> Iterator[Comparison]:
    """Every number that both have."""
    for file in FILES:
        run = json.loads((ROOT / file).read_text(encoding="utf-8"))
        for side, found in run["summary"].items():
            if side == PEER:
                continue
            plan, name = bench_plan(run, side), f"{run['asked']['workload']}, {side}"
            spent, phases, update = times(plan), found["phases"], found["update_phase"]
            counted = update["achieved_flops"] * phases["update"]["seconds"]
            yield Comparison(name, "operations", "TFLOP", spent.phase("update").flops / 1e12, counted / 1e12)
            for ours, theirs in (("generate", "rollout"), ("experience",) * 2, ("update",) * 2, ("sync",) * 2):
                yield Comparison(name, theirs, "s", spent.phase(ours).seconds, phases[theirs]["seconds"])
            yield Comparison(name, "whole update", "s", spent.seconds, found["wall_seconds"]["median"])
            peak = found["peak_memory_gib"]["median"]
            yield Comparison(name, "peak memory", "GiB", memory(plan).total_gib, peak)


def main() -> None:
    """Prints the table."""
    print("| run | what | predicted | measured | ratio |\n| --- | --- | ---: | ---: | ---: |")
    for one in comparisons():
        numbers = f"{one.predicted:.3g} {one.unit} | {one.measured:.3g} {one.unit} | {one.ratio:.2f}"
        print(f"| {one.run} | {one.what} | {numbers} |")


if __name__ == "__main__":
    main()
