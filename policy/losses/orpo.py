"""Odds ratio preference optimisation: pairs, no reference, and the language-model loss in one stage."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from policy.losses.pairs import PairLogprobs, check_positive, pair_metrics, row_mean

LARGEST_AVERAGE = -1e-9


def _log_odds(average: Tensor) -> Tensor:
    """log(p / (1 - p)) with p = exp(average); an average above -1e-9 counts as -1e-9 in 1 - p, without gradient."""
    return average - torch.log(-torch.expm1(average.clamp(max=LARGEST_AVERAGE)))


def orpo_loss(
    batch: PairLogprobs,
    *,
    beta: float,
    chosen_nll: Float[Tensor, ""],
    denominator: float | Tensor | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The ORPO loss, a scalar, and metrics [N].

    `chosen_nll` - beta * sum over the pairs of log sigmoid(o) / `denominator` (None: N), with
    o = log odds(chosen) - log odds(rejected), odds = p / (1 - p) and p = exp(mean log-probability
    of a response's tokens). `chosen_nll`: a scalar, the negative log-likelihood already divided by
    the tokens of the step, by default of the codes over PROMPT and chosen response. beta is the
    paper's lambda. Metrics: `pair_metrics` (reward = beta times the average), `log_odds_chosen` = o
    and `log_odds_ratio` = log sigmoid(o). Raises ValueError for beta <= 0.

    Usual values: beta 0.1 (trl; 1.0 is the default of the original code), started from the base
    model. Pitfalls: an average near 0 makes 1 - p vanish, hence expm1 and the bound; the original
    code averages one padding token too many, trl's does not. Sources: Hong et al. 2024
    (arXiv:2403.07691), eq. 6 and 7; xfactlab/orpo; trl `ORPOTrainer`.
    """
    check_positive("beta", beta)
    chosen, rejected = batch.chosen_average, batch.rejected_average
    log_odds = _log_odds(chosen) - _log_odds(rejected)
    ratios = F.logsigmoid(log_odds)
    metrics = pair_metrics(batch, beta * chosen, beta * rejected)
    metrics |= {"log_odds_chosen": log_odds.detach(), "log_odds_ratio": ratios.detach()}
    return chosen_nll - beta * row_mean(ratios, denominator), metrics
