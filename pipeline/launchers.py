"""How the processes of a stage are started: one, several on this machine, or the tasks of a Slurm job."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.recipe_launch import LaunchSection

LAUNCHER = "TRISTAGE_LAUNCHER"
"""`srun` in the jobs of `tristage launch`: a stage's ranks are the job's tasks. `env` where something else starts every
rank: this process becomes the rank that RANK says."""
WORLD = "TRISTAGE_WORLD_SIZE"
"""How many ranks a stage must find; see `pipeline.ranks`."""
_AS_TASK = (
    "trap '' USR1; export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID "
    'LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES)); exec "$@"'
)


class Start(NamedTuple):
    """A command and what its environment has beside this process's own.

    Attributes:
        is_child: the command runs on this machine and ends with its parent; see `pipeline.process`.
    """

    words: list[str]
    environment: Mapping[str, str]
    is_child: bool


def refuse_missing_file(launch: LaunchSection) -> None:
    """Raises UserError for an accelerate file that is not there."""
    if launch.accelerate is not None and not Path(launch.accelerate).is_file():
        raise UserError(
            f"launch.accelerate: {launch.accelerate} does not exist.",
            mend="Name a file such as configs/accelerate/fsdp2.yaml.",
        )


@dataclass(frozen=True)
class Stages:
    """Starts stages as the recipe's `launch` section says."""

    launch: LaunchSection
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def start(self, module: str, partial: Path) -> Start:
        """How to start the stage `module` in the prepared directory `partial`.

        Errors:
            UserError: several machines without a Slurm job, or an accelerate file that is not there.
        """
        launch = self.launch
        stage = ["-m", module, str(partial)]
        world = {WORLD: str(launch.world)}
        refuse_missing_file(launch)
        if self.environment.get(LAUNCHER) == "env":
            return Start([sys.executable, *stage], world | self._accelerate_environment(), True)
        if self.environment.get(LAUNCHER) == "srun":
            python = sys.executable if launch.slurm.container is None else "python"
            return Start(self._srun([python, *stage]), world | self._accelerate_environment(), False)
        if launch.machines > 1:
            raise UserError(
                f"launch.machines is {launch.machines}, and this is no job of `tristage launch`.",
                mend="Use `tristage launch RECIPE`, or start ranks by hand: `tristage STAGE RECIPE --prepare` tells.",
            )
        if launch.world == 1 and launch.accelerate is None:
            return Start([sys.executable, *stage], world, True)
        agent = [sys.executable, "-m", "pipeline.agent", str(launch.processes), module, str(partial)]
        return Start(agent, world | self._accelerate_environment(), True)

    def _srun(self, words: list[str]) -> list[str]:
        """One task per rank, with nothing between it and Slurm: signals and exit codes arrive as they were sent."""
        slurm = self.launch.slurm
        container = []
        if slurm.container is not None:
            here = os.getcwd()
            mounts = ",".join([f"{here}:{here}", *slurm.mounts])
            container = [f"--container-image={slurm.container}", f"--container-mounts={mounts}"]
            container.append(f"--container-workdir={here}")
        cpus = [] if slurm.cpus_per_task is None else [f"--cpus-per-task={slurm.cpus_per_task}"]
        tasks = [f"--nodes={self.launch.machines}", f"--ntasks={self.launch.world}"]
        return ["srun", "--kill-on-bad-exit=1", *tasks, *cpus, *container, "bash", "-c", _AS_TASK, "rank", *words]

    def _accelerate_environment(self) -> dict[str, str]:
        """What `accelerate launch` would set, for ranks that it does not start."""
        if self.launch.accelerate is None:
            return {}
        from pipeline.accelerate_file import environment_of

        return environment_of(self.launch.accelerate, self.launch.world)


def by_hand(launch: LaunchSection, module: str, partial: Path) -> list[str]:
    """How a person starts a stage's ranks on a machine; of several, each has a NUMBER and the first one's ADDRESS."""
    stage = ["-m", module, str(partial)]
    several = launch.machines > 1
    if launch.accelerate is not None:
        words = ["accelerate", "launch", "--config_file", launch.accelerate, "--num_processes", str(launch.world)]
        place = ["--machine_rank", "NUMBER", "--main_process_ip", "ADDRESS", "--main_process_port", "29500"]
        return [*words, "--num_machines", str(launch.machines), *(place if several else []), *stage]
    if launch.world == 1:
        return ["python", *stage]
    place = ["--node-rank", "NUMBER", "--master-addr", "ADDRESS", "--master-port", "29500"]
    words = ["torchrun", "--nnodes", str(launch.machines), "--nproc-per-node", str(launch.processes)]
    return [*words, *(place if several else []), *stage]
