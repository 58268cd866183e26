"""Several processes as one: each takes its share of the rows, and sums make the whole, whatever their number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """This process among `world` that hold the same models and the same rollout batch."""

    rank: int = 0
    world: int = 1

    def share(self, rows: Sequence[int]) -> list[int]:
        """This rank's part of `rows`, every world-th of them; every row belongs to one rank."""
        return list(rows[self.rank :: self.world])

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its sum over the ranks."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sums gradients over the ranks: losses have the denominators of the whole step, so that sums are right.

        A rank that had no row of the step counts as zero.
        """
        if self.world == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
