"""Losses that teach a reward model from ranked answers.

Shapes: N pairs; B prompts with up to K answers each, padded. A LOWER rank is a better answer;
equal ranks are ties. `mask` [B,K] is True where there is an answer.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

RankingReduction = Literal["prompt_mean", "pair_mean"]


def bradley_terry_loss(
    chosen: Float[Tensor, " pairs"],
    rejected: Float[Tensor, " pairs"],
    *,
    margin: Float[Tensor, " pairs"] | None = None,
    centering: float | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Mean over N pairs of -log sigmoid(chosen - rejected - margin), a scalar, and its metrics.

    `centering` c adds c * mean((chosen + rejected)^2), which fixes the zero that the differences
    leave free. Metrics, detached: `accuracy` (share of pairs with chosen > rejected, equality
    being wrong), `margin` (mean of chosen - rejected), `pairs` (N). Without pairs all are 0.
    Sources: Bradley and Terry 1952; margin: Llama 2 (arXiv:2307.09288), eq. 2; centring:
    Eisenstein et al. 2023 (arXiv:2312.09244) and trl `RewardTrainer`.
    """
    difference = chosen - rejected
    losses = -F.logsigmoid(difference if margin is None else difference - margin)
    if centering is not None:
        losses = losses + centering * (chosen + rejected).square()
    n = max(len(difference), 1)
    difference = difference.detach()
    metrics = {
        "accuracy": (difference > 0).to(difference.dtype).sum() / n,
        "margin": difference.sum() / n,
        "pairs": difference.new_tensor(len(difference)),
    }
    return losses.sum() / n, metrics


