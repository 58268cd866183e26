"""Figures, comparison, estimate and tables of `scripts.bench_stage`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.recipe import Recipe
from scripts.bench_ppo_models import Shape
from scripts.bench_ppo_report import PHASES, Spread
from scripts.bench_stage_run import update_seconds
from scripts.estimate_check import bench_shape
from scripts.estimate_memory import memory, roles
from scripts.estimate_plan import GIB, GPUS, Plan, Sharding
from scripts.estimate_time import times

CARDS = {"H200": "h200", "H100": "h100-80g", "A100": "a100-80g"}
"""Part of a GPU's name, and what the estimate calls it."""
ESTIMATED = {"rollout": "generate", "experience": "experience", "update": "update", "sync": "sync"}
RATE = "time/rollout_tokens_per_second"
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Difference:
    """One number of metrics.jsonl that differs between two runs; `relative` is to the larger of both."""

    step: int
    key: str
    resumed: float | str
    undisturbed: float | str
    relative: float


@dataclass(frozen=True)
class Comparison:
    """The updates after a resume beside those of a run that nothing disturbed.

    Attributes:
        numbers: how many were compared; times are not.
        missing: rows that one of the two runs does not have.
        largest: None where all are equal bit for bit.
        same_tokens: every update generated equally many tokens in both.
    """

    after: int
    numbers: int
    missing: int
    differing: int
    largest: Difference | None
    same_tokens: bool

    @property
    def identical(self) -> bool:
        """Whether both runs are the same."""
        return self.missing == 0 and self.largest is None


def compare(resumed: Rows, undisturbed: Rows, after: int) -> Comparison:
    """Compares the rows after the update `after`, all keys but those of times."""
    ours, others = (_by_key(rows, after) for rows in (resumed, undisturbed))
    both = ours.keys() & others.keys()
    found = [Difference(*place, ours[place], others[place], _apart(ours[place], others[place])) for place in both]
    differing = [one for one in found if one.relative > 0]
    return Comparison(
        after=after,
        numbers=len(both),
        missing=len(ours.keys() ^ others.keys()),
        differing=len(differing),
        largest=max(differing, key=lambda one: (one.relative, one.step, one.key), default=None),
        same_tokens=all(one.key != "rollout/generated_tokens" for one in differing),
    )


def warm(rows: Rows, cold: Iterable[int]) -> list[Mapping[str, Any]]:
    """The updates' rows, those that came first in a process left out."""
    left_out = set(cold)
    return [row for row in rows if "time/update" in row and row["step"] not in left_out]


def figures(rows: Rows) -> dict[str, Any]:
    """Median and range over the updates: seconds by phase and of a whole update, tokens per second, length."""
    columns = {phase: [row[f"time/{phase}"] for row in rows] for phase in PHASES}
    columns["whole update"] = [update_seconds(row) for row in rows]
    return {
        "updates": len(rows),
        "seconds": {name: Spread.of(values)._asdict() for name, values in columns.items()},
        "generated_tokens_per_second": Spread.of(row[RATE] for row in rows)._asdict(),
        "response_tokens": Spread.of(row["response/length"] for row in rows)._asdict(),
    }


def memory_of(manifest: Mapping[str, Any], card_gib: float | None) -> dict[str, Any]:
    """GiB of each role on rank 0, and peaks: of the fullest rank's process and GPU, and of the fullest card."""
    ranks = manifest.get("ranks", [manifest])
    peaks = {"process": "peak_memory_gib", "gpu": "peak_gpu_memory_gib"}
    found = {name: max((rank[key] for rank in ranks if key in rank), default=None) for name, key in peaks.items()}
    each = {role: {name: mib / 1024 for name, mib in parts.items()} for role, parts in manifest["memory"].items()}
    return {"roles": each, "peak": {**found, "resumed": None, "card": card_gib}}


def plan_of(shape: Shape, recipe: Recipe, machine: Mapping[str, Any], response_tokens: float) -> Plan:
    """What the estimate makes of a run on this machine; `machine["flops"]`, where measured, is its peak."""
    known = card_of(machine)
    gpu = GPUS[known or ("cpu" if machine["kind"] == "cpu" else "h100-80g")]
    size = machine["gpu_memory_gib"] or machine["memory_gib"] / recipe.launch.processes
    launch = recipe.launch
    return Plan(
        shape=bench_shape(shape),
        recipe=recipe,
        gpu=replace(gpu, memory_gib=size, flops=machine.get("flops") or gpu.flops),
        gpus=launch.processes,
        machines=1,
        sharding=_sharding(launch.accelerate),
        mode="colocate",
        prompt_tokens=recipe.data.max_prompt_tokens,
        response_tokens=response_tokens,
    )


def card_of(machine: Mapping[str, Any]) -> str | None:
    """What the estimate calls this device; None for one that it does not know."""
    if machine["kind"] == "cpu":
        return "cpu"
    return next((name for part, name in CARDS.items() if part in machine["device"]), None)


def expected(plan: Plan, engine: str, *, known: bool) -> dict[str, Any]:
    """The estimate beside the figures: GiB and seconds.

    It knows vLLM's engine alone: with another one, rollout is left out, and the engine holds the weights and no more.
    On a device that it does not know, seconds are left out.
    """
    items = {item.name: item.gib for item in memory(plan).items}
    if engine != "vllm":
        items["engine"] = plan.shape.parameters * plan.model_bytes / GIB
    pieces = {name: plan.pieces if plan.sharded(name) else 1 for name in roles(plan)}
    parts = {
        name: {"weights": role.weight_bytes / pieces[name] / GIB, "training": role.training_bytes / pieces[name] / GIB}
        for name, role in roles(plan).items()
    }
    found = times(plan)
    seconds = {phase: found.phase(theirs).seconds for phase, theirs in ESTIMATED.items()}
    if engine != "vllm":
        del seconds["rollout"]
    else:
        seconds["whole update"] = sum(seconds.values())
    return {"roles": parts, "items": items, "peak": sum(items.values()), "seconds": seconds if known else {}}


