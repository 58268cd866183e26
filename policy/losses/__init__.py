"""The direct-preference methods: what each learns from, and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from policy.losses.contrast_sft import contrast_sft_loss
from policy.losses.dpo import dpo_loss
from policy.losses.ift import ift_loss
from policy.losses.ipo import ipo_loss
from policy.losses.kto import kto_loss
from policy.losses.orpo import orpo_loss
from policy.losses.simpo import simpo_loss

DataKind = Literal["pairs", "labels", "targets"]


@dataclass(frozen=True)
class Method:
    """One method. `loss` returns a scalar and its metrics, detached, one value per row.

    `data`: the rows it learns from: chosen and rejected answers, single answers with a label, or
    target answers. `needs_reference`: whether the loss reads a frozen reference. `averaged`:
    whether by default it reads log-probabilities per token (means) or per response (sums).
    """

    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    data: DataKind
    needs_reference: bool
    averaged: bool


METHODS: dict[str, Method] = {
    "dpo": Method(dpo_loss, "pairs", needs_reference=True, averaged=False),
    "ipo": Method(ipo_loss, "pairs", needs_reference=True, averaged=True),
    "kto": Method(kto_loss, "labels", needs_reference=True, averaged=False),
    "simpo": Method(simpo_loss, "pairs", needs_reference=False, averaged=True),
    "orpo": Method(orpo_loss, "pairs", needs_reference=False, averaged=True),
    "ift": Method(ift_loss, "targets", needs_reference=False, averaged=True),
    "contrast": Method(contrast_sft_loss, "pairs", needs_reference=False, averaged=True),
}
