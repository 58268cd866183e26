"""What a transformers Trainer tells a stage: its logs, its progress, how long its steps take, that it diverged."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.stage import Stage

if TYPE_CHECKING:
    from transformers import TrainerCallback


def trainer_callback(stage: Stage, title: str) -> TrainerCallback:
    """A transformers callback that sends the Trainer's logs to the stage's tracker and progress display.

    The Trainer's `eval_x` is written as `eval/x`, like the evaluations of every other stage. A gradient or
    held-out loss that is not finite ends the stage with a UserError: the weights are lost from there on. The mean wall
    and CPU seconds of this process's optimiser steps, but for its first, go into the manifest (`step_seconds`).
    """
    from transformers import TrainerCallback

    class TrackerCallback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stage.tracker.rewind(state.global_step)
            self.display = stage.displays.enter_context(stage.progress(state.max_steps, title))
            self.numbers: dict[str, float] = {}
            self.seconds: list[tuple[float, float]] = []

            self.wind()

        def wind(self, *_: Any, **kwargs: Any) -> None:
            """Starts the clock of the next step, its batches' loading included."""
            self.begun = time.perf_counter(), time.process_time()

        on_evaluate = on_save = wind

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds.append((time.perf_counter() - self.begun[0], time.process_time() - self.begun[1]))
            self.display.update(state.global_step, self.numbers)
            self.wind()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            logged = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
            numbers = {f"eval/{k[5:]}" if k.startswith("eval_") else k: v for k, v in logged.items()}
            if numbers and "train_runtime" not in numbers:
                stage.tracker.log(state.global_step, numbers)
                self.numbers.update(numbers)
                _refuse_diverged(numbers, state.global_step, title)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stage.displays.close()
            warm = self.seconds[1:] or self.seconds
            if warm:
                wall, cpu = (math.fsum(column) / len(warm) for column in zip(*warm, strict=True))
                stage.record(step_seconds={"wall": wall, "cpu": cpu, "steps": len(warm)})

    return TrackerCallback()


def _refuse_diverged(numbers: Mapping[str, float], step: int, title: str) -> None:
    for name in ("grad_norm", "eval/loss"):
        if not math.isfinite(numbers.get(name, 0.0)):
            raise UserError(
                f"{title}: {name} is {numbers[name]} at step {step}: training has diverged.",
                mend=f"Lower {title}.trainer.learning_rate, or raise {title}.trainer.warmup_steps.",
            )
