"""`tristage status`: what the scheduler, the directories and the metrics say of a run's stages, in one table."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.artifacts import JOB, MANIFEST
from pipeline.errors import UserError
from pipeline.launch.launcher import FOLDER, JobState
from pipeline.launch.slurm import Slurm, exit_file, is_available
from pipeline.launch.submit import read_jobs
from pipeline.stages import ORDER, STAGES
from pipeline.tracking import METRICS

TAIL_BYTES = 1 << 16
SHOWN = 2
WIDTH = 120
"""Of the table where there is no terminal."""
TELLING = ("objective/scores", "objective/kl", "rewards/accuracies", "rewards/margins", "loss")
"""Which numbers to show first; others follow in the order of the row."""
NOT_TELLING = ("time/", "runtime", "per_second", "epoch", "learning_rate")
UNKNOWN = "UNKNOWN"
"""State of a job of which the scheduler was not asked or did not answer, and which has left no exit code."""
WAITING = {
    "BeginTime": "was requeued; Slurm starts it again within minutes",
    "Priority": "waits for its turn",
    "Resources": "waits for free machines",
}
_ERROR = re.compile(r"^error: .*|^[\w.]*(Error|Exception)\b.*|^.*: command not found$", re.MULTILINE)


@dataclass(frozen=True)
class StageStatus:
    """One stage.

    Attributes:
        scheduler: state in the scheduler's words; "-" where it is not asked or has none.
        artifact: done, running, unfinished or absent.
        written: seconds since the stage's directory was last written; None where there is none.
        note: why it waits, failed or did not run; "" where nothing is to be said.
    """

    stage: str
    artifact: str
    job: str = "-"
    scheduler: str = "-"
    restarts: int = 0
    step: str = ""
    numbers: str = ""
    written: float | None = None
    note: str = ""


def status(run: Path) -> None:
    """Prints the state of the run in directory `run`.

    Errors:
        UserError: there is no such directory.
    """
    if not run.is_dir():
        raise UserError(f"{run} does not exist: nothing was run or launched.", mend="See `tristage plan RECIPE`.")
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    states, trouble = _ask(run)
    stages = collect(run, states)
    table = Table("stage", "job", "Slurm", "artifact", "step", "last metrics", "written", title=str(run))
    for stage in stages:
        age = "-" if stage.written is None else f"{duration(stage.written)} ago"
        again = f", restarted {stage.restarts}x" if stage.restarts else ""
        scheduler = f"{stage.scheduler}{again}"
        table.add_row(stage.stage, stage.job, scheduler, stage.artifact, stage.step, stage.numbers, age)
    console.print(table)
    for stage in stages:
        if stage.note:
            console.print(f"{stage.stage}: {stage.note}", markup=False, soft_wrap=True)
    if trouble:
        console.print(trouble, markup=False, soft_wrap=True)


def collect(run: Path, states: Mapping[str, JobState] | None) -> list[StageStatus]:
    """The stages that were launched or have a directory, in order; of a run without any, the three usual ones.

    Args:
        states: what the scheduler says, by job; what it has forgotten is made up for by what the jobs left. None where
            it was not asked or did not answer.
    """
    jobs = read_jobs(run / FOLDER)
    present = [name for name in STAGES if name in jobs or (run / name).exists() or (run / f"{name}.partial").exists()]
    known = {name: _state(run, name, entry, states) for name, entry in jobs.items()}
    return [_stage(run, name, jobs, known) for name in present or ORDER]


def duration(seconds: float) -> str:
    """Such as 42 s, 7 min, 3.5 h, 2.0 d."""
    for size, unit in ((86400, "d"), (3600, "h")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{max(seconds, 0):.0f} s"


def _ask(run: Path) -> tuple[Mapping[str, JobState] | None, str]:
    """What the scheduler says of the run's jobs; None, and why, where it says nothing."""
    jobs = [str(entry["job"]) for entry in read_jobs(run / FOLDER).values()]
    if not jobs:
        return {}, ""
    if not is_available():
        return None, "Slurm is not on this machine: states are what the jobs left."
    try:
        return Slurm().states(jobs), ""
    except UserError as error:
        return None, str(error)


def _state(run: Path, name: str, entry: Mapping[str, Any], states: Mapping[str, JobState] | None) -> JobState | None:
    """A job's state; of one that the scheduler does not tell of, what its script left; None where nothing is left."""
    job = str(entry["job"])
    state = states.get(job) if states else None
    if state is not None and state.name == entry["name"]:  # numbers are given out again one day
        return state
    left = exit_file(run / FOLDER / name, name, job)
    if not left.exists():
        return JobState(job, str(entry["name"]), UNKNOWN) if states is None else None
    text = left.read_text().strip()
    code = int(text) if text.isdigit() else 1
    return JobState(job, str(entry["name"]), "FAILED" if code else "COMPLETED", exit_code=code)


