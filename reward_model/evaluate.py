"""How good a reward model is on held-out rankings: accuracy with an interval, calibration, dependence on length."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.tokens import EncodedRanking
from reward_model.data import ordered_pairs

RATING_GAPS = (0.5, 1.0, 2.0)
"""Least rating differences at which accuracy is reported, in the data's own unit."""
CALIBRATION_BINS = 10
QUANTILE_BUCKETS = 4
RESAMPLES = 2000
ACROSS_PAIRS = 40_000
"""Pairs of answers to any two prompts that are drawn for `across_prompts`."""
INTERVAL = f"95% percentile bootstrap over prompts, {RESAMPLES} resamples"

Floats = np.ndarray


@dataclass(frozen=True, slots=True)
class Pairs:
    """Every ordered pair of the held-out rankings; P pairs."""

    cluster: Floats
    """[P] number of the pair's prompt; equal prompts share one, their pairs are not independent."""
    margin: Floats
    """[P] score of the better answer minus score of the worse one."""
    gap: Floats | None
    """[P] rating of the better answer minus rating of the worse one; None unless every ranking has ratings."""
    tied: int
    """Pairs of equal rank, which are left out."""


def pairs_of(rankings: Sequence[EncodedRanking], scores: Sequence[Sequence[float]]) -> Pairs:
    """The ordered pairs of `rankings` under `scores`, K scores for each ranking."""
    clusters: dict[tuple[int, ...], int] = {}
    cluster, margin, gap, tied = [], [], [], 0
    rated = all(ranking.ratings is not None for ranking in rankings)
    for ranking, values in zip(rankings, scores, strict=True):
        number = clusters.setdefault(tuple(ranking.prompt_ids), len(clusters))
        pairs = ordered_pairs(ranking.ranks)
        tied += math.comb(len(ranking.ranks), 2) - len(pairs)
        for better, worse in pairs:
            cluster.append(number)
            margin.append(values[better] - values[worse])
            if rated and ranking.ratings is not None:
                gap.append(ranking.ratings[better] - ranking.ratings[worse])
    return Pairs(
        np.array(cluster, dtype=np.int64),
        np.array(margin, dtype=np.float64),
        np.array(gap, dtype=np.float64) if rated else None,
        tied,
    )


def evaluate_rankings(
    rankings: Sequence[EncodedRanking], scores: Sequence[Sequence[float]], *, seed: int
) -> dict[str, Any]:
    """Every figure of this module in one JSON-able dict; numbers that do not exist are None.

    Raises ValueError when no ranking has an ordered pair.
    """
    pairs = pairs_of(rankings, scores)
    if not len(pairs.margin):
        raise ValueError("no ordered pair to evaluate on")
    answers = np.array([score for values in scores for score in values], dtype=np.float64)
    lengths = np.array([len(r) for ranking in rankings for r in ranking.response_ids], dtype=float)
    return {
        "rankings": len(rankings),
        "prompts": len({tuple(ranking.prompt_ids) for ranking in rankings}),
        "answers": len(answers),
        "pairs": len(pairs.margin),
        "tied_pairs_left_out": pairs.tied,
        "interval": INTERVAL,
        **accuracy(pairs.margin, pairs.cluster, seed),
        "log_loss": float(np.logaddexp(0.0, -pairs.margin).mean()),
        "mean_margin": float(pairs.margin.mean()),
        "buckets": margin_buckets(pairs, seed),
        "across_prompts": across_prompts(rankings, scores, seed),
        "calibration": calibration(pairs.margin),
        "score_length": {
            "pearson": _finite(pearson(answers, lengths)),
            "spearman": _finite(spearman(answers, lengths)),
            "unit": "response tokens, EOS included",
        },
        "scores": {"mean": float(answers.mean()), "std": float(answers.std())},
    }


def accuracy(margin: Floats, cluster: Floats, seed: int) -> dict[str, float | int | None]:
    """Share of pairs whose better answer has the strictly higher score, with a 95% interval.

    accuracy = #{margin > 0} / P. The interval resamples prompts with all their pairs (2,000 times) and takes the
    2.5% and 97.5% quantiles of the ratio correct / pairs; None for fewer than two prompts.
    Source: Efron and Tibshirani (1993), chapter 13.
    """
    _, index = np.unique(cluster, return_inverse=True)
    count = int(index.max()) + 1
    total = np.bincount(index, minlength=count).astype(np.float64)
    right = np.bincount(index, weights=(margin > 0).astype(np.float64), minlength=count)
    if count < 2:
        return _estimate(right.sum() / total.sum(), np.array([]))
    draws = [(weights @ right) / (weights @ total) for weights in _prompt_weights(count, seed)]
    return _estimate(right.sum() / total.sum(), np.concatenate(draws))


