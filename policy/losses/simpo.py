"""Simple preference optimisation: pairs, no reference, averages of log-probabilities, a target margin."""

from __future__ import annotations

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from policy.losses.pairs import (
    PairLogprobs,
    check_positive,
    hinge_losses,
    pair_metrics,
    row_mean,
    smoothed_losses,
)

SimPOVariant = Literal["sigmoid", "hinge"]


def simpo_loss(  # noqa: PLR0913 - one keyword per setting of the method
    batch: PairLogprobs,
    *,
    beta: float,
    gamma_beta_ratio: float,
    label_smoothing: float = 0.0,
    length_normalize: bool = True,
    variant: SimPOVariant = "sigmoid",
    sft_weight: float = 0.0,
    chosen_nll: Float[Tensor, ""] | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The SimPO loss, a scalar, and metrics [N] (`pair_metrics`, reward = beta times the average).

    With a the mean log-probability of a response's tokens (the sum without `length_normalize`), g =
    `gamma_beta_ratio` and m = beta (a_chosen - a_rejected - g), per pair:
    - `sigmoid`: -(1 - e) log sigmoid(m) - e log sigmoid(-m), with e = `label_smoothing`;
    - `hinge`: max(0, 1 - m), without e.
    Sum over the pairs / `denominator` (None: N), plus `sft_weight` * `chosen_nll`, a scalar: the
    negative log-likelihood of the chosen tokens, already divided by the tokens of the step.
    Raises ValueError for beta <= 0, a negative ratio or weight, an e that the variant does not have, a weight without
    `chosen_nll`.

    Usual values: beta 2.0 to 10, ratio 0.25 (0.1 to 0.8 in the released models), e 0, sft_weight 0.
    Pitfalls: g is the paper's gamma / beta (trl's `simpo_gamma` is g beta, and its `cpo_alpha` 1.0
    adds an SFT term by default); the EOS counts in the length; nothing holds the policy near its
    start, so the learning rate decides. Sources: Meng et al. 2024 (arXiv:2405.14734), eq. 6;
    smoothing, hinge and SFT term: princeton-nlp/SimPO `simpo_trainer.py`.
    """
    check_positive("beta", beta)
    if gamma_beta_ratio < 0 or sft_weight < 0:
        raise ValueError(f"must be >= 0: gamma_beta_ratio {gamma_beta_ratio}, sft_weight {sft_weight}")
    if length_normalize:
        chosen, rejected = batch.chosen_average, batch.rejected_average
    else:
        chosen, rejected = batch.chosen, batch.rejected
    margins = beta * (chosen - rejected - gamma_beta_ratio)
    if variant == "sigmoid":
        losses = smoothed_losses(margins, label_smoothing)
    elif variant == "hinge":
        losses = hinge_losses(margins, label_smoothing)
    else:
        raise ValueError(f"variant must be one of {', '.join(get_args(SimPOVariant))}, got {variant!r}")
    loss = row_mean(losses, denominator)
    if sft_weight:
        if chosen_nll is None:
            raise ValueError("sft_weight needs chosen_nll")
        loss = loss + sft_weight * chosen_nll
    return loss, pair_metrics(batch, beta * chosen, beta * rejected)