def markdown(report: Mapping[str, Any]) -> str:
    """All tables of a report, as `scripts.bench_stage` writes it."""
    asked, machine = report["asked"], report["machine"]
    ranks = "1 process" if asked["processes"] == 1 else f"{asked['processes']} processes"
    lines = [
        f"# The ppo stage on {machine['device']}: {asked['batch']} prompts x {asked['prompt']} tokens, responses up to "
        f"{asked['response']}, {asked['dtype']}, {ranks}",
        "",
        f"`{report['command']}`",
    ]
    for name, found in report["shapes"].items():
        lines += ["", f"## {name}: {found['parameters'] / 1e6:.1f}M parameters"]
        if "figures" in found:
            lines += ["", *_phases(found), "", *_memory(found), "", *_state(found)]
        lines += [f"\n{note}" for note in (*found["notes"], *_failure(found))]
    return "\n".join(lines) + "\n"


def _phases(found: Mapping[str, Any]) -> list[str]:
    measured, guess = found["figures"], found["estimate"]["seconds"]
    engine = " ".join(found["engine"].values())
    rows = [
        [name, Spread(**spread).show(".3f"), _number(guess.get(name), ".3f")]
        for name, spread in measured["seconds"].items()
    ]
    rate, length = (Spread(**measured[key]) for key in ("generated_tokens_per_second", "response_tokens"))
    rows += [["generated tokens per second", rate.show(".0f"), "-"], ["response tokens", length.show(".1f"), "-"]]
    which = "updates" if measured["warm"] else "updates, each the first in its process"
    return _table([f"seconds, {engine}: median [range] of {measured['updates']} {which}", "measured", "estimate"], rows)


def _memory(found: Mapping[str, Any]) -> list[str]:
    measured, guess = found["memory"], found["estimate"]
    rows = [[name, _parts(parts), _parts(guess["roles"].get(name))] for name, parts in measured["roles"].items()]
    rows += [[name, "-", _number(gib, ".2f")] for name, gib in guess["items"].items() if name not in measured["roles"]]
    peak = measured["peak"]
    on_gpu = peak["gpu"] is not None
    rows += [
        ["peak of the process", _number(peak["process"], ".2f"), "-" if on_gpu else _number(guess["peak"], ".2f")],
        ["peak of a process that reads a state", _number(peak["resumed"], ".2f"), "-"],
        ["peak of torch on the GPU", _number(peak["gpu"], ".2f"), _number(guess["peak"], ".2f") if on_gpu else "-"],
        ["peak of the card, all that is on it", _number(peak["card"], ".2f"), "-"],
    ]
    return _table(["GiB: weights + gradients and Adam", "measured", "estimate"], rows)


def _state(found: Mapping[str, Any]) -> list[str]:
    saved, resumed = found["saved"], found["resumed"]
    rows = [
        ["size, GiB", f"{saved['gib']:.2f}"],
        ["writing it, s", _number(saved["seconds"], ".2f")],
        ["a fresh start, to loaded models, s", f"{found['start_seconds']:.1f}"],
        ["a resume, to restored models, s", f"{resumed['seconds']:.1f}"],
        ["of which reading the state and loading the engine from it, s", f"{resumed['reading']:.2f}"],
    ]
    return [*_table([f"state after update {saved['update']}", "measured"], rows), "", said(found)]


def said(found: Mapping[str, Any]) -> str:
    """The resume and what it changed, in a sentence."""
    start = f"{found['disturbed_by']}, it went on after update {found['resumed']['update']}"
    comparison = found.get("comparison")
    if comparison is None:
        return f"{start}; it was not compared with an undisturbed run."
    if comparison["identical"]:
        return f"{start}; the {comparison['numbers']} numbers since then are those of an undisturbed run, bit for bit."
    if comparison["missing"]:
        return f"{start}; {comparison['missing']} numbers are in one of the two runs alone, this or an undisturbed one."
    most = comparison["largest"]
    tokens = "the same numbers of tokens" if comparison["same_tokens"] else "other numbers of tokens"
    return (
        f"{start}; {comparison['differing']} of {comparison['numbers']} numbers since then differ from those of an "
        f"undisturbed run, by {most['relative']:.2g} at most ({most['key']} of update {most['step']}: "
        f"{most['resumed']} and {most['undisturbed']}), with {tokens} generated."
    )


def _by_key(rows: Rows, after: int) -> dict[tuple[int, str], float | str]:
    return {
        (row["step"], key): value
        for row in rows
        if row["step"] > after
        for key, value in row.items()
        if key != "step" and not key.startswith("time/")
    }


def _apart(one: float | str, other: float | str) -> float:
    """0 for equal values, else the difference relative to the larger; infinite beside a number that is not finite."""
    if one == other:
        return 0.0
    if isinstance(one, str) or isinstance(other, str):
        return math.inf
    return abs(one - other) / max(abs(one), abs(other))


def _sharding(accelerate: str | None) -> Sharding:
    if accelerate is None:
        return "ddp"
    kind = yaml.safe_load(Path(accelerate).read_text(encoding="utf-8"))["distributed_type"]
    return "fsdp2" if kind == "FSDP" else "ddp"


def _parts(parts: Mapping[str, float] | None) -> str:
    return "-" if parts is None else f"{parts['weights']:.2f} + {parts['training']:.2f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)]


def _failure(found: Mapping[str, Any]) -> list[str]:
    return [f"Failed: {found['failed']}"] if "failed" in found else []
