"""Which rank is slower than the others, told by the seconds of its own work: all wait for the slowest."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

SLOW = 1.5
"""Times the median from which on a rank is named."""


def straggler(seconds: Sequence[float]) -> str | None:
    """A line about the rank whose own work, without waiting for others, took over 1.5 times the ranks' median.

    None where there is no such rank; of two ranks the median is the faster one's.
    """
    if len(seconds) < 2:
        return None
    worst = max(range(len(seconds)), key=lambda rank: seconds[rank])
    others = median(seconds) if len(seconds) > 2 else min(seconds)
    if others <= 0.0 or seconds[worst] <= SLOW * others:
        return None
    return f"rank {worst} is {seconds[worst] / others:.1f}x slower than the median"


class ForwardClock:
    """Seconds of a whole model's forwards in training, in which nothing waits for other ranks.

    The rest of a step says nothing about one rank under DDP: gradients are summed during the backward pass, which ends
    everywhere when the slowest rank's does. Hooks stand on the model inside DDP, after the buffers were broadcast.
    """

    def __init__(self, model: nn.Module) -> None:
        self._pairs: list[tuple[Any, Any]] = []
        self._begun: Any = None
        self._cuda = next(model.parameters()).is_cuda
        self._hooks = [
            model.register_forward_pre_hook(self._start, prepend=True),
            model.register_forward_hook(self._stop),
        ]

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        pairs, self._pairs = self._pairs, []
        if not self._cuda:
            return sum(end - start for start, end in pairs)
        if pairs:
            pairs[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / 1000

    def close(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _start(self, module: nn.Module, inputs: Any) -> None:
        self._begun = self._now() if module.training and torch.is_grad_enabled() else None

    def _stop(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._begun is not None:
            self._pairs.append((self._begun, self._now()))
            self._begun = None
