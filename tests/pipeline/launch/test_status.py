"""`tristage status`: stages joined from what Slurm says, what the jobs left, and the directories."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import write_json
from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.launch.launcher import JobState
from pipeline.launch.status import StageStatus, collect, duration, status

STAGES = ("sft", "rm", "ppo")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose three stages were launched as jobs 41, 42 and 43."""
    folder = tmp_path / "runs" / "tiny" / "slurm"
    folder.mkdir(parents=True)
    jobs = {
        stage: {"job": str(41 + n), "name": f"tiny-{stage}", "after": before, "log": f"{stage}-{41 + n}.log"}
        for n, (stage, before) in enumerate(zip(STAGES, (None, "sft", "rm"), strict=True))
    }
    write_json(folder / "jobs.json", {"jobs": jobs})
    return folder.parent


def finished(run: Path, stage: str) -> None:
    (run / stage).mkdir()
    write_json(run / stage / "manifest.json", {})
    started(run, stage, "")


def started(run: Path, stage: str, log: str) -> None:
    (run / "slurm" / f"{stage}-{41 + STAGES.index(stage)}.log").write_text(log)


def unfinished(run: Path, stage: str, *rows: dict[str, Any]) -> None:
    (run / f"{stage}.partial").mkdir()
    write_json(run / f"{stage}.partial" / "job.json", {})
    (run / f"{stage}.partial" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def of(run: Path, *states: JobState) -> dict[str, StageStatus]:
    return {stage.stage: stage for stage in collect(run, {state.job: state for state in states})}


def test_a_chain_at_work(run: Path) -> None:
    finished(run, "sft")
    started(run, "rm", "")
    unfinished(
        run, "rm", {"step": 3, "loss": 0.75, "time/a": 1.0}, {"step": 4, "epoch": 1, "loss": 0.51239, "acc": 0.5}
    )
    with (run / "rm.partial" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')  # is being written
    found = of(
        run,
        JobState("41", "tiny-sft", "COMPLETED"),
        JobState("42", "tiny-rm", "RUNNING", restarts=2),
        JobState("43", "tiny-ppo", "PENDING", "Dependency"),
    )
    assert list(found) == ["sft", "rm", "ppo"]
    assert (found["sft"].artifact, found["sft"].scheduler, found["sft"].note) == ("done", "COMPLETED", "")
    rm = found["rm"]
    assert (rm.artifact, rm.scheduler, rm.restarts, rm.job) == ("running", "RUNNING", 2, "42")
    assert (rm.step, rm.numbers, rm.note) == ("4", "loss 0.5124, acc 0.5", "")
    assert rm.written is not None
    assert rm.written < 60
    ppo = found["ppo"]
    assert (ppo.artifact, ppo.scheduler, ppo.note, ppo.written) == ("absent", "PENDING", "waits for rm", None)


def test_a_failure_is_told_to_those_that_waited(run: Path) -> None:
    finished(run, "sft")
    started(run, "rm", "rm: starts\nerror: rankings.jsonl:6: no ranks. Mend it.\nsrun: error: n1: task 0: Exited\n")
    unfinished(run, "rm")
    found = of(
        run,
        JobState("42", "tiny-rm", "FAILED", "NonZeroExitCode", exit_code=2),
        JobState("43", "tiny-ppo", "CANCELLED", "DependencyNeverSatisfied"),
    )
    log = run / "slurm" / "rm-42.log"
    assert found["rm"].scheduler == "FAILED (2)"
    assert found["rm"].note == f"failed (exit 2), see {log}: error: rankings.jsonl:6: no ranks. Mend it."
    assert found["ppo"].note == f"cancelled: rm failed (exit 2), see {log}"


def test_what_failed_first_is_named_all_along_the_chain(run: Path) -> None:
    started(run, "sft", "Traceback (most recent call last):\n  x\nValueError: no such thing\n")
    unfinished(run, "sft")
    found = of(
        run,
        JobState("41", "tiny-sft", "FAILED", exit_code=1),
        JobState("42", "tiny-rm", "CANCELLED"),
        JobState("43", "tiny-ppo", "CANCELLED"),
    )
    log = run / "slurm" / "sft-41.log"
    assert found["sft"].note == f"failed (exit 1), see {log}: ValueError: no such thing"
    assert found["rm"].note == found["ppo"].note == f"cancelled: sft failed (exit 1), see {log}"


def test_what_slurm_has_forgotten_is_read_from_what_jobs_left(run: Path) -> None:
    finished(run, "sft")
    started(run, "rm", "")
    unfinished(run, "rm")
    for stage, job, code in (("sft", 41, 0), ("rm", 42, 1)):
        (run / "slurm" / f"{stage}-{job}.exit").write_text(f"{code}\n")
    found = of(run, JobState("42", "somebody-elses", "RUNNING"))
    assert [found[stage].scheduler for stage in STAGES] == ["COMPLETED", "FAILED (1)", "-"]
    assert found["rm"].artifact == "unfinished"
    assert found["rm"].note.startswith("failed (exit 1), see ")
    assert found["ppo"].note.startswith("cancelled: rm failed (exit 1), see ")


@pytest.mark.parametrize(
    ("state", "note"),
    [
        (JobState("41", "tiny-sft", "PENDING", "BeginTime", restarts=1), "was requeued; Slurm starts it again within"),
        (JobState("41", "tiny-sft", "PENDING", "Resources"), "waits for free machines"),
        (JobState("41", "tiny-sft", "PENDING", "QOSMaxJobsPerUserLimit"), "waits: QOSMaxJobsPerUserLimit"),
        (JobState("41", "tiny-sft", "TIMEOUT", exit_code=143), "reached its time limit before it had saved its state"),
        (JobState("41", "tiny-sft", "CANCELLED", exit_code=75), "was cancelled, see "),
        (JobState("41", "tiny-sft", "OUT_OF_MEMORY"), "ran out of memory, see "),
        (JobState("41", "tiny-sft", "NODE_FAIL"), "lost its machine, see "),
        (None, "ended without an exit code: it was cancelled or killed, see "),
    ],
)
def test_why_a_stage_does_not_go_on(run: Path, state: JobState | None, note: str) -> None:
    started(run, "sft", "")
    unfinished(run, "sft")
    assert of(run, *([state] if state else []))["sft"].note.startswith(note)


@pytest.mark.parametrize("answers", [False, None])
def test_healthy_jobs_are_not_called_dead_where_slurm_is_not_asked(
    run: Path, answers: bool | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """None: it is not on this machine."""
    monkeypatch.setenv("PATH", str(tmp_path))
    if answers is False:
        for name, text in {
            "sbatch": "exit 1",
            "scontrol": "echo 'Unable to contact slurm controller' >&2; exit 1",
        }.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
    started(run, "sft", "error: of an earlier start\n")
    unfinished(run, "sft")
    status(run)
    out = capsys.readouterr().out
    unknown = "not known, since Slurm does not answer here"
    assert f"sft: job 41: {unknown}, see {run}/slurm/sft-41.log\n" in out
    assert f"rm: job 42: {unknown}\nppo: job 43: {unknown}\n" in out


def test_where_slurm_is_not_asked_exit_codes_still_tell(run: Path) -> None:
    started(run, "sft", "")
    (run / "slurm" / "sft-41.exit").write_text("1\n")
    found = {stage.stage: stage for stage in collect(run, None)}
    assert found["sft"].scheduler == "FAILED (1)"
    assert found["rm"].note.startswith("cancelled: sft failed (exit 1), see ")


def test_cancelled_before_it_started(run: Path) -> None:
    found = of(run, JobState("41", "tiny-sft", "CANCELLED"), JobState("42", "tiny-rm", "CANCELLED"))
    assert found["sft"].note == "cancelled before it started"
    assert found["rm"].note.startswith("cancelled: sft was cancelled, see ")


def test_a_job_that_can_never_start(run: Path) -> None:
    """On a cluster that does not cancel it, whatever it was told."""
    started(run, "sft", "")
    states = (JobState("41", "tiny-sft", "TIMEOUT"), JobState("42", "tiny-rm", "PENDING", "DependencyNeverSatisfied"))
    note = of(run, *states)["rm"].note
    assert note.startswith("will never start: sft reached its time limit before it had saved its state, see ")


def test_stages_that_run_without_slurm(tmp_path: Path) -> None:
    unfinished(tmp_path, "dpo", {"step": 1, "rewards/margins": 0.25, "loss": 0.5, "x": 1.0})
    (tmp_path / ".dpo.lock").touch()
    found = of(tmp_path)
    assert list(found) == ["dpo"]
    row = found["dpo"]
    assert (row.artifact, row.job, row.scheduler, row.note) == ("unfinished", "-", "-", "")
    assert row.numbers == "rewards/margins 0.25, loss 0.5"
    with (tmp_path / ".dpo.lock").open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert of(tmp_path)["dpo"].artifact == "running"


def test_the_table_without_slurm(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    finished(run, "sft")
    status(run)
    out = capsys.readouterr().out
    assert "│ sft   │ 41  │ -     │ done     │" in out
    assert out.rstrip().endswith("Slurm is not on this machine: states are what the jobs left.")


def test_a_recipe_leads_to_its_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent.parent)
    monkeypatch.setenv("PATH", "")
    Path("recipe.yaml").write_text("name: other\nmodel: {name_or_path: m}\n")
    with pytest.raises(UserError, match="runs/other does not exist"):
        status(Path("runs/other"))
    main(["status", "recipe.yaml", "--name", "tiny"])
    assert "runs/tiny" in capsys.readouterr().out
    for argument, error in (
        ("runs/none", "runs/none does not exist: nothing was run or launched"),
        ("none.yaml", "recipe none.yaml does not exist"),
    ):
        with pytest.raises(SystemExit):
            main(["status", argument])
        assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (90, "2 min"), (3599, "60 min"), (5400, "1.5 h"), (172800, "2.0 d")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
