"""Identity preference optimisation: pairs and a frozen reference; DPO without its sigmoid."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from policy.losses.pairs import PairLogprobs, check_positive, pair_metrics, row_mean


def ipo_loss(
    batch: PairLogprobs,
    *,
    beta: float,
    length_normalize: bool = True,
    denominator: float | Tensor | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The IPO loss, a scalar, and metrics [N] (`pair_metrics`, reward = beta log(policy / reference), summed).

    Per pair (r_c - r_r - 1 / (2 beta))^2, with r = log(policy / reference) of a response: its mean
    over the tokens, or its sum with `length_normalize=False`. Sum over the pairs / `denominator`
    (None: N). Raises ValueError without a reference and for beta <= 0.

    Published codes disagree. Means: trl `DPOTrainer` (by its comment, confirmed by the paper's
    authors) and ContextualAI/HALOs. Sums: eric-mitchell/direct-preference-optimization and OpenRLHF, which is
    the paper to the letter. One beta does not serve both: the target 1 / (2 beta) is nats per
    token in the first, nats per response in the second.

    Usual value: beta (the paper's tau) 0.1. Pitfalls: the loss is not bounded by the margin, a
    pair beyond the target is pulled back; its size (25 at the start for beta 0.1) says nothing.
    Source: Azar et al. 2023 (arXiv:2310.12036), eq. 17.
    """
    check_positive("beta", beta)
    chosen, rejected = batch.log_ratios()
    metrics = pair_metrics(batch, beta * chosen, beta * rejected)
    if length_normalize:
        chosen, rejected = chosen / batch.chosen_tokens, rejected / batch.rejected_tokens
    losses = (chosen - rejected - 1 / (2 * beta)).square()
    return row_mean(losses, denominator), metrics
