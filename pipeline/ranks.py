"""Several processes as one: each takes its share of the work, and sums make the whole, whatever their number."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline.errors import UserError
from pipeline.launchers import WORLD
from pipeline.recipe_launch import LaunchSection

T = TypeVar("T")
_PLACE = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Where the process stands among the others, in torchrun's words."""


@dataclass
class Clock:
    """Seconds that this process has waited for the others."""

    seconds: float = 0.0


@dataclass(frozen=True)
class Ranks:
    """This process among the `world` that run a stage together; `local` is its number among the
    `per_machine` on its machine.

    All hold the same data and numbers and call the same functions in the same order. With one process there is no
    process group, and everything here is the identity.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    per_machine: int = 1
    waited: Clock = field(default_factory=Clock, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes what the stage writes."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """This process's own: a GPU where there are any, else the CPU."""
        return torch.device("cuda", self.local) if torch.cuda.is_available() else torch.device("cpu")

    def share(self, rows: Sequence[int]) -> list[int]:
        """This rank's part of `rows`, every world-th of them; every row belongs to one rank."""
        return list(rows[self.rank :: self.world])

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its sum over the ranks."""
        if self.world == 1:
            return
        start = time.perf_counter()
        for tensor in tensors:
            dist.all_reduce(tensor)
        self.waited.seconds += time.perf_counter() - start

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sums gradients over the ranks: losses have the denominators of the whole step, so that sums are right.

        A rank that had no row of the step counts as zero. Gradients of sharded weights have been summed already.
        """
        whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        if self.world == 1:
            return
        for parameter in whole:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.sum_(parameter.grad for parameter in whole if parameter.grad is not None)

    def gather(self, value: T) -> list[T]:
        """Every rank's value in the order of ranks, on all of them."""
        if self.world == 1:
            return [value]
        start = time.perf_counter()
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        self.waited.seconds += time.perf_counter() - start
        return found

    def broadcast(self, value: T) -> T:
        """The value of rank 0."""
        if self.world == 1:
            return value
        holder: list[Any] = [value]
        start = time.perf_counter()
        dist.broadcast_object_list(holder, src=0)
        self.waited.seconds += time.perf_counter() - start
        return holder[0]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on some rank."""
        return any(self.gather(flag))

    def barrier(self) -> None:
        """Returns once all ranks are here."""
        self.gather(None)


ALONE = Ranks()


def join(launch: LaunchSection) -> Ranks:
    """Joins the processes that a launcher has started (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

    A collective that takes longer than `launch.timeout_seconds` raises on every rank. Whoever starts ranks says how
    many (TRISTAGE_WORLD_SIZE); otherwise the recipe does, where it asks for several.

    Errors:
        UserError: there are not as many processes as asked for, or the launcher did not say which this one is.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = int(os.environ.get(WORLD, str(launch.world if launch.world > 1 else world)))
    if world != wanted:
        raise UserError(
            f"{wanted} processes were asked for, and the launcher started this one among {world}: each would train "
            "alone.",
            mend="Start it with `tristage STAGE RECIPE --launch.processes N`. (`accelerate launch --cpu` starts one "
            "process whatever its --num_processes says.)",
        )
    if world == 1:
        return ALONE
    missing = [key for key in _PLACE if key not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {world}, and {', '.join(missing)} is not in the environment.",
            mend="Start the ranks with `tristage`, torchrun or `accelerate launch`, or set what they set.",
        )
    rank, local, per_machine = (int(os.environ[key]) for key in _PLACE[:3])
    ranks = Ranks(rank, world, local, per_machine)
    cuda = torch.cuda.is_available()
    if cuda and ranks.local >= torch.cuda.device_count():
        raise UserError(
            f"process {ranks.local} of this machine has no GPU: it sees {torch.cuda.device_count()}.",
            mend="Lower launch.processes to the number of GPUs, and let every process see all of its machine's (no "
            "--gpus-per-task).",
        )
    if cuda:
        torch.cuda.set_device(ranks.device)
    _complete_environment(launch, world)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=launch.timeout_seconds))
    return ranks


def _complete_environment(launch: LaunchSection, world: int) -> None:
    """What accelerate's file says, for ranks that neither accelerate nor `tristage` has started."""
    if launch.accelerate is not None and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        from pipeline.accelerate_file import environment_of

        os.environ.update(environment_of(launch.accelerate, world))
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # or transformers gives every rank but one zeros for weights
