"""What a transformers Trainer tells a stage: its logs, progress, checkpoints, how long steps take, that it diverged."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from torch import nn
from transformers import TrainerCallback

from pipeline.checkpoints import seal_checkpoint
from pipeline.errors import UserError
from pipeline.sharding import is_sharded
from pipeline.stage import Preempted, Stage
from pipeline.stragglers import ForwardClock, straggler
from pipeline.surroundings import gpu_peak

STEADY = 3
"""Logs in a row after which a slow rank is no accident."""


def trainer_callback(stage: Stage, title: str) -> TrainerCallback:
    """A transformers callback that sends the Trainer's logs to the stage's tracker and progress display.

    The Trainer's `eval_x` is written as `eval/x`, like the evaluations of every other stage. A gradient or
    held-out loss that is not finite ends the stage with a UserError: the weights are lost from there on. The mean wall
    and CPU seconds of this process's optimiser steps, but for its first, go into the manifest (`step_seconds`).

    Checkpoints are sealed. Where a rank was told to save and end, all of them save after the step and raise
    `Preempted`, before any evaluation. On several ranks each training log has `RankTimes` too.
    """
    return _TrackerCallback(stage, title)


class _TrackerCallback(TrainerCallback):
    def __init__(self, stage: Stage, title: str) -> None:
        self.stage = stage
        self.title = title
        self.numbers: dict[str, float] = {}
        self.seconds: list[tuple[float, float]] = []
        self.told = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stage = self.stage
        stage.tracker.rewind(state.global_step)
        self.display = stage.displays.enter_context(stage.progress(state.max_steps, self.title))
        self.ranks = RankTimes(stage, kwargs["model"])
        self.wind()

    def wind(self, *_: Any, **kwargs: Any) -> None:
        """Starts the clock of the next step, its batches' loading included."""
        self.begun = time.perf_counter(), time.process_time()

    on_evaluate = wind

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append((time.perf_counter() - self.begun[0], time.process_time() - self.begun[1]))
        self.ranks.seconds.append(self.seconds[-1][0])
        self.display.update(state.global_step, self.numbers)
        self.told = self.stage.told_to_save()
        if self.told:
            control.should_save, control.should_training_stop, control.should_evaluate = True, True, False
        self.wind()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seal_checkpoint(self.stage.state / f"checkpoint-{state.global_step}", self.stage.ranks)
        if self.told:
            raise Preempted(state.global_step)
        self.wind()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logged = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
        numbers = {f"eval/{k[5:]}" if k.startswith("eval_") else k: v for k, v in logged.items()}
        if numbers and "train_runtime" not in numbers:
            if "loss" in numbers:
                numbers |= self.ranks.take()
            self.stage.tracker.log(state.global_step, numbers)
            self.numbers.update(numbers)
            _refuse_diverged(numbers, state.global_step, self.title)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stage.displays.close()
        self.ranks.close()
        if self.seconds:
            self.stage.record(step_seconds=_mean_seconds(self.seconds[1:] or self.seconds))


class RankTimes:
    """How the ranks differ since the last log: seconds of a step, of its forwards, and the peak of memory.

    Forwards alone are a rank's own work (`ForwardClock`); a rank whose own take more than 1.5 times the median in
    `STEADY` logs in a row is named, once. Those of a sharded model gather weights and so wait for all ranks: then only
    steps and memory are told.
    """

    def __init__(self, stage: Stage, model: nn.Module) -> None:
        self.stage = stage
        self.seconds: list[float] = []
        self.clock = ForwardClock(model) if stage.ranks.world > 1 and not is_sharded(model) else None
        self.slow: list[str] = []

    def take(self) -> dict[str, float]:
        """The numbers of all ranks under `time/ranks/`, the same on each; none on one rank."""
        steps, self.seconds = self.seconds, []
        if self.stage.ranks.world == 1 or not steps:
            return {}
        memory = gpu_peak().get("peak_gpu_memory_gib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        own = None if self.clock is None else self.clock.take() / len(steps)
        step, forward, peak = zip(*self.stage.ranks.gather((sum(steps) / len(steps), own, memory)), strict=True)
        found = {"time/ranks/step_seconds_max": max(step), "time/ranks/memory_gib_max": max(peak)}
        if own is None:
            return found
        self._name(straggler(forward))
        own_work = {"forward_seconds_max": max(forward), "forward_seconds_median": median(forward)}
        return found | {f"time/ranks/{key}": value for key, value in own_work.items()}

    def close(self) -> None:
        """Stops measuring."""
        if self.clock is not None:
            self.clock.close()

    def _name(self, line: str | None) -> None:
        rank = (line or "").partition(" is ")[0]
        self.slow = [*self.slow, rank] if rank and rank in self.slow[-1:] else [rank]
        if line is not None and len(self.slow) == STEADY:
            self.stage.say(f"{self.stage.name}: {line} in its forwards")


def _mean_seconds(steps: Sequence[tuple[float, float]]) -> dict[str, float]:
    wall, cpu = (math.fsum(column) / len(steps) for column in zip(*steps, strict=True))
    return {"wall": wall, "cpu": cpu, "steps": len(steps)}


def _refuse_diverged(numbers: Mapping[str, float], step: int, title: str) -> None:
    for name in ("grad_norm", "eval/loss"):
        if not math.isfinite(numbers.get(name, 0.0)):
            raise UserError(
                f"{title}: {name} is {numbers[name]} at step {step}: training has diverged.",
                mend=f"Lower {title}.trainer.learning_rate, or raise {title}.trainer.warmup_steps.",
            )
