"""Moments of a running stage at which `scripts.kill_soak` kills, and how it does it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from tests.workplace import Workplace

MOMENTS = ("importing", "loading", "training", "saving", "evaluating", "training late", "finishing")
STEPS = {"sft": 12, "rm": 12, "ppo": 7, "dpo": 12}
"""Of the tiny workplace's recipe."""
EVALUATED = {"ppo": (3, 6, 7), "dpo": (4, 8, 12), "sft": (12,), "rm": (12,)}
"""Steps that an evaluation follows."""
POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Kill:
    """A kill that is to be dealt.

    Attributes:
        target: `group`: all processes of the stage; `command`: `tristage` itself; `rank`: one of the stage's ranks.
        part, delay: numbers of [0, 1) that say where within the moment, and how long after it is met.
    """

    stage: str
    moment: str
    target: str
    part: float
    delay: float
    rank: int = 0


@dataclass
class Attempt:
    """A start of a stage in `place` that `kill` is meant for.

    Attributes:
        after: seconds from the start to the kill.
        what: was killed.
        resumed: where the next start went on.
    """

    kill: Kill
    place: Workplace
    started: float = field(default_factory=time.monotonic)
    after: float = 0.0
    what: str = ""
    resumed: str = ""

    def __post_init__(self) -> None:
        self._saved = self._states()
        self._logged = self._log_size()
        self._step = self._last_step()
        self._part_of_rest = self.kill.part * max(0, STEPS[self.kill.stage] - self._step)

    def condition(self) -> tuple[Callable[[], bool], float]:
        """Whether the moment has come, and the longest that the kill follows it by, in seconds."""
        total, partial = STEPS[self.kill.stage], self.place.run / f"{self.kill.stage}.partial"
        due = [step for step in EVALUATED[self.kill.stage] if step > self._step] or [total + 1]
        evaluated = due[int(self.kill.part * len(due))]
        late = max(self._step + 1, total - 2)
        moments: dict[str, tuple[Callable[[], bool], float]] = {
            "importing": (lambda: True, 4.0),
            "loading": (lambda: self._log_size() > self._logged, 1.0),
            "training": (lambda: self._last_step() >= self._step + 1 + int(self._part_of_rest / 2), 0.4),
            "saving": (lambda: bool(self._states() - self._saved), 0.03),
            "evaluating": (lambda: self._last_step() >= evaluated, 0.3),
            "training late": (lambda: self._last_step() >= late, 0.2),
            "finishing": (lambda: any(partial.glob("*.safetensors")) or (partial / "manifest.json").exists(), 0.2),
        }
        return moments[self.kill.moment]

    def _states(self) -> set[str]:
        """Names of whole and of unfinished checkpoints, and of the files in the unfinished ones."""
        state = self.place.run / f"{self.kill.stage}.partial" / "state"
        return {str(path.relative_to(state)) for pattern in ("*", "*/*") for path in state.glob(pattern)}

    def _log_size(self) -> int:
        log = self.place.run / f"{self.kill.stage}.partial" / "log.txt"
        return log.stat().st_size if log.exists() else 0

    def _last_step(self) -> int:
        rows = self.place.rows(f"{self.kill.stage}.partial")
        return max((row["step"] for row in rows if "loss" in row or "objective/kl" in row), default=0)


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The stage's processes, its agent before its ranks."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def reached(attempt: Attempt, process: subprocess.Popen[str]) -> bool:
    """Waits until the kill is due; False where the command ended before."""
    (condition, longest), started = attempt.condition(), False
    while process.poll() is None:
        started = started or bool(family(process))
        if started and condition():
            time.sleep(attempt.kill.delay * longest)
            return process.poll() is None and bool(family(process))
        time.sleep(POLL_SECONDS)
    return False


def strike(attempt: Attempt, process: subprocess.Popen[str]) -> None:
    """Kills, and notes what."""
    attempt.after = time.monotonic() - attempt.started
    kill, processes = attempt.kill, family(process)
    ranks = [one for one in processes if _rank(one) == str(kill.rank)]
    try:
        if kill.target == "command":
            attempt.what = "the command"
            process.kill()
        elif kill.target == "rank" and ranks:
            attempt.what = f"rank {kill.rank}"
            ranks[0].kill()
        else:
            attempt.what = "the stage's group"
            os.killpg(processes[0].pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError, IndexError):
        attempt.what += " (it had just ended)"


def _rank(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None
