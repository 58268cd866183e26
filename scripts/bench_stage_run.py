"""Runs `tristage` for `scripts.bench_stage`: started, told to save or killed in the middle, and started again."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.exits import EXIT_REQUEUE
from pipeline.stage import LOG, MARKER
from pipeline.tracking import METRICS, read_metrics
from scripts.bench_ppo import TAIL

POLL_SECONDS = 0.05
CARD_SECONDS = 1.0
GONE_SECONDS = 60.0
SEAL = "checkpoint.json"
"""Written last into a saved state (`policy.ppo.state_files`, which imports torch)."""
KILLED = 128 + signal.SIGKILL
_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) (.*)")
_RESUMED = re.compile(r"resumed after update (\d+) of \d+")


@dataclass(frozen=True)
class Attempt:
    """One start of the command.

    Attributes:
        began: Unix time. card_gib: peak of all memory in use on the fullest GPU, whoever uses it; None without one.
    """

    code: int
    began: float
    seconds: float
    card_gib: float | None


@dataclass(frozen=True)
class Saved:
    """A saved state: after which update, its size, and the seconds from the update's end to the last of its files."""

    update: int
    gib: float
    seconds: float | None


@dataclass(frozen=True)
class Resumed:
    """From the command's start to restored models: `seconds`; `reading` the state, the engine's weights included."""

    update: int
    seconds: float
    reading: float


@dataclass
class Disturbance:
    """Ends a run in the middle of an update.

    With `kills`, every process is killed in the update after the state of `update` was saved; else SIGUSR1 is sent
    while `update` is computed. Both come half an update after the last one ended.
    """

    partial: Path
    update: int
    kills: bool
    _at: float | None = field(default=None, init=False)

    def is_due(self) -> bool:
        """Whether to strike now."""
        if self._at is None and self._may_come():
            phases = [row for row in read_metrics(self.partial) if "time/update" in row]
            self._at = time.monotonic() + (update_seconds(phases[-1]) / 2 if phases else 0.0)
        return self._at is not None and time.monotonic() >= self._at

    def strike(self, command: subprocess.Popen[bytes]) -> None:
        """Signals the command, or kills what it started and waits until that is gone."""
        if not self.kills:
            command.send_signal(signal.SIGUSR1)
            return
        kill_all(descendants(command.pid))

    def _may_come(self) -> bool:
        if self.kills:
            return self.update in saved_updates(self.partial)
        return any(row["step"] >= self.update - 1 for row in read_metrics(self.partial))


