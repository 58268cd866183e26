"""Intervals over seeds and prompts against hand computation; their coverage is in test_coverage.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.intervals import (
    bernoulli_share,
    crossed_interval,
    from_draws,
    holm,
    prompt_draws,
    prompt_weights,
    seed_error,
    student_draws,
)

STUDENT_2 = 4.302653
"""0.975 quantile of Student's t with two degrees of freedom."""


def test_holm_by_hand() -> None:
    # Sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, then 0.04 * 1 = 0.04 lifted to the 0.06 before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], abs=1e-15)


def test_holm_leaves_nan_out_and_stops_at_one() -> None:
    adjusted = holm([0.4, math.nan, 0.01, 0.9])
    assert math.isnan(adjusted[1])
    assert [adjusted[0], adjusted[2], adjusted[3]] == pytest.approx([0.8, 0.03, 0.9])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_ends_and_p_of_known_draws() -> None:
    draws = np.random.default_rng(0).permutation(np.arange(1.0, 1000.0))  # 999: p of null n is 2 (1 + n) / 1000
    tested = from_draws(500.0, draws, null=23.0)
    assert tested == (500.0, 24.0, 976.0, pytest.approx(2 * 24 / 1000))
    assert from_draws(500.0, draws, null=24.0).p == pytest.approx(0.05)
    assert from_draws(500.0, draws, null=976.0).p == pytest.approx(0.05)
    assert from_draws(500.0, draws, null=977.0).p == pytest.approx(0.048)
    assert from_draws(500.0, draws, null=-3.0).p == pytest.approx(0.002)
    assert from_draws(500.0, draws, null=500.0).p == 1.0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(-0.5, 0.5), st.integers(1, 4), st.integers(99, 1200))
def test_the_interval_leaves_null_out_exactly_when_p_is_small(seed: int, null: float, seeds: int, size: int) -> None:
    values = np.random.default_rng(seed).normal(0.1, 1, (seeds, 30))
    tested = crossed_interval(values, seed, null, size)
    assert (tested.p < 0.05) == (null < tested.low or null > tested.high)


def test_seed_error_by_hand() -> None:
    # Rows [0, 2] and [4, 4]: MS_seeds = 2 (1.5^2 + 1.5^2) / 1 = 9, residuals -+0.5: MS_rest = 4 * 0.25 / 1 = 1,
    # c = (1 - 2/9)^3 = 343/729; sqrt((9 - c^2 / 9) / 4).
    expected = math.sqrt((9 - (343 / 729) ** 2 / 9) / 4)
    assert seed_error(np.array([[0.0, 2.0], [4.0, 4.0]])) == pytest.approx(expected, abs=1e-12)


def test_seed_error_of_three_seeds_by_hand() -> None:
    # Row means 0, 1, 5, overall 2, no residuals but -+1 in the first two rows.
    values = np.array([[1.0, -1.0], [0.0, 2.0], [5.0, 5.0]])
    between = 2 * (4 + 1 + 9) / 2
    rest = 4 / 2
    chance = rest * (8 / 9) ** 3
    assert seed_error(values) == pytest.approx(math.sqrt((between - chance**2 / between) / 6), abs=1e-12)


def test_seeds_that_differ_less_than_chance_add_nothing() -> None:
    assert seed_error(np.array([[0.0, 2.0], [2.0, 0.1]])) == 0.0
    assert seed_error(np.array([[0.0, 2.0]])) == 0.0
    assert seed_error(np.array([[0.0], [2.0]])) == 0.0
    assert seed_error(np.full((3, 4), 0.25)) == 0.0


def test_seeds_with_equal_prompts_give_students_interval() -> None:
    # Every prompt of a seed the same: nothing but the seeds' means 1, 2, 6 varies; se = sqrt(7) / sqrt(3).
    values = np.repeat([[1.0], [2.0], [6.0]], 8, axis=1)
    assert seed_error(values) == pytest.approx(math.sqrt(7 / 3))
    edge = crossed_interval(values, 0, null=3 - STUDENT_2 * math.sqrt(7 / 3))
    simulated = 4 * math.sqrt(0.05 * 0.95 / 9999)
    assert abs(edge.p - 0.05) < simulated
    assert edge.low < 0 < edge.high


