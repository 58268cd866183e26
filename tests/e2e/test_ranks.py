"""Stages of several processes, started as people start them: what they leave behind, and a signal in the middle."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.workplace import ROOT, Workplace

pytestmark = pytest.mark.slow
TWO = ("--launch.processes", "2")
FSDP2 = (*TWO, "--launch.accelerate", str(ROOT / "configs" / "accelerate" / "fsdp2.yaml"))
MEASURED = re.compile(r"time/|ranks/|eval/runtime|eval/\w+_per_second")


def weights(place: Workplace, stage: str) -> dict[str, torch.Tensor]:
    return load_file(place.run / stage / "model.safetensors")


def numbers(place: Workplace, stage: str) -> list[dict[str, Any]]:
    """What was logged, without what a run measures of itself."""
    return [{k: v for k, v in row.items() if not MEASURED.match(k)} for row in place.rows(stage)]


def test_two_processes_make_the_reward_model_of_one(copied: Callable[..., Workplace], finished_run: Workplace) -> None:
    place = copied("rm", "ppo")
    done = place.tristage("rm", "recipe.yaml", *TWO, "--rm.trainer.per_device_train_batch_size", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (weights(each, "rm") for each in (place, finished_run))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-4)
    found, expected = (each.manifest("rm") for each in (place, finished_run))
    assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-3)
    assert found["normalisation"]["mean"] == pytest.approx(expected["normalisation"]["mean"], abs=1e-4)
    assert len(found["ranks"]) == 2
    assert found["files"].keys() - expected["files"].keys() == {"logs/rank_00001.txt"}

    rows = numbers(place, "rm")
    assert len({(row["step"], *row) for row in rows}) == len(rows) == len(numbers(finished_run, "rm"))
    assert any("time/ranks/forward_seconds_max" in row for row in place.rows("rm"))
    assert len(place.rows("rm", "samples.jsonl")) == len(finished_run.rows("rm", "samples.jsonl"))
    for said in (done.stdout, (place.run / "rm" / "log.txt").read_text()):
        assert said.count("rankings per optimiser step") == 1
    assert "4 rankings per optimiser step" in done.stdout


@pytest.mark.parametrize("launch", [TWO, FSDP2], ids=["whole", "sharded"])
def test_a_stage_told_to_save_ends_and_goes_on_as_if_it_had_not(
    copied: Callable[..., Workplace], launch: tuple[str, ...]
) -> None:
    place = copied("rm", "ppo")
    settings = {"max_steps": 60, "save_steps": 50, "eval_steps": 25, "logging_steps": 1, "learning_rate": 1e-3}
    trainer = [word for key, value in settings.items() for word in (f"--dpo.trainer.{key}", str(value))]
    words = ("dpo", "recipe.yaml", "--dpo.trainer.per_device_train_batch_size", "2", *trainer, *launch)
    done = place.tristage(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    (place.run / "dpo").rename(place.run / "uninterrupted")

    process = place.start(*words)
    partial = place.run / "dpo.partial"
    end = time.monotonic() + 300
    while not any(row["step"] >= 10 for row in place.rows("dpo.partial")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "ten steps were never taken"
        time.sleep(0.002)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 75, err[-3000:]
    marker = json.loads((partial / "requeue.json").read_text())
    assert marker["stage"] == "dpo"
    assert 10 <= marker["step"] < 50, "the signal came late"
    assert (partial / "state" / f"checkpoint-{marker['step']}" / "tristage.json").exists()
    assert not (partial / "model.safetensors").exists()

    again = place.tristage(*words)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"resuming from checkpoint-{marker['step']}" in again.stdout
    assert not (place.run / "dpo" / "requeue.json").exists()
    for name, weight in weights(place, "uninterrupted").items():
        torch.testing.assert_close(weights(place, "dpo")[name], weight, rtol=0, atol=0)
    assert numbers(place, "dpo") == numbers(place, "uninterrupted")
    assert place.rows("dpo", "samples.jsonl") == place.rows("uninterrupted", "samples.jsonl")


def test_evaluate_and_generate_are_shared_and_say_the_same(
    copied: Callable[..., Workplace], finished_run: Workplace
) -> None:
    place = copied()
    for stage in ("evaluate", "generate"):
        found = []
        for launch in ((), TWO):
            done = place.tristage(stage, "recipe.yaml", *launch)
            assert done.returncode == 0, done.stderr[-3000:]
            metrics = place.manifest(stage)["metrics"]
            figures = {key: value for key, value in metrics.items() if not key.endswith("per_second")}
            found.append((figures, place.rows(stage, "samples.jsonl")))
            (place.run / stage).rename(place.run / f"{stage}-{len(launch)}")
        assert found[1][0] == pytest.approx(found[0][0], abs=1e-5)
        texts = [[row["response"] for row in rows] for _, rows in found]
        assert texts[1] == texts[0]
