from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.compare.spent import cost_of, mean_cost, seconds_per_step, training_seconds

CPU: dict[str, Any] = {"device": "cpu (2 threads)", "wall_seconds": 100.0, "cpu_seconds": 150.0, "peak_memory_gib": 1.5}
GPU: dict[str, Any] = {"device": "NVIDIA H100", "wall_seconds": 60.0, "cpu_seconds": 70.0, "peak_memory_gib": 2.0}


def stage(path: Path, kind: str, rows: Sequence[Mapping[str, float]], entries: Mapping[str, Any]) -> Path:
    path.mkdir(parents=True)
    manifest = {"version": 1, "kind": kind, "files": {}, "fingerprint": {"sha256": "0"}, **entries}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_costs_are_summed_and_peaks_are_the_highest(tmp_path: Path) -> None:
    stages = [stage(tmp_path / "rm", "rm", [], CPU), stage(tmp_path / "ppo", "ppo", [], CPU | {"peak_memory_gib": 1.9})]
    assert cost_of(stages, price_per_hour=3.6) == {
        "wall_seconds": 200.0,
        "cpu_seconds": 300.0,
        "gpu_seconds": None,
        "peak_memory_gib": 1.9,
        "peak_gpu_memory_gib": None,
        "money": pytest.approx(0.2),
    }
    assert cost_of(stages, price_per_hour=0.0)["money"] is None


def test_on_a_gpu_its_seconds_count(tmp_path: Path) -> None:
    found = cost_of([stage(tmp_path / "dpo", "dpo", [], GPU | {"peak_gpu_memory_gib": 11.0})], 0.0)
    assert (found["gpu_seconds"], found["peak_gpu_memory_gib"]) == (60.0, 11.0)


def test_means_over_seeds_keep_the_highest_peak() -> None:
    costs = [{"cpu_seconds": 10.0, "peak_memory_gib": 1.0, "money": None}]
    costs += [{"cpu_seconds": 20.0, "peak_memory_gib": 3.0, "money": None}]
    assert mean_cost(costs) == {"cpu_seconds": 15.0, "peak_memory_gib": 3.0, "money": None}


def test_seconds_per_step_of_a_trainer_are_its_manifests(tmp_path: Path) -> None:
    timed = {"step_seconds": {"wall": 0.5, "cpu": 0.9, "steps": 7}}
    assert seconds_per_step(stage(tmp_path / "cpu", "dpo", [], CPU | timed)) == 0.9
    assert seconds_per_step(stage(tmp_path / "gpu", "dpo", [], GPU | timed)) == 0.5
    assert (
        training_seconds(stage(tmp_path / "rm", "rm", [], CPU | timed | {"metrics": {"optimizer_steps": 100}})) == 90.0
    )


def test_seconds_per_step_of_ppo_leave_the_first_update_out(tmp_path: Path) -> None:
    metrics = {"metrics": {"optimizer_steps": 12, "updates": 3}}
    phases = {"time/rollout": 1.0, "time/experience": 0.5, "time/update": 2.0, "time/sync": 0.5}
    rows: list[dict[str, float]] = [{"step": 0, "eval/gold": 1.0}]
    rows += [{"step": n, "time/cpu_seconds": seconds, **phases} for n, seconds in ((1, 99.0), (2, 8.0), (3, 4.0))]
    assert seconds_per_step(stage(tmp_path / "cpu", "ppo", rows, CPU | metrics)) == 6.0 / 4
    assert seconds_per_step(stage(tmp_path / "gpu", "ppo", rows, GPU | metrics)) == 4.0 / 4
