"""What a training took, whatever the machine: tokens, optimiser steps, and the models that were in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer


def count_tokens(trainer: Trainer, tokens: Tensor) -> None:
    """Adds the tokens [] of a micro-batch, over all processes, to `state.num_input_tokens_seen`.

    Checkpoints hold that state, so a resumed run goes on counting where its checkpoint was written. The library fills
    it only where it also logs it, and takes what it counts from an attention mask, which not all batches have.
    """
    total: Any = trainer.accelerator.reduce(tokens.to(trainer.args.device), "sum")
    trainer.state.num_input_tokens_seen += int(total)


def training_counts(trainer: Trainer) -> dict[str, int]:
    """For the manifest's metrics: `trained_tokens`, all that `count_tokens` was given, and `optimizer_steps`."""
    state = trainer.state
    return {"trained_tokens": state.num_input_tokens_seen, "optimizer_steps": state.global_step}


def models_in_memory(
    training: Sequence[str], *, peak: Sequence[str] = (), engine: Sequence[str] = ("policy",)
) -> dict[str, list[str]]:
    """The manifest's entry of that name: models by role, weights that several roles share once, as `base`.

    `training`: there at every optimiser step. `peak`: there at some time of the stage; by default the same. `engine`:
    those of which an engine holds a copy of its own while it samples.
    """
    return {"training": list(training), "peak": list(peak or training), "engine": list(engine)}
