"""How stages are started: processes and machines, how models are spread over them, and jobs on a Slurm cluster."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from pipeline.recipe_base import Count, Integer, Positive, Section

_TIME = re.compile(r"(\d+-)?\d{1,2}(:\d{2}){0,2}|\d+(:\d{2})?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _seconds(time: str) -> int:
    """A time limit of Slurm: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, seconds = [*parts, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class SlurmSection(Section):
    """What `tristage launch` writes into a stage's job script; null leaves the line out."""

    template: str | None = None
    """A template of the user's own in place of configs/slurm/stage.sbatch."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str = "24:00:00"
    """Limit of one job; a stage that needs longer is saved, requeued and resumed."""
    gpus: Count | None = None
    """GPUs per machine."""
    cpus_per_task: Count | None = None
    memory: str | None = None
    """Memory per machine in Slurm's words, such as 200G."""
    constraint: str | None = None
    container: str | None = None
    """Image that every process runs in (`srun --container-image`, of pyxis)."""
    mounts: tuple[str, ...] = ()
    """Further directories that the container sees, as pyxis writes them: /data:/data."""
    modules: tuple[str, ...] = ()
    env: dict[str, str] = {}
    setup: tuple[str, ...] = ()
    """Shell lines before the stage, such as the activation of an environment."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, such as `--exclusive`."""
    signal_seconds: Annotated[Count, Field(le=65535)] = 120
    """How long before its time limit a job is told to save its state and requeue itself; less than half of `time`."""
    max_requeues: Annotated[Integer, Field(ge=0)] = 20

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        if not _TIME.fullmatch(value):
            raise ValueError(f"{value!r} is no time limit of Slurm; write it as 24:00:00 or 2-00:00:00, in quotes")
        return value

    @field_validator("env")
    @classmethod
    def _are_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of an environment variable")
        return value

    @model_validator(mode="after")
    def _has_time_before_the_signal(self) -> SlurmSection:
        limit = _seconds(self.time)
        if limit and 2 * self.signal_seconds >= limit:  # 0 is no limit
            raise ValueError(
                f"signal_seconds ({self.signal_seconds}) is not less than half of the time limit ({self.time}, "
                f"{limit} s); lower it, or raise `time`"
            )
        return self


class LaunchSection(Section):
    """Processes of a stage; results are those of one process but for rounding."""

    machines: Count = 1
    processes: Count = 1
    """Per machine: one per GPU."""
    accelerate: str | None = None
    """Configuration file of accelerate, such as configs/accelerate/fsdp2.yaml; null replicates every model."""
    timeout_seconds: Positive = 1800.0
    """Longest that one process waits for the others before all of them end."""
    slurm: SlurmSection = SlurmSection()

    @property
    def world(self) -> int:
        """Processes of a stage on all machines."""
        return self.machines * self.processes
