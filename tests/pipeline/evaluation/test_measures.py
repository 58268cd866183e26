"""Intervals, differences and diversity against hand computation and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.measures import (
    bootstrap_interval,
    distinct_n,
    length_stats,
    paired_bootstrap,
    prompt_means,
    repetition,
    self_bleu,
    wilson_interval,
)


def test_wilson_of_a_half_of_ten() -> None:
    # p = 0.5, z = 2: centre (0.5 + 4/20) / (1 + 4/10) = 0.5,
    # half = 2 * sqrt(0.25/10 + 4/400) / 1.4 = 2 * sqrt(0.035) / 1.4
    low, high = wilson_interval(5, 10, z=2.0)
    assert low == pytest.approx(0.5 - 2 * math.sqrt(0.035) / 1.4, abs=1e-12)
    assert high == pytest.approx(0.5 + 2 * math.sqrt(0.035) / 1.4, abs=1e-12)


def test_wilson_ends_solve_the_score_equation() -> None:
    # The interval is the set of p with |share - p| <= z sqrt(p (1 - p) / n).
    z, n = 1.959963984540054, 60
    for k in (1, 37, 59):
        for end in wilson_interval(k, n):
            assert abs(k / n - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), abs=1e-12)


def test_wilson_touches_the_bounds_only_at_the_extremes() -> None:
    assert wilson_interval(0, 8)[0] == 0.0
    assert wilson_interval(8, 8)[1] == 1.0
    assert wilson_interval(1, 8)[0] > 0
    assert wilson_interval(7, 8)[1] < 1


@pytest.mark.parametrize(("k", "n"), [(1, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_impossible_counts(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="0 <= k <= n"):
        wilson_interval(k, n)


def test_prompt_means_average_within_a_prompt_first() -> None:
    assert prompt_means([[1.0, 3.0], [10.0]]).tolist() == [2.0, 10.0]
    assert bootstrap_interval([[1.0, 3.0], [10.0]], seed=0).mean == 6.0


@pytest.mark.parametrize("values", [[], [[1.0], []]])
def test_nothing_to_average_is_refused(values: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"no prompts|no samples"):
        bootstrap_interval(values, seed=0)


def test_bootstrap_of_three_prompts_is_the_exact_bootstrap_distribution() -> None:
    # 27 equally likely resamples of (0, 1, 5); their 2.5% and 97.5% quantiles: the lowest mean, 0 (1/27 = 3.7% of the
    # mass), and the highest, 5.
    means = sorted(sum(draw) / 3 for draw in itertools.product((0.0, 1.0, 5.0), repeat=3))
    estimate = bootstrap_interval([[0.0], [1.0], [5.0]], seed=1, resamples=4000)
    assert estimate.mean == pytest.approx(2.0)
    assert estimate.low == pytest.approx(means[0])
    assert estimate.high == pytest.approx(means[-1])


def test_bootstrap_width_is_the_standard_error_of_prompts_not_of_samples() -> None:
    # 400 prompts of 10 equal samples: the standard error is std(prompt means) / sqrt(400). Resampling samples as if
    # they were independent would make the interval sqrt(10) times narrower.
    values = np.random.default_rng(0).normal(size=400)
    estimate = bootstrap_interval([[value] * 10 for value in values], seed=3)
    error = float(values.std()) / math.sqrt(400)
    assert estimate.low == pytest.approx(float(values.mean()) - 1.96 * error, abs=0.15 * error)
    assert estimate.high == pytest.approx(float(values.mean()) + 1.96 * error, abs=0.15 * error)


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for trial in range(400):
        draws = generator.normal(loc=0.3, size=(60, 2))
        estimate = bootstrap_interval(draws.tolist(), seed=trial, resamples=400)
        covered += estimate.low <= 0.3 <= estimate.high
    # 95% nominal; the percentile interval of 60 prompts covers about 93.5%: 4 standard errors of 400 trials around it.
    assert 0.885 <= covered / 400 <= 0.985


def test_bootstrap_depends_on_the_seed_alone() -> None:
    values = np.random.default_rng(2).normal(size=(50, 3)).tolist()
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4)
    assert bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)


def test_bootstrap_in_slices_draws_every_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).normal(size=(40, 1)).tolist()
    whole = bootstrap_interval(values, seed=4, resamples=101)
    monkeypatch.setattr("pipeline.evaluation.measures._WEIGHTS_AT_ONCE", 400)
    assert bootstrap_interval(values, seed=4, resamples=101) == pytest.approx(whole)


def test_one_prompt_has_no_interval() -> None:
    estimate = bootstrap_interval([[1.0, 2.0]], seed=0)
    assert estimate.mean == 1.5
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)


def test_paired_difference_has_the_sign_of_after_minus_before() -> None:
    estimate = paired_bootstrap([[1.0], [5.0]], [[2.0], [6.0]], seed=0)
    assert estimate == (1.0, 1.0, 1.0)


def test_pairing_removes_what_prompts_share() -> None:
    generator = np.random.default_rng(0)
    level = generator.normal(scale=10, size=200)
    before = [[value] for value in level]
    after = [[value + 0.5 + noise] for value, noise in zip(level, generator.normal(scale=0.1, size=200), strict=True)]
    estimate = paired_bootstrap(before, after, seed=0)
    assert estimate.low == pytest.approx(0.5, abs=0.05)
    assert estimate.high - estimate.low < 0.05


def test_paired_difference_refuses_other_prompts() -> None:
    with pytest.raises(ValueError, match="2 prompts before against 1 after"):
        paired_bootstrap([[1.0], [2.0]], [[1.0]], seed=0)


def test_distinct_by_hand() -> None:
    # bigrams: ab bc cd | ab bx -> 4 different of 5; unigrams a b c d a b x -> 5 of 7
    sequences = [[1, 2, 3, 4], [1, 2, 9], []]
    assert distinct_n(sequences, 1) == pytest.approx(5 / 7)
    assert distinct_n(sequences, 2) == pytest.approx(4 / 5)
    assert distinct_n([[1], [2]], 2) == 0.0


def test_repetition_is_within_a_response() -> None:
    # trigrams of 1 1 1 1 1: three, one different -> 2/3; of 1 2 3 4: none repeats -> 0; too short -> 0
    assert repetition([[1, 1, 1, 1, 1], [1, 2, 3, 4], [7]]) == pytest.approx((2 / 3) / 3)
    assert repetition([[1, 2, 3], [1, 2, 3]]) == 0.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=5), st.integers(1, 3))
def test_distinct_of_doubled_sequences_is_half(sequences: list[list[int]], n: int) -> None:
    assert distinct_n(sequences + sequences, n) == pytest.approx(distinct_n(sequences, n) / 2)
    assert distinct_n(sequences[::-1], n) == distinct_n(sequences, n)


def test_length_stats_by_hand() -> None:
    # sorted 1 2 3 10: 95% lies at rank 2.85: 3 + 0.85 * 7
    stats = length_stats([3, 1, 10, 2])
    assert (stats.mean, stats.median, stats.minimum, stats.maximum) == (4.0, 2.5, 1, 10)
    assert stats.p95 == pytest.approx(8.95)
    with pytest.raises(ValueError, match="no lengths"):
        length_stats([])


def test_self_bleu_by_hand() -> None:
    """Against "a b c d": 3 of 4 words, "a b" and "b c" of 3, "a b c" of 2 are right, no four of 1, smoothed to 1/2.

    Orders go up to a text's own length: of one word it is BLEU-1, with the penalty exp(1 - 4) for the closest length.
    """
    one = 100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert self_bleu(["a b c d", "a b c e"]) == pytest.approx(one, rel=1e-12)
    assert self_bleu(["a b c d", "a b c d"]) == pytest.approx(100.0)
    assert self_bleu(["a b", "c d"]) == 0.0
    back = 100 * math.exp(math.fsum(map(math.log, (1 / 4, 1 / 6, 1 / 8, 1 / 8))) / 4)
    assert self_bleu(["a", "a b c d"]) == pytest.approx((100 * math.exp(1 - 4) + back) / 2)
    assert self_bleu(["", "a b"]) == 0.0
    with pytest.raises(ValueError, match="there are 1 in all"):
        self_bleu(["alone"])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "c", "it's", "end."]), max_size=9), min_size=2, max_size=9))
def test_self_bleu_is_sacrebleus_sentence_level(words: list[list[str]]) -> None:
    from sacrebleu import sentence_bleu

    texts = [" ".join(each) for each in words]
    scores = [sentence_bleu(text, texts[:place] + texts[place + 1 :]).score for place, text in enumerate(texts)]
    assert self_bleu(texts) == pytest.approx(sum(scores) / len(scores), abs=1e-9)