def _stage(run: Path, name: str, jobs: Mapping[str, Any], known: Mapping[str, JobState | None]) -> StageStatus:
    directory = next((d for d in (run / name, run / f"{name}.partial") if d.exists()), None)
    entry, state = jobs.get(name), known.get(name)
    row = _last_row(directory / METRICS) if directory else {}
    shown = "-"
    if state and state.state != UNKNOWN:
        shown = state.state + (f" ({state.exit_code})" if state.exit_code and not state.alive else "")
    return StageStatus(
        stage=name,
        artifact=_artifact(run, name, state),
        job=str(entry["job"]) if entry else "-",
        scheduler=shown,
        restarts=state.restarts if state else 0,
        step=str(row.get("step", "")),
        numbers=_numbers(row),
        written=time.time() - _last_write(directory) if directory else None,
        note=_note(run, name, jobs, known),
    )


def _artifact(run: Path, name: str, state: JobState | None) -> str:
    if _is_done(run, name):
        return "done"
    if not (run / f"{name}.partial" / JOB).exists():
        return "absent"
    runs = state is not None and state.state in ("RUNNING", "COMPLETING")
    return "running" if runs or _is_held(run / f".{name}.lock") else "unfinished"


def _is_held(lock: Path) -> bool:
    """Whether a `tristage` on this machine is running the stage."""
    if not lock.exists():
        return False
    with lock.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _note(run: Path, name: str, jobs: Mapping[str, Any], known: Mapping[str, JobState | None]) -> str:
    """Why a stage waits, failed or did not run."""
    if name not in jobs or _is_done(run, name):
        return ""
    state, log = known.get(name), _log(run, name, jobs)
    blamed = _blamed(run, name, jobs, known)
    if not log.exists() and blamed and (state is None or not state.alive or state.state == UNKNOWN):
        return f"cancelled{blamed}"
    if state is not None and state.state == UNKNOWN:
        seen = f", see {log}" if log.exists() else ""
        return f"job {state.job}: not known, since Slurm does not answer here{seen}"
    if state is not None and state.alive:
        return _waits(state, jobs[name]["after"], blamed)
    if not log.exists():
        return "cancelled before it started"
    return f"{_how(state)}, see {log}{_error_in(log)}"


def _waits(state: JobState, before: str | None, blamed: str) -> str:
    """Why a job waits that runs or may run yet; "" where it runs."""
    if state.state != "PENDING" or not state.reason:
        return ""
    if state.reason == "DependencyNeverSatisfied":
        return f"will never start{blamed}"
    if state.reason == "Dependency":
        return f"waits for {before}"
    return WAITING.get(state.reason, f"waits: {state.reason}")


def _blamed(run: Path, name: str, jobs: Mapping[str, Any], known: Mapping[str, JobState | None]) -> str:
    """How the stage ended that kept this one from running, for a note; "" where none has."""
    culprit = _culprit(run, name, jobs)
    state = known.get(culprit)
    if not culprit or (state is not None and state.alive):
        return ""
    return f": {culprit} {_how(state)}, see {_log(run, culprit, jobs)}"


def _culprit(run: Path, name: str, jobs: Mapping[str, Any]) -> str:
    """The stage before `name` in its chain that kept it from running; "" where the one before is done."""
    found, before = "", jobs[name]["after"]
    while before in jobs and not _is_done(run, before):
        found = before
        if _log(run, before, jobs).exists():
            break
        before = jobs[before]["after"]
    return found


def _log(run: Path, name: str, jobs: Mapping[str, Any]) -> Path:
    """The log of a stage's job, which exists once the job has started."""
    return run / FOLDER / jobs[name]["log"]


def _is_done(run: Path, name: str) -> bool:
    return (run / name / MANIFEST).exists()


def _how(state: JobState | None) -> str:
    """In words, how a job ended that did not succeed."""
    if state is None:
        return "ended without an exit code: it was cancelled or killed"
    words = {
        "CANCELLED": "was cancelled",
        "TIMEOUT": "reached its time limit before it had saved its state",
        "NODE_FAIL": "lost its machine",
        "OUT_OF_MEMORY": "ran out of memory",
        "COMPLETED": "ended without an artifact",
    }
    return words.get(state.state, f"failed (exit {state.exit_code})")


def _error_in(log: Path) -> str:
    """The last line of a log that looks like an error, for a note."""
    found = list(_ERROR.finditer(_tail(log)))
    return f": {found[-1].group()[:300]}" if found else ""


def _last_write(directory: Path) -> float:
    """When anything in a stage's directory was last written."""
    newest = directory.stat().st_mtime
    for folder, _, files in os.walk(directory):
        for file in files:
            path = Path(folder, file)
            try:
                newest = max(newest, path.stat().st_mtime)
            except FileNotFoundError:  # the stage is at work
                continue
    return newest


def _last_row(metrics: Path) -> dict[str, Any]:
    """The last complete row of metrics.jsonl; empty where there is none."""
    lines = _tail(metrics).split("\n")[:-1]
    return json.loads(lines[-1]) if lines else {}


def _tail(file: Path) -> str:
    if not file.exists():
        return ""
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - TAIL_BYTES))
        return stream.read().decode("utf-8", errors="replace")


def _numbers(row: Mapping[str, Any]) -> str:
    """A few numbers of a row, in words such as `loss 0.693, accuracy 0.5`."""
    told = [key for key in TELLING if key in row]
    others = [key for key in row if key not in (*told, "step") and not any(part in key for part in NOT_TELLING)]
    chosen = [key for key in (*told, *others) if isinstance(row[key], float | int)]
    return ", ".join(f"{key} {row[key]:.4g}" for key in chosen[:SHOWN])
