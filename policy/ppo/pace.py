"""How long an update's phases take on every rank, and which rank holds the others up."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from pipeline.ranks import ALONE, Ranks
from pipeline.stage import Stage
from pipeline.stragglers import straggler


@dataclass
class Pace:
    """The clocks of one update on this rank.

    Attributes:
        seconds: wall seconds by phase. busy: the same without the time that this rank waited for others in.
    """

    ranks: Ranks = ALONE
    seconds: dict[str, float] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)
    _cpu_start: float = field(default_factory=time.process_time)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the block's time to the phase's."""
        start, waited = time.perf_counter(), self.ranks.waited.seconds
        yield
        taken = time.perf_counter() - start
        self.seconds[phase] = self.seconds.get(phase, 0.0) + taken
        self.busy[phase] = self.busy.get(phase, 0.0) + taken - (self.ranks.waited.seconds - waited)

    @property
    def cpu_seconds(self) -> float:
        """CPU time of all threads of this process since the update began."""
        return time.process_time() - self._cpu_start


def compare_ranks(stage: Stage, pace: Pace, update: int, tokens: float) -> dict[str, float]:
    """What the ranks' own times say, for metrics.jsonl; nothing where there is one rank.

    Every rank notes its phases in its log; one that is much slower than the others is named. On a GPU a rank waits for
    others inside kernels too, so that its time is told less sharply there.
    """
    ranks = stage.ranks
    if ranks.world == 1:
        return {}
    phases = ", ".join(f"{phase} {busy:.2f}" for phase, busy in pace.busy.items())
    waited = sum(pace.seconds.values()) - sum(pace.busy.values())
    stage.note(f"update {update}: own seconds {phases}; waited {waited:.2f}; peak memory {_peak_gib():.2f} GiB")
    each = ranks.gather((sum(pace.busy.values()), _peak_gib()))
    busy, memory = (list(column) for column in zip(*each, strict=True))
    slow = straggler(busy)
    if slow is not None:
        stage.say(f"update {update}: {slow}")
    return {
        "time/ranks/busy_seconds_max": max(busy),
        "time/ranks/busy_seconds_min": min(busy),
        "time/ranks/peak_memory_gib_max": max(memory),
        "time/ranks/tokens_per_second": tokens / sum(pace.seconds.values()),
    }


def _peak_gib() -> float:
    """Of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
