"""What a launcher does: it submits the jobs of a chain of stages and says how they are.

`pipeline.launch.slurm.Slurm` is the one in use. `pipeline.launch.jobset` renders the same chain for Kubernetes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

JOBS = "jobs.json"
FOLDER = "slurm"
"""`runs/<name>/slurm` holds the job scripts, their logs and `jobs.json`."""
ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
)
"""Slurm's states of jobs that are over; a requeued job is none of them."""


@dataclass(frozen=True)
class StageJob:
    """The job of one stage.

    Attributes:
        name: what the scheduler calls it, and what it is known by later.
        words: the command that the job runs, such as `tristage ppo recipe.yaml`, by its arguments.
        directory: where it runs, absolute: paths of the recipe are relative to it.
        script: the job's script, absolute.
    """

    stage: str
    name: str
    words: Sequence[str]
    directory: Path
    script: Path

    @property
    def log(self) -> Path:
        """Where its output goes; `%j` is the job's number."""
        return self.script.with_name(f"{self.stage}-%j.log")


@dataclass(frozen=True)
class JobState:
    """What the scheduler says of a job.

    Attributes:
        state: in Slurm's words, such as PENDING, RUNNING, FAILED.
        reason: why it waits or ended, such as Dependency; "" for none.
        restarts: how often it was started again.
        exit_code: of its script; 0 while it has not ended.
    """

    job: str
    name: str
    state: str
    reason: str = ""
    restarts: int = 0
    exit_code: int = 0

    @property
    def alive(self) -> bool:
        """Whether it runs or may run yet."""
        return self.state not in ENDED


class Launcher(Protocol):
    """Submits jobs that start one after the other, each only if the one before succeeded."""

    def check(self, jobs: Sequence[StageJob]) -> None:
        """Refuses what the scheduler would refuse; submits nothing."""
        ...

    def submit(self, jobs: Sequence[StageJob], note: Callable[[Mapping[str, str]], None]) -> dict[str, str]:
        """Submits the chain, or nothing; returns the jobs' numbers by stage.

        Args:
            note: writes these numbers down; where it fails, the jobs are taken back.
        """
        ...

    def states(self, jobs: Sequence[str]) -> Mapping[str, JobState]:
        """What is known of these jobs; those that the scheduler has forgotten are left out."""
        ...

    def cancel(self, jobs: Sequence[str]) -> None:
        """Ends jobs, whether they wait or run."""
        ...