def pairs_of_ranks(
    ranks: Shaped[Tensor, " answers"],
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Indices of the better and of the worse answer of every strictly ordered pair of K answers.

    Lower rank = better; ties are dropped. Ordered by the better answer's rank, then the worse's.
    """
    order = torch.argsort(ranks, stable=True)
    first, second = torch.triu_indices(len(ranks), len(ranks), offset=1, device=ranks.device)
    better, worse = order[first], order[second]
    strict = ranks[better] < ranks[worse]
    return better[strict], worse[strict]


def _ordered_pairs(ranks: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """[B,K,K] masks: answer i ranks strictly above j; i and j are two tied answers (i < j)."""
    both = mask.unsqueeze(2) & mask.unsqueeze(1)
    better = (ranks.unsqueeze(2) < ranks.unsqueeze(1)) & both
    tied = (ranks.unsqueeze(2) == ranks.unsqueeze(1)) & both
    return better, tied.triu(diagonal=1)


def _metrics(scores: Tensor, better: Tensor, tied: Tensor) -> dict[str, Tensor]:
    scores = scores.detach()
    difference = scores.unsqueeze(2) - scores.unsqueeze(1)
    pairs = better.sum()
    n = pairs.clamp(min=1)
    return {
        "accuracy": ((difference > 0) & better).sum().to(scores.dtype) / n,
        "margin": torch.where(better, difference, 0.0).sum() / n,
        "pairs": pairs,
        "ties": tied.sum(),
        "prompts": better.any(-1).any(-1).sum(),
    }


def _pair_mean_per_prompt(values: Tensor, better: Tensor) -> Tensor:
    """[B]: mean over the ordered pairs of each prompt, 0 where it has none."""
    return torch.where(better, values, 0.0).sum((1, 2)) / better.sum((1, 2)).clamp(min=1)


def _divide(total: Tensor, counted: Tensor, denominator: float | Tensor | None) -> Tensor:
    if denominator is None:
        return total / counted.sum().clamp(min=1)
    if not isinstance(denominator, Tensor) and not denominator > 0:
        raise ValueError(f"denominator must be a positive count, got {denominator}")
    return total / denominator


def ranking_loss(
    scores: Float[Tensor, "batch answers"],
    ranks: Shaped[Tensor, "batch answers"],
    mask: Bool[Tensor, "batch answers"],
    *,
    margins: Float[Tensor, "batch answers"] | None = None,
    centering: float | None = None,
    reduction: RankingReduction = "prompt_mean",
    denominator: float | Tensor | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """All strictly ordered pairs (w, l) of each prompt: -log sigmoid(s_w - s_l - m), a scalar.

    `prompt_mean` is the mean over the pairs of a prompt, then over prompts (InstructGPT,
    arXiv:2203.02155, eq. 1); `pair_mean` the mean over all pairs, in which a prompt weighs by its
    number of pairs. Ties are dropped; a prompt without an ordered pair contributes nothing and is
    not counted. `denominator` replaces the number of prompts (or pairs) that do count by that of
    the whole optimiser step.

    `margins` [B,K] are the answers' ratings, already multiplied by the wanted scale, higher being
    better: m = margins_w - margins_l. `centering` c adds c (s_w + s_l)^2 to each pair. Metrics,
    detached: `accuracy` and `margin` (= s_w - s_l), means over the pairs; `pairs`, `ties` and
    `prompts`, counts. For K = 2 this is `bradley_terry_loss`.
    """
    if reduction not in ("prompt_mean", "pair_mean"):
        raise ValueError(f"reduction must be prompt_mean or pair_mean, got {reduction!r}")
    scores = torch.where(mask, scores, 0.0)
    better, tied = _ordered_pairs(ranks, mask)
    difference = scores.unsqueeze(2) - scores.unsqueeze(1)
    if margins is not None:
        difference = difference - (margins.unsqueeze(2) - margins.unsqueeze(1))
    losses = -F.logsigmoid(torch.where(better, difference, 0.0))
    if centering is not None:
        losses = losses + centering * (scores.unsqueeze(2) + scores.unsqueeze(1)).square()
    if reduction == "prompt_mean":
        counted = better.any(-1).any(-1)
        total = _pair_mean_per_prompt(losses, better).sum()
    else:
        counted = better
        total = torch.where(better, losses, 0.0).sum()
    return _divide(total, counted, denominator), _metrics(scores, better, tied)


def plackett_luce_loss(
    scores: Float[Tensor, "batch answers"],
    ranks: Shaped[Tensor, "batch answers"],
    mask: Bool[Tensor, "batch answers"],
    *,
    margins: Float[Tensor, "batch answers"] | None = None,
    centering: float | None = None,
    reduction: RankingReduction = "prompt_mean",
    denominator: float | Tensor | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Mean over prompts of sum_i [logsumexp(s_i and every s_j ranked below i) - s_i], a scalar.

    Without ties this is the Plackett-Luce negative log-likelihood of the whole ranking (Plackett
    1975; Luce 1959), for K = 2 `bradley_terry_loss`, and with one best answer and the rest tied
    the best-of-K loss of openai/lm-human-preferences. Tied answers: each is compared with those
    ranked strictly below it and never with its equals (Luce's choice axiom applied to that
    subset), so a tie adds nothing, as in `ranking_loss`. Breslow's form (1974), the usual one in
    survival analysis, would keep the equals in each other's denominators.

    Prompts without an ordered pair contribute nothing and are not counted. Calling form and
    metrics as `ranking_loss`; `centering` is the mean over the ordered pairs of a prompt. There
    is no margin and no `pair_mean` in this model: either raises ValueError.
    """
    if margins is not None:
        raise ValueError("the Plackett-Luce loss has no margin term")
    if reduction != "prompt_mean":
        raise ValueError(f"the Plackett-Luce loss is a mean over prompts, got {reduction!r}")
    scores = torch.where(mask, scores, 0.0)
    better, tied = _ordered_pairs(ranks, mask)
    itself = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    below = scores.unsqueeze(1).masked_fill(~(better | itself), -torch.inf)
    per_prompt = (below.logsumexp(-1) - scores).sum(-1)
    if centering is not None:
        square = (scores.unsqueeze(2) + scores.unsqueeze(1)).square()
        per_prompt = per_prompt + centering * _pair_mean_per_prompt(square, better)
    counted = better.any(-1).any(-1)
    return _divide(per_prompt.sum(), counted, denominator), _metrics(scores, better, tied)