def across_prompts(
    rankings: Sequence[EncodedRanking], scores: Sequence[Sequence[float]], seed: int
) -> list[dict[str, float | int | None]]:
    """Accuracy on pairs of answers to any two prompts whose ratings are at least 0.5, 1, 2 apart.

    Answers are compared across prompts, as PPO does when it normalises scores; the loss compares answers to one prompt
    only. 40,000 pairs are drawn at random. A resample of the prompts weighs a pair by the product of its two
    prompts' counts. Empty unless every ranking has ratings and there are two prompts.
    """
    if any(ranking.ratings is None for ranking in rankings):
        return []
    clusters: dict[tuple[int, ...], int] = {}
    rows = [
        (clusters.setdefault(tuple(ranking.prompt_ids), len(clusters)), rating, score)
        for ranking, values in zip(rankings, scores, strict=True)
        for rating, score in zip(ranking.ratings or (), values, strict=True)
    ]
    if len(clusters) < 2:
        return []
    cluster = np.array([row[0] for row in rows], dtype=np.int64)
    rating, score = (np.array([row[k] for row in rows], dtype=np.float64) for k in (1, 2))
    one, other = np.random.default_rng(seed).integers(0, len(rows), (2, ACROSS_PAIRS))
    gap = rating[one] - rating[other]
    right = (score[one] - score[other]) * np.sign(gap) > 0
    found = []
    for least in RATING_GAPS:
        chosen = np.flatnonzero(np.abs(gap) >= least)
        if not len(chosen):
            continue
        hits, mean = right[chosen].astype(np.float64), float(right[chosen].mean())
        draws = []
        for weights in _prompt_weights(len(clusters), seed):
            both = weights[:, cluster[one[chosen]]] * weights[:, cluster[other[chosen]]]
            total = both.sum(axis=1)
            draws.append((both @ hits)[total > 0] / total[total > 0])
        found.append({"gap": least, "pairs": len(chosen), **_estimate(mean, np.concatenate(draws))})
    return found


def _prompt_weights(count: int, seed: int) -> Iterator[Floats]:
    """How often each of `count` prompts is drawn, for 2,000 resamples in parts: float64 [part, count]."""
    generator = np.random.default_rng(seed)
    share = np.full(count, 1.0 / count)
    for start in range(0, RESAMPLES, 100):
        size = min(100, RESAMPLES - start)
        yield generator.multinomial(count, share, size=size).astype(np.float64)


def _estimate(value: float, draws: Floats) -> dict[str, float | int | None]:
    low, high = (None, None) if not len(draws) else map(float, np.quantile(draws, (0.025, 0.975)))
    return {"accuracy": float(value), "accuracy_low": low, "accuracy_high": high}


def margin_buckets(pairs: Pairs, seed: int) -> dict[str, Any]:
    """Accuracy by how far apart the answers are: by rating gap where ratings exist, else by predicted margin.

    `at_least`: pairs whose rating gap is at least 0.5, 1, 2. `quantiles`: four groups of nearly equal numbers of
    pairs, from the nearest to the farthest apart (equal gaps are never parted, so groups may differ in size).
    """
    by, size = ("predicted_margin", np.abs(pairs.margin))
    if pairs.gap is not None:
        by, size = ("rating_gap", pairs.gap)
    at_least = [(gap, size >= gap) for gap in RATING_GAPS] if pairs.gap is not None else []
    edges = np.unique(np.quantile(size, np.linspace(0, 1, QUANTILE_BUCKETS + 1)))
    group = np.clip(np.searchsorted(edges, size, side="right") - 1, 0, max(0, len(edges) - 2))
    members = [group == number for number in range(max(1, len(edges) - 1))]
    return {
        "by": by,
        "at_least": [
            {"gap": gap, "pairs": int(chosen.sum()), **_accuracy_of(pairs, chosen, seed)}
            for gap, chosen in at_least
            if chosen.any()
        ],
        "quantiles": [
            {
                "from": float(size[chosen].min()),
                "to": float(size[chosen].max()),
                "pairs": int(chosen.sum()),
                **_accuracy_of(pairs, chosen, seed),
            }
            for chosen in members
            if chosen.any()
        ],
    }


def _accuracy_of(pairs: Pairs, chosen: Floats, seed: int) -> dict[str, float | int | None]:
    return accuracy(pairs.margin[chosen], pairs.cluster[chosen], seed)


def calibration(margin: Floats) -> dict[str, Any]:
    """Predicted probability of the preferred side against how often it was right, and the expected calibration error.

    A pair with score difference d is predicted with confidence p = sigmoid(|d|) in [0.5, 1]; observed is the share of
    pairs in the bin whose higher score is the better answer (a difference of zero counts half).
    ECE = sum_bins n_bin / P * |observed - mean p|, ten equal bins of [0.5, 1]. Source: Guo et al. (2017), arXiv
    1706.04599, eq. 3.
    """
    confidence = 1.0 / (1.0 + np.exp(-np.abs(margin)))
    right = np.where(margin > 0, 1.0, np.where(margin < 0, 0.0, 0.5))
    position = ((confidence - 0.5) * 2 * CALIBRATION_BINS).astype(int)
    number = np.clip(position, 0, CALIBRATION_BINS - 1)
    bins, error = [], 0.0
    for index in range(CALIBRATION_BINS):
        chosen = number == index
        if not chosen.any():
            continue
        predicted, observed = float(confidence[chosen].mean()), float(right[chosen].mean())
        error += float(chosen.mean()) * abs(observed - predicted)
        low = 0.5 + index / (2 * CALIBRATION_BINS)
        bins.append(
            {
                "low": low,
                "high": low + 0.5 / CALIBRATION_BINS,
                "pairs": int(chosen.sum()),
                "predicted": predicted,
                "observed": observed,
            }
        )
    return {"ece": error, "bins": bins}


def pearson(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> float:
    """Pearson correlation of two equally long series; NaN when one of them is constant."""
    x = np.asarray(a, dtype=np.float64)
    y = np.asarray(b, dtype=np.float64)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else math.nan


def spearman(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> float:
    """Spearman's rho: Pearson correlation of the ranks, ties with their average rank; NaN when one is constant."""
    return pearson(average_ranks(a), average_ranks(b))


def average_ranks(values: Sequence[float] | Floats) -> Floats:
    """Ranks from 1, equal values sharing the mean of their ranks; float64 [n]."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
