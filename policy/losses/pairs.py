"""What the losses share: the input of those over pairs of answers, the mean over rows, the metrics.

Shapes: N pairs, each a chosen and a rejected response to one prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from policy.tensors import at_least_float32, masked_mean


@dataclass(frozen=True)
class PairLogprobs:
    """Log-probabilities of N pairs, every field [N] and in at least float32.

    `chosen`, `rejected`: sums over the tokens of the response, its EOS included, in nats.
    `chosen_tokens`, `rejected_tokens`: how many tokens that are, at least 1. `ref_chosen`,
    `ref_rejected`: the same sums under the frozen reference, or both None. Raises ValueError when
    shapes differ or when only one of the two references is there.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.ref_chosen is None) != (self.ref_rejected is None):
            raise ValueError("ref_chosen and ref_rejected are given together or not at all")
        fields = {name: value for name, value in vars(self).items() if value is not None}
        for name, value in fields.items():
            if value.shape != self.chosen.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, chosen {tuple(self.chosen.shape)}")
            if value.is_floating_point():
                object.__setattr__(self, name, at_least_float32(value))

    @property
    def chosen_average(self) -> Float[Tensor, " pairs"]:
        """Mean log-probability of a token of the chosen response, [N]."""
        return self.chosen / self.chosen_tokens

    @property
    def rejected_average(self) -> Float[Tensor, " pairs"]:
        """Mean log-probability of a token of the rejected response, [N]."""
        return self.rejected / self.rejected_tokens

    def log_ratios(self) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """log(policy / reference) of the chosen and of the rejected responses, [N] each.

        Raises ValueError without a reference.
        """
        if self.ref_chosen is None or self.ref_rejected is None:
            raise ValueError("this loss needs the log-probabilities of the reference")
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless `value` > 0."""
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")


def row_mean(losses: Float[Tensor, " rows"], denominator: float | Tensor | None) -> Float[Tensor, ""]:
    """Sum over the rows / `denominator`, a scalar; None means the number of rows.

    The number of rows of the whole optimiser step as denominator makes its micro-batches add up.
    """
    return masked_mean(losses, torch.ones_like(losses, dtype=torch.bool), denominator)


def smoothed_losses(margins: Float[Tensor, " pairs"], label_smoothing: float) -> Float[Tensor, " pairs"]:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m), [N], with e the share of labels taken to be wrong.

    Raises ValueError for e outside [0, 0.5]. Source: Mitchell 2023, "A note on DPO with noisy
    preferences", eq. 3.
    """
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5], got {label_smoothing}")
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def hinge_losses(margins: Float[Tensor, " pairs"], label_smoothing: float) -> Float[Tensor, " pairs"]:
    """max(0, 1 - m), [N]; ValueError with label smoothing, which the hinge does not have."""
    if label_smoothing:
        raise ValueError("the hinge loss has no label_smoothing")
    return torch.relu(1 - margins)


@torch.no_grad()
def pair_metrics(
    batch: PairLogprobs, chosen_rewards: Float[Tensor, " pairs"], rejected_rewards: Float[Tensor, " pairs"]
) -> dict[str, Tensor]:
    """Per pair, detached, under trl's names: implicit rewards, margin, accuracy (a tie is wrong), summed logps."""
    return {
        "rewards/chosen": chosen_rewards.detach(),
        "rewards/rejected": rejected_rewards.detach(),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).to(chosen_rewards.dtype),
        "logps/chosen": batch.chosen.detach(),
        "logps/rejected": batch.rejected.detach(),
    }