@dataclass(frozen=True)
class Site:
    """Where and how commands run.

    Attributes:
        deadline: by `time.monotonic`; what runs then is ended.
        asks_card: nvidia-smi is asked for the memory in use.
    """

    folder: Path
    environment: Mapping[str, str]
    deadline: float
    asks_card: bool

    def attempt(self, words: list[str], disturbance: Disturbance | None = None) -> Attempt:
        """Runs `tristage <words>` to its end, however it ends.

        Errors:
            UserError: the deadline came first.
        """
        began, start = time.time(), time.monotonic()
        with self._output.open("wb") as output:
            command = subprocess.Popen(
                [sys.executable, "-m", "pipeline.cli", *words],
                cwd=self.folder,
                env=dict(self.environment),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                peak = self._watch(command, disturbance)
            finally:
                if command.poll() is None:
                    kill_all([command.pid, *descendants(command.pid)], ours=command)
        return Attempt(command.returncode, began, time.monotonic() - start, peak)

    def last_words(self) -> str:
        """The end of what the last attempt printed."""
        return self._output.read_text(encoding="utf-8", errors="replace")[-TAIL:].replace(str(self.folder), ".")

    @property
    def _output(self) -> Path:
        return self.folder / "output.txt"

    def _watch(self, command: subprocess.Popen[bytes], disturbance: Disturbance | None) -> float | None:
        """Waits until the command has ended; returns the GiB of memory in use on the fullest GPU at their peak."""
        peak, asked = None, -math.inf
        while command.poll() is None:
            if disturbance is not None and disturbance.is_due():
                disturbance.strike(command)
                disturbance = None
            if self.asks_card and time.monotonic() - asked > CARD_SECONDS:
                used, asked = fullest_gib(_nvidia_smi()), time.monotonic()
                peak = max((gib for gib in (peak, used) if gib is not None), default=None)
            if time.monotonic() > self.deadline:
                words = f"the time given by --minutes is over; the command had printed:\n{self.last_words()}"
                raise UserError(words, mend="Give more time, or fewer --updates.")
            time.sleep(POLL_SECONDS)
        return peak


def interrupted(site: Site, words: list[str], disturbance: Disturbance) -> tuple[list[Attempt], Saved, Resumed, float]:
    """The command, ended in the middle and started again: both starts, the state between them, and the resume.

    The last number is the seconds from the first start to loaded models.

    Errors:
        UserError: it ended otherwise than it should, left no state, or did not go on from the newest one.
    """
    first = site.attempt(words, disturbance)
    wanted = KILLED if disturbance.kills else EXIT_REQUEUE
    if first.code == 0:
        raise UserError(
            "the stage was complete before it was disturbed.", mend="Give more --updates or a larger shape."
        )
    if first.code != wanted:
        raise UserError(f"exit code {first.code}, wanted {wanted}:\n{site.last_words()}", mend="Mend what it names.")
    if not disturbance.kills and not (disturbance.partial / MARKER).is_file():
        raise UserError(f"the stage ended with {wanted}, but left no {MARKER}.", mend="See its log.")
    saved = newest_state(disturbance.partial)
    second = site.attempt(words)
    out = disturbance.partial.with_suffix("")
    if second.code:
        raise UserError(f"the second start ended with {second.code}:\n{site.last_words()}", mend="Mend what it names.")
    resumed = resume_of(log_lines(out / LOG), second.began)
    if resumed.update != saved.update:
        raise UserError(
            f"the stage went on after update {resumed.update}, and its newest state was {saved.update}.",
            mend="See its log.",
        )
    return [first, second], saved, resumed, start_of(log_lines(out / LOG), first.began)


def undisturbed(site: Site, words: list[str]) -> Attempt:
    """The command from start to end.

    Errors:
        UserError: it failed.
    """
    only = site.attempt(words)
    if only.code:
        raise UserError(f"exit code {only.code}:\n{site.last_words()}", mend="Mend what it names.")
    return only


def update_seconds(row: Mapping[str, Any]) -> float:
    """Wall seconds of an update, by its row of metrics.jsonl."""
    return sum(row[f"time/{phase}"] for phase in ("rollout", "experience", "update", "sync"))


def saved_updates(partial: Path) -> list[int]:
    """Updates whose whole state lies on the disk, in rising order."""
    names = [seal.parent.name.removeprefix("update_") for seal in partial.glob(f"state/update_*/{SEAL}")]
    return sorted(int(name) for name in names if name.isdigit())


def newest_state(partial: Path) -> Saved:
    """The newest saved state of an unfinished stage.

    Its seconds are None where an update came after it, whose row moved the time at which metrics.jsonl was written.

    Errors:
        UserError: there is none.
    """
    updates = saved_updates(partial)
    if not updates:
        raise UserError("the stage ended without a saved state.", mend="See its log.")
    folder = partial / "state" / f"update_{updates[-1]:06d}"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    last = read_metrics(partial)[-1]["step"]
    taken = (folder / SEAL).stat().st_mtime - (partial / METRICS).stat().st_mtime
    return Saved(updates[-1], size / 2**30, round(taken, 3) if last == updates[-1] else None)


def log_lines(file: Path) -> list[tuple[float, str]]:
    """The lines of a stage's log with their Unix times; further lines of one message are left out."""
    found = (_LINE.fullmatch(line) for line in file.read_text(encoding="utf-8").splitlines())
    return [(_unix(line[1]) + int(line[2]) / 1000, line[3]) for line in found if line is not None]


def resume_of(lines: list[tuple[float, str]], began: float) -> Resumed:
    """What the log says of the last resume, by the command that began then.

    Errors:
        UserError: it started anew.
    """
    for (before, _), (at, text) in reversed(list(pairwise(lines))):
        match = _RESUMED.fullmatch(text)
        if match is not None and at > began - 1:
            return Resumed(int(match[1]), at - began, at - before)
    raise UserError("the second start did not resume, but began anew.", mend="See the stage's log.")


def start_of(lines: list[tuple[float, str]], began: float) -> float:
    """Seconds from `began` to loaded models and engine: the line before the first held-out evaluation."""
    held_out = next(index for index, (_, text) in enumerate(lines) if text.startswith("held out after update 0:"))
    return lines[held_out - 1][0] - began


def fullest_gib(text: str) -> float | None:
    """The largest of the numbers of MiB in a text, one a line."""
    numbers = [int(line) for line in text.splitlines() if line.strip().isdigit()]
    return max(numbers) / 1024 if numbers else None


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have, parents first."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def kill_all(pids: list[int], ours: subprocess.Popen[bytes] | None = None) -> None:
    """Kills processes and waits until they are gone; `ours` is reaped here, the others by their parents."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if ours is not None:
        ours.wait()
    until = time.monotonic() + GONE_SECONDS
    while any(map(_computes, pids)) and time.monotonic() < until:
        time.sleep(POLL_SECONDS)


def _nvidia_smi() -> str:
    """MiB in use on every GPU, one a line."""
    words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout


def _computes(pid: int) -> bool:
    """Whether a process exists and is not dead already."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _unix(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%d %H:%M:%S"))
