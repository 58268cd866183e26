"""Figures of the evaluation against hand computation and independent implementations."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.tokens import EncodedRanking
from reward_model.evaluate import (
    accuracy,
    across_prompts,
    average_ranks,
    calibration,
    evaluate_rankings,
    margin_buckets,
    pairs_of,
    pearson,
    spearman,
)

PAIR = EncodedRanking([1, 7], [[3], [4, 5, 2]], (0.0, 1.0), (2.5, 1.0))
TRIPLE = EncodedRanking([1, 8], [[3, 2], [4, 2], [5, 5, 5, 2]], (1.0, 0.0, 1.0), (-1.0, 1.0, -1.0))
# scores: PAIR 1.0 against 3.0: wrong by 2; TRIPLE best 2.0 against 1.0 and 2.0: right by 1, and equal (wrong)
SCORES = [[1.0, 3.0], [1.0, 2.0, 2.0]]


def test_pairs_of_by_hand() -> None:
    pairs = pairs_of([PAIR, TRIPLE], SCORES)
    assert pairs.cluster.tolist() == [0, 1, 1]
    assert pairs.margin.tolist() == [-2.0, 1.0, 0.0]
    assert pairs.gap is not None
    assert pairs.gap.tolist() == [1.5, 2.0, 2.0]
    assert pairs.tied == 1


def test_equal_prompts_share_a_cluster_and_missing_ratings_leave_no_gaps() -> None:
    bare = EncodedRanking([1, 7], [[3], [4]], (1.0, 0.0), None)
    pairs = pairs_of([PAIR, bare, TRIPLE], [*SCORES[:1], [0.0, 1.0], *SCORES[1:]])
    assert pairs.cluster.tolist() == [0, 0, 1, 1]
    assert pairs.gap is None


def test_evaluation_by_hand() -> None:
    result = evaluate_rankings([PAIR, TRIPLE], SCORES, seed=0)
    assert (result["rankings"], result["prompts"], result["answers"]) == (2, 2, 5)
    assert (result["pairs"], result["tied_pairs_left_out"]) == (3, 1)
    assert result["accuracy"] == pytest.approx(1 / 3)
    # resamples of the two prompts: both PAIR 0/2, both TRIPLE 2/4, one each 1/3
    assert (result["accuracy_low"], result["accuracy_high"]) == (0.0, 0.5)
    assert result["mean_margin"] == pytest.approx(-1 / 3)
    # log(1 + e^2) = 2.126928, log(1 + e^-1) = 0.313262, log 2 = 0.693147; sum 3.133337
    assert result["log_loss"] == pytest.approx(3.133337 / 3, abs=1e-6)
    # scores 1 3 1 2 2: mean 1.8, variance (0.64 + 1.44 + 0.64 + 0.04 + 0.04) / 5 = 0.56
    assert result["scores"]["mean"] == pytest.approx(1.8)
    assert result["scores"]["std"] == pytest.approx(math.sqrt(0.56))
    # lengths 1 3 2 2 4, mean 2.4; deviations of the scores -.8 1.2 -.8 .2 .2, of the lengths -1.4 .6 -.4 -.4 1.6:
    # products 1.12 + .72 + .32 - .08 + .32 = 2.4; sqrt(2.8 * 5.2) = 3.815757
    assert result["score_length"]["pearson"] == pytest.approx(2.4 / 3.815757, abs=1e-6)
    # ranks of the scores 1.5 5 1.5 3.5 3.5, of the lengths 1 4 2.5 2.5 5:
    # deviations -1.5 2 -1.5 .5 .5 and -2 1 -.5 -.5 2: 3 + 2 + .75 - .25 + 1 = 6.5; sqrt(9 * 9.5) = 9.246621
    assert result["score_length"]["spearman"] == pytest.approx(6.5 / 9.246621, abs=1e-6)
    json.dumps(result, allow_nan=False)


def test_no_ordered_pair_is_an_error() -> None:
    tied = EncodedRanking([1], [[3], [4]], (0.0, 0.0), None)
    with pytest.raises(ValueError, match="no ordered pair"):
        evaluate_rankings([tied], [[1.0, 2.0]], seed=0)


def test_one_prompt_has_no_interval_and_constant_scores_no_correlation() -> None:
    result = evaluate_rankings([PAIR], [[1.0, 1.0]], seed=0)
    assert result["accuracy"] == 0.0
    assert result["accuracy_low"] is None
    assert result["accuracy_high"] is None
    assert result["score_length"]["pearson"] is None
    assert result["score_length"]["spearman"] is None
    json.dumps(result, allow_nan=False)


def test_the_interval_resamples_prompts_not_pairs() -> None:
    """Ten pairs of one prompt all right or all wrong together: the interval is that of the prompts."""
    generator = np.random.default_rng(5)
    right = generator.random(40) < 0.7
    margin = np.repeat(np.where(right, 1.0, -1.0), 10)
    cluster = np.repeat(np.arange(40), 10)
    got = accuracy(margin, cluster, seed=1)
    low, high = got["accuracy_low"], got["accuracy_high"]
    assert low is not None
    assert high is not None
    share = right.mean()
    # normal approximation over 40 prompts; over 400 pairs it would be 3.16 times narrower
    expected = 2 * 1.96 * math.sqrt(share * (1 - share) / 40)
    assert high - low == pytest.approx(expected, rel=0.1)
    assert low < share < high


def test_accuracy_interval_is_reproducible() -> None:
    margin, cluster = np.array([1.0, -1.0, 2.0, 3.0]), np.array([0, 1, 2, 2])
    assert accuracy(margin, cluster, 3) == accuracy(margin, cluster, 3)


def test_across_prompts_compares_answers_of_different_prompts() -> None:
    """Within each ranking the order is right; scores of the second prompt are shifted, so across prompts it is not."""
    rankings = [
        EncodedRanking([1, 7], [[3], [4]], (0.0, 1.0), (1.0, 0.0)),
        EncodedRanking([1, 8], [[3], [4]], (0.0, 1.0), (3.0, 2.0)),
    ]
    found = across_prompts(rankings, [[11.0, 10.0], [1.0, 0.0]], seed=0)
    # Gaps of two answers: 1 within a prompt (right), 2 (a), 1 (b), 3 (c), 2 (d) across prompts (all wrong).
    # Gap >= 1: pairs within 2 of 6, gap >= 2: across prompts only.
    assert [row["gap"] for row in found] == [0.5, 1.0, 2.0]
    assert found[0]["accuracy"] == pytest.approx(2 / 6, abs=0.02)
    assert found[1]["accuracy"] == pytest.approx(2 / 6, abs=0.02)
    assert (found[2]["accuracy"], found[2]["accuracy_low"], found[2]["accuracy_high"]) == (0.0, 0.0, 0.0)
    # a resample of one prompt alone is all right, of both prompts 2 of 6
    assert found[0]["accuracy_high"] == 1.0
    agreeing = across_prompts(rankings, [[1.0, 0.0], [3.0, 2.0]], seed=0)
    assert [row["accuracy"] for row in agreeing] == [1.0, 1.0, 1.0]


def test_across_prompts_needs_ratings() -> None:
    assert across_prompts([EncodedRanking([1], [[3], [4]], (0.0, 1.0), None)], [[1.0, 0.0]], seed=0) == []


def test_buckets_by_rating_gap() -> None:
    ranking = [
        EncodedRanking([1, n], [[3], [4]], (0.0, 1.0), (gap, 0.0))
        for n, gap in enumerate((0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0))
    ]
    # wrong on the first, third and fifth
    scores = [[-1.0 if n in (0, 2, 4) else 1.0, 0.0] for n in range(8)]
    buckets = margin_buckets(pairs_of(ranking, scores), seed=0)
    assert buckets["by"] == "rating_gap"
    assert [(b["gap"], b["pairs"]) for b in buckets["at_least"]] == [(0.5, 7), (1.0, 5), (2.0, 3)]
    assert [b["accuracy"] for b in buckets["at_least"]] == pytest.approx([5 / 7, 4 / 5, 1.0])
    assert [(b["from"], b["to"], b["pairs"], b["accuracy"]) for b in buckets["quantiles"]] == [
        (0.25, 0.5, 2, 0.5),
        (0.75, 1.0, 2, 0.5),
        (1.5, 2.0, 2, 0.5),
        (2.5, 3.0, 2, 1.0),
    ]


def test_buckets_by_predicted_margin_without_ratings() -> None:
    rankings = [EncodedRanking([1, n], [[3], [4]], (0.0, 1.0), None) for n in range(4)]
    buckets = margin_buckets(pairs_of(rankings, [[m, 0.0] for m in (0.1, -0.2, 3.0, 4.0)]), seed=0)
    assert buckets["by"] == "predicted_margin"
    assert buckets["at_least"] == []
    assert [b["accuracy"] for b in buckets["quantiles"]] == [1.0, 0.0, 1.0, 1.0]


def test_buckets_of_equal_gaps_hold_all_pairs() -> None:
    buckets = margin_buckets(pairs_of([PAIR, PAIR], [[1.0, 0.0], [1.0, 0.0]]), seed=0)
    assert [b["pairs"] for b in buckets["quantiles"]] == [2]


def test_calibration_by_hand() -> None:
    # p = sigmoid(|d|): ln 3 -> 0.75 (bin 0.75..0.8), ln 4 -> 0.8 (bin 0.8..0.85; nudged above the edge), 0 -> 0.5
    ln3, ln4 = math.log(3.0001), math.log(4.0001)
    result = calibration(np.array([ln3, ln3, -ln3, -ln4, 0.0]))
    rows = [(round(b["low"], 2), b["pairs"], b["observed"]) for b in result["bins"]]
    assert rows == [(0.5, 1, 0.5), (0.75, 3, 2 / 3), (0.8, 1, 0.0)]
    assert [b["predicted"] for b in result["bins"]] == pytest.approx([0.5, 0.75, 0.8], abs=1e-4)
    # 1/5 * 0 + 3/5 * |2/3 - 0.75| + 1/5 * 0.8 = 0.05 + 0.16
    assert result["ece"] == pytest.approx(0.21, abs=1e-4)


def test_calibration_of_certain_pairs_falls_in_the_last_bin() -> None:
    result = calibration(np.array([800.0, -800.0]))
    assert [(b["pairs"], b["predicted"], b["observed"]) for b in result["bins"]] == [(2, 1.0, 0.5)]
    assert result["ece"] == pytest.approx(0.5)


SERIES = st.lists(st.integers(-5, 5), min_size=3, max_size=30)


def counted_ranks(values: list[int]) -> list[float]:
    """Rank by definition: those below, and half of its equals."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


@settings(max_examples=50, deadline=None)
@given(SERIES)
def test_correlations_agree_with_numpy_and_the_definition_of_ranks(values: list[int]) -> None:
    other = [(v * 7 + index * 3) % 11 for index, v in enumerate(values)]
    assert average_ranks(values).tolist() == counted_ranks(values)
    if len(set(values)) == 1 or len(set(other)) == 1:
        assert math.isnan(spearman(values, other))
        return
    assert pearson(values, other) == pytest.approx(np.corrcoef(values, other)[0, 1], abs=1e-9)
    expected = np.corrcoef(counted_ranks(values), counted_ranks(other))[0, 1]
    assert spearman(values, other) == pytest.approx(expected, abs=1e-9)
