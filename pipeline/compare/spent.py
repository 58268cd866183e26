"""What a stage has cost, read from its manifest and metrics."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import read_manifest
from pipeline.tracking import read_metrics

_SUMMED = ("wall_seconds", "cpu_seconds", "gpu_seconds")
_HIGHEST = ("peak_memory_gib", "peak_gpu_memory_gib")


def used_gpu(manifest: Mapping[str, Any]) -> bool:
    """Whether the stage ran on a GPU."""
    return not str(manifest["device"]).startswith("cpu")


def training_seconds(directory: Path) -> float:
    """What a finished stage took in optimiser steps and rollouts: steps times `seconds_per_step`."""
    return seconds_per_step(directory) * read_manifest(directory)["metrics"]["optimizer_steps"]


def seconds_per_step(directory: Path) -> float:
    """CPU seconds (GPU seconds on a GPU) per optimiser step of a finished stage: training and rollouts alone.

    The first PPO update and the first optimiser step are left out where there are others: they warm up.
    """
    manifest = read_manifest(directory)
    if manifest["kind"] != "ppo":
        return float(manifest["step_seconds"]["wall" if used_gpu(manifest) else "cpu"])
    rows = [row for row in read_metrics(directory) if "time/cpu_seconds" in row]
    steps = manifest["metrics"]["optimizer_steps"] / manifest["metrics"]["updates"]
    phases = ("time/rollout", "time/experience", "time/update", "time/sync")
    names = phases if used_gpu(manifest) else ("time/cpu_seconds",)
    return statistics.fmean(sum(row[name] for name in names) for row in rows[1:] or rows) / steps


def cost_of(directories: Iterable[Path], price_per_hour: float) -> dict[str, float | None]:
    """Seconds summed and peaks over the stages, and their money at `price_per_hour` of wall time."""
    spent = [_cost(read_manifest(directory)) for directory in directories]
    total = {key: _over(sum, [each[key] for each in spent]) for key in _SUMMED}
    total |= {key: _over(max, [each[key] for each in spent]) for key in _HIGHEST}
    wall = total["wall_seconds"] or 0.0
    return total | {"money": wall / 3600 * price_per_hour if price_per_hour else None}


def mean_cost(costs: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Means over seeds; of the peaks the highest."""
    return {key: _over(max if key in _HIGHEST else statistics.fmean, [cost[key] for cost in costs]) for key in costs[0]}


def _cost(manifest: Mapping[str, Any]) -> dict[str, float | None]:
    return {
        "wall_seconds": manifest["wall_seconds"],
        "cpu_seconds": manifest["cpu_seconds"],
        "gpu_seconds": manifest["wall_seconds"] if used_gpu(manifest) else None,
        "peak_memory_gib": manifest["peak_memory_gib"],
        "peak_gpu_memory_gib": manifest.get("peak_gpu_memory_gib"),
    }


def _over(reduce: Any, values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(reduce(known)) if known else None
