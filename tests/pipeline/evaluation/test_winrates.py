"""Outcomes, win rates and sentences against hand computation; the coverage of the intervals is in test_coverage.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.intervals import Tested, crossed_interval
from pipeline.evaluation.winrates import mirrored, outcomes, says, says_difference, win_rate

RESAMPLES = 9999


def jeffreys_mass(below: float, won: float, lost: float) -> float:
    """Mass of Beta(won + 1/2, lost + 1/2) below a rate, by the trapezoid rule in x with sin(x)^2 the rate."""
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.sin(angles) ** (2 * won) * np.cos(angles) ** (2 * lost)
    inside = angles <= math.asin(math.sqrt(below))
    return float(np.trapezoid(density[inside], angles[inside]) / np.trapezoid(density, angles))


def test_outcomes_by_hand() -> None:
    ours = np.array([[[1.0, 3.0], [2.0, 2.0]]])
    theirs = np.array([[[2.0, 1.0], [2.0, 5.0]]])
    # First prompt: 1 < 2, 1 = 1, 3 > 2, 3 > 1: 2.5 of 4. Second: 2 = 2, 2 < 5, twice: 1 of 4.
    assert outcomes(ours, theirs).tolist() == [[0.625, 0.25]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_outcomes_are_what_loops_say(seed: int, seeds: int, ours_n: int, theirs_n: int) -> None:
    generator = np.random.default_rng(seed)
    ours = generator.integers(4, size=(seeds, 5, ours_n)).astype(float)
    theirs = generator.integers(4, size=(seeds, 5, theirs_n)).astype(float)
    found = outcomes(ours, theirs)
    for s in range(seeds):
        for p in range(5):
            won = [1 if a > b else 0.5 if a == b else 0 for a in ours[s, p] for b in theirs[s, p]]
            assert found[s, p] == pytest.approx(sum(won) / len(won), abs=1e-12)
    assert outcomes(theirs, ours) == pytest.approx(1 - found, abs=1e-12)


def test_scores_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="against"):
        outcomes(np.zeros((1, 2, 3)), np.zeros((1, 3, 3)))
    with pytest.raises(ValueError, match="samples"):
        outcomes(np.zeros((1, 2)), np.zeros((1, 2)))
    with pytest.raises(ValueError, match="samples"):
        outcomes(np.zeros((1, 2, 0)), np.zeros((1, 2, 1)))
    with pytest.raises(ValueError, match="samples"):
        outcomes(np.zeros((1, 2, 1, 1)), np.zeros((1, 2, 1)))
    for place in (0, 1):
        tables = [np.zeros((1, 2, 1)), np.zeros((1, 2, 1))]
        tables[place][0, 0] = math.nan
        with pytest.raises(ValueError, match="not finite"):
            outcomes(*tables)


@pytest.mark.parametrize(("won", "lost"), [(7, 3), (58, 6), (1, 63), (32, 32)])
def test_one_seed_without_ties_is_jeffreys_interval(won: int, lost: int) -> None:
    outcome = np.array([[1.0] * won + [0.0] * lost])
    tested = win_rate(outcome, 0, RESAMPLES)
    simulated = 4 * math.sqrt(0.025 * 0.975 / RESAMPLES)
    assert abs(jeffreys_mass(tested.low, won, lost) - 0.025) < simulated
    assert abs(jeffreys_mass(tested.high, won, lost) - 0.975) < simulated
    assert tested.mean == won / (won + lost)
    if tested.p > 0.01:
        tail = jeffreys_mass(0.5, won, lost)
        assert abs(tested.p - 2 * min(tail, 1 - tail)) < 8 * math.sqrt(0.25 / RESAMPLES)


def test_a_rate_of_one_has_an_interval() -> None:
    tested = win_rate(np.ones((1, 64)), 0)
    assert (tested.mean, tested.high) == (1, 1)
    simulated = 4 * math.sqrt(0.025 * 0.975 / RESAMPLES)
    assert abs(jeffreys_mass(tested.low, 64, 0) - 0.025) < simulated
    assert tested.p == pytest.approx(2 / 10_000)
    lost = win_rate(np.zeros((3, 64)), 0)
    assert (lost.mean, lost.low) == (0, 0)
    assert 0.02 < lost.high < 0.06  # Jeffreys' for none of 64 is 0.038


def test_nothing_but_ties_is_no_difference() -> None:
    tested = win_rate(np.full((3, 64), 0.5), 0)
    assert tested.mean == 0.5
    assert tested.low < 0.5 < tested.high
    assert tested.p > 0.9


def test_means_over_many_samples_are_not_pulled_to_one_half() -> None:
    # Prompts between 0.88 and 0.92: a share of 0.0002/0.09 of the Bernoulli variance; a whole half win and half loss
    # would pull the middle of the interval by 0.4 / 33 = 0.012.
    outcome = np.tile([[0.88, 0.89, 0.91, 0.92]], (1, 8))
    tested = win_rate(outcome, 0)
    plain = crossed_interval(outcome, 0, null=0.5)
    assert tested[:3] == pytest.approx(plain[:3], abs=1e-3)


def test_seeds_that_differ_widen_the_interval_and_it_ends_at_one() -> None:
    row = np.repeat([1.0, 0.0], [80, 20])
    same = np.stack([row, np.roll(row, 31), np.roll(row, 62)])
    apart = np.stack([np.repeat([1.0, 0.0], [won, 100 - won]) for won in (60, 80, 100)])
    narrow, wide = win_rate(same, 0), win_rate(apart, 0)
    assert narrow.mean == wide.mean == pytest.approx(0.8)
    assert narrow.high - narrow.low < 0.12
    assert wide.high == 1
    assert wide.low < 0.5
    assert wide.p > 0.05 > narrow.p


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from((0.4, 0.5, 0.6, 0.95)), st.integers(1, 3))
def test_the_rate_lies_inside_and_p_agrees(seed: int, rate: float, seeds: int) -> None:
    outcome = (np.random.default_rng(seed).random((seeds, 30)) < rate) * 1.0
    tested = win_rate(outcome, seed, 499)
    assert 0 <= tested.low <= tested.mean <= tested.high <= 1
    assert (tested.p < 0.05) == (tested.low > 0.5 or tested.high < 0.5)
    assert tested == win_rate(outcome, seed, 499)


def test_unusable_outcomes_are_refused() -> None:
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            win_rate(np.array([[0.5, wrong]]), 0)
    tested = win_rate(np.array([[1.0]]), 0)
    assert tested.mean == 1
    assert math.isnan(tested.low)
    assert math.isnan(tested.p)


def test_the_other_side() -> None:
    assert mirrored(Tested(0.7, 0.6, 0.75, 0.01)) == pytest.approx((0.3, 0.25, 0.4, 0.01))


def test_sentences_about_win_rates() -> None:
    won = Tested(0.7119, 0.68, 0.7412, 0.0001)
    assert says(won, 0.0004, "ppo", "sft", "vader") == (
        "ppo beats sft on vader: wins 71.2% [68.0, 74.1], p < 0.001 after Holm"
    )
    assert says(mirrored(won), 0.012, "sft", "ppo", "vader") == (
        "sft loses to ppo on vader: wins 28.8% [25.9, 32.0], p = 0.012 after Holm"
    )
    even = Tested(0.51, 0.48, 0.54, 0.3)
    assert says(even, 0.6, "ppo", "simpo", "vader") == (
        "no significant difference between ppo and simpo on vader: wins 51.0% [48.0, 54.0], p = 0.60 after Holm"
    )
    assert says(won, 0.004, "ppo", "sft", "vader").endswith("p = 0.004 after Holm")
    assert says(won, 0.05, "ppo", "sft", "vader").startswith("no significant difference")
    alone = Tested(1.0, math.nan, math.nan, math.nan)
    assert (
        says(alone, math.nan, "ppo", "sft", "vader") == "too few prompts to compare ppo and sft on vader: wins 100.0%"
    )


def test_sentences_about_differences() -> None:
    higher = Tested(0.1234, 0.08, 0.16, 0.0001)
    assert says_difference(higher, 0.02, "ppo", "sft", "vader") == (
        "ppo scores higher than sft on vader: difference +0.123 [+0.08, +0.16], p = 0.020 after Holm"
    )
    lower = Tested(-0.1234, -0.16, -0.08, 0.0001)
    assert says_difference(lower, 0.02, "ppo", "sft", "vader").startswith("ppo scores lower than sft on vader: ")
    assert says_difference(lower, 0.05, "ppo", "sft", "vader") == (
        "no significant difference between ppo and sft on vader: difference -0.123 [-0.16, -0.08], p = 0.050 after Holm"
    )
    alone = Tested(1.0, math.nan, math.nan, math.nan)
    assert says_difference(alone, math.nan, "a", "b", "c") == "too few prompts to compare a and b on c: difference +1"
