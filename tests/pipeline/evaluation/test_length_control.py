"""The AlpacaEval 2 regression against a closed form, another optimiser and planted biases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.length_control import length_controlled, length_controlled_interval
from pipeline.evaluation.winrates import win_rate

LONGER, SHORTER = 40.0, -40.0


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def by_gradient_descent(features: np.ndarray, preferences: np.ndarray, ridge: float) -> np.ndarray:
    """Coefficients of the least penalised log-loss; the step is one over a bound of the curvature."""
    found = np.zeros(features.shape[1])
    step = 1 / (0.25 * float((features**2).sum()) + ridge)
    for _ in range(100_000):
        slope = features.T @ (sigmoid(features @ found) - preferences) + ridge * found
        if np.abs(slope).max() < 1e-9:
            return found
        found = found - step * slope
    raise AssertionError("no convergence")


def test_two_lengths_by_hand() -> None:
    # Half the answers 40 characters longer and preferred at 0.9 (odds 9), half 40 shorter at 0.5 (odds 1): two
    # equations theta +- phi t = log 9, log 1, so theta = log(9) / 2, odds 3 at equal length: 3/4. Their std is
    # 40 sqrt(10 / 9).
    lengths = np.array([LONGER, SHORTER] * 5)
    preferences = np.array([0.9, 0.5] * 5)
    found = length_controlled(preferences, lengths, ridge=1e-10)
    term = math.tanh(1 / math.sqrt(10 / 9))
    assert found.rate == pytest.approx(0.75, abs=1e-9)
    assert found.theta == pytest.approx(math.log(9) / 2, abs=1e-9)
    assert found.phi == pytest.approx(math.log(9) / 2 / term, abs=1e-9)
    assert found.psi == 0
    assert preferences.mean() == pytest.approx(0.7)
    assert length_controlled(preferences, lengths).rate == pytest.approx(0.75, abs=1e-3)


def test_difficulty_by_hand() -> None:
    # Equal lengths; difficulty 1 and -1 with odds 4 and 1: theta = psi = log(4) / 2, rate the mean of 4/5 and 1/2.
    found = length_controlled(np.array([0.5, 0.8]), np.zeros(2), np.array([-1.0, 1.0]), ridge=1e-10)
    assert found == pytest.approx((0.65, math.log(4) / 2, 0, math.log(4) / 2), abs=1e-9)


@pytest.mark.parametrize("ridge", [1e-3, 2.0])
def test_gradient_descent_finds_the_same(ridge: float) -> None:
    generator = np.random.default_rng(0)
    lengths, difficulty = generator.normal(30, 90, 25), generator.normal(size=25)
    preferences = generator.random(25)
    term = np.tanh(lengths / np.std(lengths, ddof=1))
    features = np.stack([np.ones(25), term, difficulty], axis=1)
    expected = by_gradient_descent(features, preferences, ridge)
    found = length_controlled(preferences, lengths, difficulty, ridge)
    assert found[1:] == pytest.approx(expected, abs=1e-6)
    assert found.rate == pytest.approx(sigmoid(expected[0] + expected[2] * difficulty).mean(), abs=1e-6)


def test_a_judge_of_length_alone_sees_no_winner() -> None:
    # Longer in 900 of 1000 answers, and the judge takes the longer one in 7 of 8 cases: raw 0.79.
    generator = np.random.default_rng(1)
    lengths = np.where(generator.random(1000) < 0.9, 1, -1) * generator.uniform(50, 150, 1000)
    preferences = ((generator.random(1000) < 7 / 8) == (lengths > 0)) * 1.0
    estimate = length_controlled_interval(preferences[None], lengths[None], 0)
    assert 0.77 < preferences.mean() < 0.83
    assert estimate.low < 0.5 < estimate.high
    assert abs(estimate.mean - 0.5) < 0.1


def test_a_judge_that_always_takes_the_longer_answer_sees_no_winner() -> None:
    # The preferences follow the sign of the length difference without exception; the closest two rows are at -+1.
    lengths = np.concatenate([np.arange(1.0, 81.0), -np.arange(1.0, 21.0)])
    preferences = (lengths > 0) * 1.0
    assert preferences.mean() == 0.8
    found = length_controlled(preferences, lengths)
    assert abs(found.rate - 0.5) < 0.06
    assert found.phi > 20


def test_a_judge_that_does_not_mind_length_keeps_its_rate() -> None:
    preferences = np.array([1, 1, 1, 0, 0.5] * 2)
    lengths = np.array([LONGER, SHORTER])[[0] * 5 + [1] * 5]
    found = length_controlled(preferences, lengths)
    assert found.rate == pytest.approx(0.7, abs=1e-3)
    assert found.phi == pytest.approx(0, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_the_other_side_wins_the_rest(seed: int) -> None:
    generator = np.random.default_rng(seed)
    preferences, lengths, difficulty = generator.random(12), generator.normal(size=12), generator.normal(size=12)
    ours = length_controlled(preferences, lengths, difficulty)
    theirs = length_controlled(1 - preferences, -lengths, -difficulty)
    assert theirs == pytest.approx((1 - ours.rate, -ours.theta, ours.phi, ours.psi), abs=1e-6)
    order = generator.permutation(12)
    assert length_controlled(preferences[order], lengths[order], difficulty[order]) == pytest.approx(ours, abs=1e-6)


@pytest.mark.parametrize(("share", "rate"), [(1.0, 1.0), (0.0, 0.0), (0.5, 0.5), (0.7, 0.7)])
def test_equal_preferences_give_their_value(share: float, rate: float) -> None:
    lengths = np.random.default_rng(2).normal(size=64)
    assert length_controlled(np.full(64, share), lengths).rate == pytest.approx(rate, abs=1e-3)


def test_equal_lengths_have_no_length_term() -> None:
    found = length_controlled(np.array([1.0, 0.0, 1.0, 1.0]), np.full(4, 17.0))
    assert found.rate == pytest.approx(0.75, abs=1e-3)
    assert found.phi == 0
    assert length_controlled(np.array([0.5]), np.array([3.0])).rate == pytest.approx(0.5)


def test_equal_lengths_have_the_interval_of_the_win_rate() -> None:
    outcome = (np.random.default_rng(3).random((3, 60)) < [[0.5], [0.7], [0.9]]) * 1.0
    controlled = length_controlled_interval(outcome, np.zeros((3, 60)), 4, resamples=4000)
    plain = win_rate(outcome, 4, 4000)
    assert controlled.mean == pytest.approx(plain.mean, abs=1e-3)
    # The same weights and Student draws; the half wins are drawn in another way.
    assert controlled[1:] == pytest.approx(plain[1:3], abs=0.02)
    sure = length_controlled_interval(np.ones((1, 64)), np.zeros((1, 64)), 0, resamples=4000)
    assert sure.low == pytest.approx(win_rate(np.ones((1, 64)), 0, 4000).low, abs=0.01)


def test_samples_of_a_prompt_stay_together() -> None:
    generator = np.random.default_rng(5)
    preferences, lengths = generator.random((2, 30)), generator.normal(size=(2, 30))
    once = length_controlled_interval(preferences, lengths, 1, resamples=200)
    # Four copies of each answer: the same but for the denominator of std and the weight of the ridge.
    copied, lengthened = (np.repeat(values[:, :, None], 4, axis=2) for values in (preferences, lengths))
    again = length_controlled_interval(copied, lengthened, 1, resamples=200)
    assert again.high - again.low > 0.8 * (once.high - once.low)
    assert again.mean == pytest.approx(once.mean, abs=5e-3)


def test_the_half_wins_weigh_half_a_prompt_whatever_the_samples() -> None:
    one, four = (length_controlled_interval(np.ones((1, 64, k)), np.zeros((1, 64, k)), 0).low for k in (1, 4))
    assert four == pytest.approx(one, abs=2e-3)


def test_seeds_that_differ_widen_the_interval() -> None:
    generator = np.random.default_rng(6)
    lengths = generator.normal(size=(3, 80))
    rates = np.array([[0.3], [0.5], [0.7]])
    apart = (generator.random((3, 80)) < rates) * 1.0
    same = (generator.random((3, 80)) < 0.5) * 1.0
    wide, narrow = (length_controlled_interval(values, lengths, 0) for values in (apart, same))
    assert wide.high - wide.low > 0.5
    assert narrow.high - narrow.low < 0.25


def test_difficulty_reaches_the_interval() -> None:
    generator = np.random.default_rng(7)
    difficulty = generator.normal(size=(1, 200))
    preferences = sigmoid(2 * difficulty + 0.5)
    found = length_controlled(preferences, np.zeros((1, 200)), difficulty)
    estimate = length_controlled_interval(preferences, np.zeros((1, 200)), 0, difficulty)
    assert estimate.mean == found.rate
    assert estimate.low < found.rate < estimate.high
    # The judge is all difficulty: what is left is the spread of the prompts' difficulties.
    expected = 2 * 1.96 * preferences.std() / math.sqrt(200)
    assert estimate.high - estimate.low == pytest.approx(expected, rel=0.2)


def test_the_interval_is_the_same_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(8)
    preferences, lengths = generator.random((2, 20, 2)), generator.normal(size=(2, 20, 2))
    whole = length_controlled_interval(preferences, lengths, 0, resamples=100)
    monkeypatch.setattr("pipeline.evaluation.length_control._NUMBERS_AT_ONCE", 1000)
    assert length_controlled_interval(preferences, lengths, 0, resamples=100) == pytest.approx(whole, abs=1e-9)


def test_one_prompt_has_no_interval() -> None:
    estimate = length_controlled_interval(np.array([[1.0], [0.0]]), np.array([[3.0], [4.0]]), 0)
    assert not math.isnan(estimate.mean)
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)


def test_unusable_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="3,\\) length"):
        length_controlled(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="3,\\) difficulties"):
        length_controlled(np.zeros(2), np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="preferences"):
        length_controlled(np.zeros(0), np.zeros(0))
    for place in range(3):
        rows = [np.full(2, 0.5), np.zeros(2), np.zeros(2)]
        rows[place][0] = math.nan
        with pytest.raises(ValueError, match="not finite"):
            length_controlled(*rows)
    with pytest.raises(ValueError, match="ridge"):
        length_controlled(np.zeros(2), np.zeros(2), ridge=0)
    for wrong in (-0.5, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            length_controlled(np.array([wrong, 0.5]), np.zeros(2))
    with pytest.raises(ValueError, match="seeds x prompts"):
        length_controlled_interval(np.zeros(2), np.zeros(2), 0)
