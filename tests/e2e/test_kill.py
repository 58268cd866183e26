"""A stage is killed or interrupted, the same command is given again, and the run is complete."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from tests.workplace import Workplace

PATIENCE_SECONDS = 400


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Whatever a failing test leaves running ends with it."""
    before = set(psutil.Process().children(recursive=True))
    yield
    for process in set(psutil.Process().children(recursive=True)) - before:
        process.kill()


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Waits for the condition; the process must live until it holds."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.005)


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The stage and all that it started."""
    return psutil.Process(process.pid).children(recursive=True)


def ended(processes: list[psutil.Process]) -> bool:
    """Whether all are gone within a while."""
    _, alive = psutil.wait_procs(processes, timeout=60)
    return all(item.status() == psutil.STATUS_ZOMBIE for item in alive)


def interrupt(place: Workplace, words: tuple[str, ...], when: Callable[[], object], number: signal.Signals) -> str:
    """Starts `tristage`, sends it a signal once `when` holds, and returns stderr; nothing may be left running."""
    process = place.start(*words)
    wait_until(lambda: when() and family(process), process)
    processes = family(process)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), err[-3000:]
    assert ended(processes)
    assert "Traceback" not in err
    return err


def kill_stage(place: Workplace, words: tuple[str, ...], when: Callable[[], object]) -> None:
    """Starts `tristage` and kills the stage's whole process group once `when` holds."""
    process = place.start(*words)
    wait_until(when, process)
    stage = family(process)[0]
    os.killpg(stage.pid, signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 128 + signal.SIGKILL
    assert "was ended by signal 9" in err
    assert "it resumes" in err


def run_to_the_end(place: Workplace, *words: str) -> str:
    done = place.tristage(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def logged(place: Workplace, step: int) -> bool:
    """Whether the unfinished PPO has logged update `step`."""
    return any(row["step"] == step and "objective/kl" in row for row in place.rows("ppo.partial"))


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def assert_same_ppo(place: Workplace, expected: Workplace) -> None:
    """Metrics, samples and every weight are those of the uninterrupted run, bit for bit."""
    assert without_time(place.rows("ppo")) == without_time(expected.rows("ppo"))
    assert place.rows("ppo", "samples.jsonl") == expected.rows("ppo", "samples.jsonl")
    ours, theirs = place.manifest("ppo"), expected.manifest("ppo")
    timed = ("log.txt", "metrics.jsonl")
    assert {k: v for k, v in ours["files"].items() if k not in timed} == {
        k: v for k, v in theirs["files"].items() if k not in timed
    }
    assert ours["metrics"] == theirs["metrics"]
    assert ours["health"] == theirs["health"]


def test_ppo_interrupted_and_killed_ends_as_if_it_had_not_been(
    copied: Callable[..., Workplace], finished_run: Workplace
) -> None:
    """Ctrl-C after update 3 (saved: 2), then kill -9 after update 5 (saved: 4): rows past the save are made again."""
    place = copied("ppo")
    words = ("ppo", "recipe.yaml")
    err = interrupt(place, words, lambda: logged(place, 3), signal.SIGINT)
    assert err == (
        "error: ppo was interrupted. Run the same command again: it resumes from the last complete checkpoint.\n"
    )
    assert (place.run / "ppo.partial" / "state" / "update_000002" / "checkpoint.json").exists()
    assert not (place.run / "ppo").exists()
    kill_stage(place, words, lambda: logged(place, 5))
    assert "resumed after update 4 of 7" in run_to_the_end(place, *words)
    assert_same_ppo(place, finished_run)
    assert place.manifest("ppo")["wall_seconds"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 40, 400])
def test_ppo_cut_off_in_the_middle_of_a_row_resumes(
    copied: Callable[..., Workplace], finished_run: Workplace, cut: int
) -> None:
    place = copied("ppo")
    kill_stage(place, ("ppo", "recipe.yaml"), lambda: logged(place, 3))
    file = place.run / "ppo.partial" / "metrics.jsonl"
    os.truncate(file, file.stat().st_size - cut)
    run_to_the_end(place, "ppo", "recipe.yaml")
    assert_same_ppo(place, finished_run)


@pytest.mark.slow
def test_a_killed_tristage_takes_its_stage_with_it(copied: Callable[..., Workplace], finished_run: Workplace) -> None:
    """kill -9 of the command itself: the stage must not go on writing beside the one that resumes."""
    place = copied("ppo")
    interrupt(place, ("ppo", "recipe.yaml"), lambda: logged(place, 3), signal.SIGKILL)
    run_to_the_end(place, "ppo", "recipe.yaml")
    assert_same_ppo(place, finished_run)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_library_trainers_resume_from_their_checkpoint(
    copied: Callable[..., Workplace], finished_run: Workplace, stage: str
) -> None:
    place = copied(stage)
    checkpoint = place.run / f"{stage}.partial" / "state" / "checkpoint-3" / "tristage.json"
    kill_stage(place, (stage, "recipe.yaml"), checkpoint.exists)
    assert not (place.run / stage / "manifest.json").exists()
    assert "resuming from checkpoint-" in run_to_the_end(place, stage, "recipe.yaml")
    steps = [row["step"] for row in place.rows(stage) if "loss" in row]
    assert steps == list(range(1, 13))
    keys = [(row["step"], frozenset(row)) for row in place.rows(stage)]
    assert len(keys) == len(set(keys))
    for key in ("steps", "trained_tokens", "optimizer_steps"):
        assert place.manifest(stage)["metrics"][key] == finished_run.manifest(stage)["metrics"][key] > 0
    assert not (place.run / stage / "state").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_a_direct_method_killed_ends_as_if_it_had_not_been(copied: Callable[..., Workplace], stage: str) -> None:
    place = copied()
    steps = {"learning_rate": "1e-3", "max_steps": "12", "save_steps": "3", "logging_steps": "1", "eval_steps": "4"}
    settings = [word for key, value in steps.items() for word in (f"--{stage}.trainer.{key}", value)]
    words = (stage, "recipe.yaml", *settings, f"--{stage}.trainer.per_device_train_batch_size", "4")
    run_to_the_end(place, *words)
    expected = place.manifest(stage), place.rows(stage, "samples.jsonl")
    reports = {name for name in expected[0]["files"] if name.startswith("evaluation/")}
    assert reports == {f"evaluation/update_{step:06d}.json" for step in (0, 4, 8, 12)}
    shutil.rmtree(place.run / stage)
    checkpoint = place.run / f"{stage}.partial" / "state" / "checkpoint-3" / "tristage.json"
    kill_stage(place, words, checkpoint.exists)
    assert not (place.run / stage).exists()
    assert "resuming from checkpoint-" in run_to_the_end(place, *words)
    ours, samples = place.manifest(stage), place.rows(stage, "samples.jsonl")
    assert samples == expected[1]
    for name in ("model.safetensors", *reports):
        assert ours["files"][name] == expected[0]["files"][name], name
    assert ours["metrics"]["trained_tokens"] == expected[0]["metrics"]["trained_tokens"] > 0
    steps_logged = [row["step"] for row in place.rows(stage) if "loss" in row]
    assert steps_logged == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_kills_before_the_first_save_only_cost_time(
    copied: Callable[..., Workplace], finished_run: Workplace, stage: str
) -> None:
    place = copied(stage)
    draw = random.Random(stage)
    for _ in range(3):
        process = place.start(stage, "recipe.yaml")
        time.sleep(draw.uniform(0.1, 8.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE_SECONDS)
    run_to_the_end(place, stage, "recipe.yaml")
    expected = finished_run.manifest(stage)["files"]["model.safetensors"]
    assert place.manifest(stage)["files"]["model.safetensors"] == expected


@pytest.mark.slow
def test_sigterm_is_passed_on_and_a_stage_resumes(copied: Callable[..., Workplace], finished_run: Workplace) -> None:
    place = copied("ppo")
    interrupt(place, ("ppo", "recipe.yaml"), lambda: logged(place, 3), signal.SIGTERM)
    run_to_the_end(place, "ppo", "recipe.yaml")
    assert_same_ppo(place, finished_run)


@pytest.mark.slow
def test_ctrl_c_while_the_stage_is_importing(copied: Callable[..., Workplace]) -> None:
    place = copied("ppo")
    (place.run / "ppo.partial").mkdir()
    err = interrupt(place, ("ppo", "recipe.yaml"), (place.run / "ppo.partial" / "job.json").exists, signal.SIGINT)
    assert "ppo was interrupted" in err


@pytest.mark.slow
def test_an_overwrite_that_was_killed_resumes_and_the_old_artifact_stays(copied: Callable[..., Workplace]) -> None:
    place = copied()
    old = place.manifest("ppo")
    words = ("ppo", "recipe.yaml", "--overwrite", "--ppo.kl_coef", "0.1")
    kill_stage(place, words, lambda: logged(place, 3))
    assert place.manifest("ppo") == old
    assert "resumed after update 2 of 7" in run_to_the_end(place, *words)
    assert place.manifest("ppo")["fingerprint"]["sections"]["ppo"]["kl_coef"] == 0.1


@pytest.mark.slow
@pytest.mark.vllm
def test_ppo_with_vllm_killed_and_resumed_is_the_uninterrupted_run(copied: Callable[..., Workplace]) -> None:
    pytest.importorskip("vllm")
    place = copied("ppo")
    words = ("ppo", "recipe.yaml", "--rollout.engine", "vllm")
    run_to_the_end(place, *words)
    expected = Workplace(place.path / "uninterrupted")
    shutil.copytree(place.run, expected.run)
    assert expected.manifest("ppo")["engine"]["name"] == "vllm"
    shutil.rmtree(place.run / "ppo")
    kill_stage(place, words, lambda: logged(place, 3))
    run_to_the_end(place, *words)
    assert_same_ppo(place, expected)