def test_prompts_are_resampled_for_all_seeds_together() -> None:
    row = np.random.default_rng(1).normal(size=(1, 40))
    once, thrice = crossed_interval(row, 3), crossed_interval(np.repeat(row, 3, axis=0), 3)
    assert thrice == pytest.approx(once, abs=1e-12)  # three equal seeds know no more than one


def test_one_seed_is_the_bayesian_bootstrap() -> None:
    # Rubin (1981): the variance of the weighted mean is that of the values, denominator P, over P + 1.
    values = np.random.default_rng(2).normal(size=20)
    draws = prompt_draws(values - values.mean(), 0, 40_000)
    assert draws.var() * 21 / values.var() == pytest.approx(1, abs=4 * math.sqrt(2.5 / 40_000))
    assert abs(draws.mean()) < 4 * values.std() / math.sqrt(21 * 40_000)
    tested = crossed_interval(values[None], 0)
    assert tested.mean == pytest.approx(values.mean())
    assert tested.low < tested.mean < tested.high


def test_weights_are_a_simplex_whatever_the_blocks() -> None:
    whole = np.concatenate(prompt_weights(7, 5, 23))
    parts = prompt_weights(7, 5, 23, at_once=20)
    assert [len(block) for block in parts] == [2] * 11 + [1]
    assert np.array_equal(np.concatenate(parts), whole)
    assert whole.shape == (23, 7)
    assert whole.min() > 0
    assert whole.sum(1) == pytest.approx(np.ones(23), abs=1e-12)


def test_several_columns_share_their_resamples() -> None:
    offsets = np.random.default_rng(4).normal(size=(9, 2))
    both = prompt_draws(offsets, 1, 50)
    assert both[:, 1] == pytest.approx(prompt_draws(offsets[:, 1], 1, 50))


def test_students_draws_have_their_degrees() -> None:
    assert not student_draws(1, 0, 10).any()
    draws = student_draws(3, 0, 20_000)
    assert abs((np.abs(draws) > STUDENT_2).mean() - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 20_000)
    assert not np.array_equal(student_draws(3, 1, 20_000), draws)


def test_intervals_move_and_stretch_with_the_values() -> None:
    values = np.random.default_rng(5).normal(size=(3, 25)) + np.array([[0.0], [1.0], [2.0]])
    tested, moved = crossed_interval(values, 7), crossed_interval(3 * values - 2, 7, null=-2.0)
    assert moved[:3] == pytest.approx([3 * value - 2 for value in tested[:3]], abs=1e-9)
    assert moved.p == tested.p


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(6).normal(size=(2, 12))
    assert crossed_interval(values, 1) == crossed_interval(values, 1)
    assert crossed_interval(values, 1) != crossed_interval(values, 2)


def test_constants_have_an_interval_of_width_zero() -> None:
    assert crossed_interval(np.full((2, 5), 0.25), 0) == (0.25, 0.25, 0.25, pytest.approx(2 / 10_000))
    assert crossed_interval(np.zeros((2, 5)), 0) == (0, 0, 0, 1)


def test_one_prompt_has_no_interval() -> None:
    tested = crossed_interval(np.array([[1.0], [3.0]]), 0)
    assert tested.mean == 2
    assert all(math.isnan(value) for value in tested[1:])


def test_share_of_the_bernoulli_variance() -> None:
    assert bernoulli_share(np.array([[1.0, 0.0, 1.0, 1.0]])) == pytest.approx(1)
    # Prompt means 1, 0.5: variance 1/16 over 3/4 * 1/4.
    assert bernoulli_share(np.array([[1.0, 1.0], [1.0, 0.0]])) == pytest.approx(1 / 3)
    assert bernoulli_share(np.ones((2, 3))) == 1
    assert bernoulli_share(np.full((2, 3), 0.5)) == 1


def test_unusable_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="seeds x prompts"):
        crossed_interval(np.zeros(4), 0)
    with pytest.raises(ValueError, match="seeds x prompts"):
        crossed_interval(np.zeros((0, 4)), 0)
    with pytest.raises(ValueError, match="seed 1, prompt 0 is nan"):
        crossed_interval(np.array([[1.0, 2.0], [math.nan, 1.0]]), 0)
    with pytest.raises(ValueError, match="99 resamples, not 98"):
        crossed_interval(np.zeros((1, 4)), 0, resamples=98)
