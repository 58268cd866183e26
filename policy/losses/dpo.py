"""Direct preference optimisation: pairs, a frozen reference, sums of log-probabilities."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
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

DPOVariant = Literal["sigmoid", "robust", "hinge"]


def dpo_loss(
    batch: PairLogprobs,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    variant: DPOVariant = "sigmoid",
    denominator: float | Tensor | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The DPO loss, a scalar, and metrics [N] (`pair_metrics`, reward = beta log(policy / reference)).

    With h = (chosen - ref_chosen) - (rejected - ref_rejected), sums over tokens, and e =
    `label_smoothing`, per pair:
    - `sigmoid`: -log sigmoid(beta h); e > 0 is conservative DPO,
      -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h);
    - `robust`: [-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2 e), unbiased when
      a share e < 0.5 of the labels is flipped; it may be negative;
    - `hinge`: max(0, 1 - beta h).
    Sum over the pairs / `denominator` (None: N). Raises ValueError without a reference, for beta <= 0 and for an e
    that the variant does not have.

    Usual values: beta 0.1 (trl, HALOs; the SimPO paper found 0.01 best), e 0 (HALOs cDPO 0.2).
    Pitfalls: at the start, policy = reference, the sigmoid loss is ln 2 exactly; the chosen
    log-probability normally FALLS in training, only the margin grows; dropout or another
    tokenisation in the reference breaks both. Sources: Rafailov et al. 2023 (arXiv:2305.18290),
    eq. 7; conservative: Mitchell 2023, eq. 3; robust: Chowdhury et al. 2024 (arXiv:2403.00409);
    hinge: Zhao et al. 2023 (arXiv:2305.10425), as in trl `DPOTrainer`.
    """
    check_positive("beta", beta)
    chosen, rejected = batch.log_ratios()
    margins = beta * (chosen - rejected)
    if variant == "sigmoid":
        losses = smoothed_losses(margins, label_smoothing)
    elif variant == "robust":
        losses = _robust_losses(margins, label_smoothing)
    elif variant == "hinge":
        losses = hinge_losses(margins, label_smoothing)
    else:
        raise ValueError(f"variant must be one of {', '.join(get_args(DPOVariant))}, got {variant!r}")
    return row_mean(losses, denominator), pair_metrics(batch, beta * chosen, beta * rejected)


def _robust_losses(margins: Tensor, flipped: float) -> Tensor:
    if not 0 <= flipped < 0.5:
        raise ValueError(f"label_smoothing of the robust variant must lie in [0, 0.5), got {flipped}")
    return (-(1 - flipped) * F.logsigmoid(margins) + flipped * F.logsigmoid(-margins)) / (1 - 2 * flipped)
