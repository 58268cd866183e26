"""Kahneman-Tversky optimisation: single answers labelled good or bad, a frozen reference.

Shapes: N labelled answers, M mismatched ones.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from policy.losses.pairs import check_positive, row_mean
from policy.tensors import at_least_float32

HIGHEST_BALANCE = 1.5


def mismatched(n: int) -> Int[Tensor, " rows"]:
    """[N]: which row's answer stands after the prompt of row i in the reference point: i + 1 mod N.

    Raises ValueError for N < 2. Pitfall: neighbours of one prompt are no mismatch, so interleave
    the rows. Sources: Ethayarajh et al. 2024 (arXiv:2402.01306), section 4; ContextualAI/HALOs
    (trl takes i - 1: another sample of the same estimate).
    """
    if n < 2:
        raise ValueError(f"the reference point needs at least 2 rows, got {n}")
    return (torch.arange(n) + 1) % n


@torch.no_grad()
def kto_reference_point(
    logprobs: Float[Tensor, " mismatches"],
    ref_logprobs: Float[Tensor, " mismatches"],
    denominator: float | Tensor | None = None,
) -> Float[Tensor, ""]:
    """z = max(0, sum of (logprobs - ref_logprobs) / `denominator`), a scalar without gradient.

    Summed log-probabilities [M] of mismatched prompts and answers (`mismatched`), nats; None: M.
    An estimate of KL(policy || reference), one for the whole step. Pitfall: the bound at 0 comes
    last, so give all mismatches of the step at once; bounded parts do not add up. Sources:
    Ethayarajh et al. 2024, section 4; the mean over all M as in trl `KTOTrainer` (HALOs divides by
    the number of non-zero rows).
    """
    return row_mean(at_least_float32(logprobs) - at_least_float32(ref_logprobs), denominator).clamp(min=0)


def kto_weights(desirable_count: int, undesirable_count: int) -> tuple[float, float]:
    """Weights (w_D, w_U) with w_D n_D / (w_U n_U) in [1, 3/2], for n_D good and n_U bad answers.

    Both are 1 where n_D / n_U lies in there; else the weight of the rarer side is raised until the
    quotient reaches the nearer bound. Raises ValueError when a count is not > 0. Source: Ethayarajh
    et al. 2024 (arXiv:2402.01306, latest version), eq. 9; the first version, and trl's warning,
    have 4/3.
    """
    check_positive("desirable_count", desirable_count)
    check_positive("undesirable_count", undesirable_count)
    balance = desirable_count / undesirable_count
    return max(1.0, 1 / balance), max(1.0, balance / HIGHEST_BALANCE)


def kto_loss(  # noqa: PLR0913 - one argument per part of the formula
    logprobs: Float[Tensor, " rows"],
    ref_logprobs: Float[Tensor, " rows"],
    desirable: Bool[Tensor, " rows"],
    reference_point: Float[Tensor, ""],
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    denominator: float | Tensor | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The KTO loss, a scalar, and metrics.

    They are `rewards/chosen` = beta r and `logps/chosen`, summed log-probabilities, of the desirable rows,
    `.../rejected` of the others, and `rewards/accuracies` [N], whether r is on its label's side of z.

    With r = logprobs - ref_logprobs, sums over the response tokens, EOS included, and z =
    `reference_point` (`kto_reference_point`; it gets no gradient), per row:
    w_D (1 - sigmoid(beta (r - z))) where `desirable`, else w_U (1 - sigmoid(beta (z - r))). Sum
    over the rows / `denominator` (None: N). Raises ValueError for beta or a weight <= 0.

    Usual values: beta 0.1, both weights 1 or `kto_weights`, steps of 32 rows, a learning rate 2 to
    10 times DPO's. Pitfalls: it is not reference-free; at the start every row costs half its
    weight; a row far from z has next to no gradient; a step of one label pulls one way only. Source:
    Ethayarajh et al. 2024 (arXiv:2402.01306), section 4; ContextualAI/HALOs `KTOTrainer`.
    """
    for name, value in (
        ("beta", beta),
        ("desirable_weight", desirable_weight),
        ("undesirable_weight", undesirable_weight),
    ):
        check_positive(name, value)
    logprobs = at_least_float32(logprobs)
    rewards = beta * (logprobs - at_least_float32(ref_logprobs))
    short = beta * reference_point.detach() - rewards
    losses = torch.where(desirable, desirable_weight * torch.sigmoid(short), undesirable_weight * torch.sigmoid(-short))
    metrics = {"rewards/accuracies": torch.where(desirable, short < 0, short > 0).to(rewards.dtype)}
    for side, rows in (("chosen", desirable), ("rejected", ~desirable)):
        metrics |= {f"rewards/{side}": rewards.detach()[rows], f"logps/{side}": logprobs.detach()[rows]}
    return row_mean(losses, denominator), metrics
