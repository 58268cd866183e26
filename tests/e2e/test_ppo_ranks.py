"""PPO on two ranks is PPO on one: whole models and sharded ones, uneven batches, told to end and resumed."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.workplace import ROOT, Workplace

FSDP2 = ("--launch.processes", "2", "--launch.accelerate", str(ROOT / "configs" / "accelerate" / "fsdp2.yaml"))
DDP = ("--launch.processes", "2")
UNEVEN = ("--ppo.rollout_batch_size", "7", "--ppo.num_minibatches", "7", "--ppo.updates", "3")
TOLERANCE = 1e-5


def ppo(place: Workplace, *words: str) -> Workplace:
    done = place.tristage("ppo", "recipe.yaml", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return place


def without_time(place: Workplace) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in place.rows("ppo")]


def assert_close(place: Workplace, expected: Workplace) -> None:
    """Every metric and weight of policy and critic within the tolerance; the same responses."""
    ours, theirs = without_time(place), without_time(expected)
    for one, other in zip(ours, theirs, strict=True):
        assert {k: v for k, v in one.items() if isinstance(v, str)} == {
            k: v for k, v in other.items() if isinstance(v, str)
        }
        numbers = {k: v for k, v in other.items() if not isinstance(v, str)}
        assert {k: one[k] for k in numbers} == pytest.approx(numbers, rel=TOLERANCE, abs=TOLERANCE)
    for folder in ("", "critic"):
        weights, wanted = (load_file(p.run / "ppo" / folder / "model.safetensors") for p in (place, expected))
        assert weights.keys() == wanted.keys()
        for name, tensor in weights.items():
            assert (tensor - wanted[name]).abs().max() < TOLERANCE, name
    answers = [
        [(r["step"], r["prompt"], r["response"]) for r in p.rows("ppo", "samples.jsonl")] for p in (place, expected)
    ]
    assert answers[0] == answers[1]
    assert place.manifest("ppo")["metrics"]["trained_tokens"] == expected.manifest("ppo")["metrics"]["trained_tokens"]


def test_two_ranks_with_whole_models(copied: Callable[..., Workplace], finished_run: Workplace) -> None:
    place = ppo(copied("ppo"), *DDP)
    assert_close(place, finished_run)
    manifest = place.manifest("ppo")
    assert len(manifest["ranks"]) == 2
    assert manifest["cpu_seconds"] > manifest["ranks"][0]["cpu_seconds"] > 0
    assert "waited" in (place.run / "ppo" / "logs" / "rank_00001.txt").read_text()
    left = {path.name for path in place.run.iterdir() if not path.name.startswith(".")}
    assert left == {"sft", "rm", "ppo"}


@pytest.mark.slow
def test_two_ranks_with_sharded_models(copied: Callable[..., Workplace], finished_run: Workplace) -> None:
    """Half of every weight lies on a rank, the saved policy is whole, and so is what the rollout engine got."""
    place = ppo(copied("ppo"), *FSDP2)
    assert_close(place, finished_run)
    ours, theirs = place.manifest("ppo")["memory"], finished_run.manifest("ppo")["memory"]
    for role, memory in theirs.items():
        assert ours[role]["weights"] == pytest.approx(memory["weights"] / 2, rel=0.01)
        assert ours[role]["training"] == pytest.approx(memory["training"] / 2, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [DDP, FSDP2])
def test_a_critic_on_the_trunk_of_a_sharded_policy(
    copied: Callable[..., Workplace], tmp_path: Path, ranks: Any
) -> None:
    shared = ("--ppo.critic", "shared", "--ppo.updates", "3")
    place = copied("ppo")
    ppo(place, *shared)
    expected = Workplace(Path(shutil.copytree(place.path, tmp_path / "one")))
    shutil.rmtree(place.run / "ppo")
    assert_close(ppo(place, *shared, *ranks), expected)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [DDP, FSDP2])
def test_seven_rows_in_seven_minibatches(copied: Callable[..., Workplace], tmp_path: Path, ranks: Any) -> None:
    """One rank has no row in any step."""
    place = copied("ppo")
    ppo(place, *UNEVEN)
    expected = Workplace(Path(shutil.copytree(place.path, tmp_path / "one")))
    shutil.rmtree(place.run / "ppo")
    assert_close(ppo(place, *UNEVEN, *ranks), expected)


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_gets_the_weights_of_sharded_models(copied: Callable[..., Workplace]) -> None:
    """Its log-probabilities are the trainer's after every hand-over; weights that stayed behind would show as 0.01."""
    place = ppo(copied("ppo"), *FSDP2, "--rollout.engine", "vllm", "--ppo.updates", "3")
    rows = [row for row in place.rows("ppo") if "rollout/max_logprob_gap" in row]
    assert len(rows) == 3
    assert all(row["rollout/max_logprob_gap"] < 1e-5 for row in rows)
    assert rows[-1]["objective/kl"] != 0.0


@pytest.mark.slow
def test_sharded_models_told_to_end_resume_bit_for_bit_and_on_one_rank_nearly(
    copied: Callable[..., Workplace], finished_run: Workplace, tmp_path: Path
) -> None:
    place = copied("ppo")
    expected = Workplace(Path(shutil.copytree(place.path, tmp_path / "whole")))
    ppo(expected, *FSDP2)
    process = place.start("ppo", "recipe.yaml", *FSDP2)
    while not any("objective/kl" in row for row in place.rows("ppo.partial")):
        assert process.poll() is None, process.communicate()[1][-3000:]
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75, err[-3000:]
    assert "told to end; its state after step" in out
    assert (place.run / "ppo.partial" / "requeue.json").exists()
    one = Workplace(Path(shutil.copytree(place.path, tmp_path / "one")))
    ppo(place, *FSDP2)
    assert without_time(place) == without_time(expected)
    weights = [load_file(p.run / "ppo" / "model.safetensors") for p in (place, expected)]
    assert all(bool((weights[0][name] == tensor).all()) for name, tensor in weights[1].items())
    done = one.tristage("ppo", "recipe.yaml")
    assert "saved by 2 processes, resumed by 1: results agree" in done.stdout
    assert_close(one, finished_run)
