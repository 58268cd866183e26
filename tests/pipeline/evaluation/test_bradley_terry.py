"""Strengths against hand computation, another algorithm and planted values; coverage is in test_coverage.py."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.bradley_terry import bradley_terry, elo, rank

PLANTED = {"sft": 0.0, "ppo": 1.0, "dpo": 0.6, "kto": -0.5}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def contests(seed: int, seeds: int = 1, prompts: int = 200, samples: int = 1) -> dict[tuple[str, str], np.ndarray]:
    """Outcomes [S,P] of every pair of PLANTED, each sample won with the Bradley-Terry chance."""
    generator = np.random.default_rng(seed)
    return {
        (a, b): (generator.random((seeds, prompts, samples)) < sigmoid(PLANTED[a] - PLANTED[b])).mean(2)
        for a, b in itertools.combinations(PLANTED, 2)
    }


def by_minorisation(wins: np.ndarray) -> np.ndarray:
    """Strengths, the first 0, by Hunter's (2004) MM algorithm: s_i = W_i / sum_j n_ij / (s_i + s_j)."""
    worth = np.ones(len(wins))
    games = wins + wins.T
    for _ in range(20_000):
        before = worth
        worth = wins.sum(1) / (games / (worth[:, None] + worth[None, :])).sum(1)
        worth = worth / worth[0]
        if np.abs(worth - before).max() < 1e-13:
            break
    return np.log(worth)


def test_two_methods_reduce_to_log_odds() -> None:
    wins = np.array([[0.0, 30.0], [10.0, 0.0]])
    assert bradley_terry(wins, baseline=1, prior=0) == pytest.approx([math.log(3), 0], abs=1e-9)
    assert bradley_terry(wins, baseline=1) == pytest.approx([math.log(30.5 / 10.5), 0], abs=1e-9)
    assert bradley_terry(wins) == pytest.approx([0, -math.log(30.5 / 10.5)], abs=1e-9)


def test_exact_shares_give_the_planted_strengths() -> None:
    strengths = np.array([0.0, 1.2, -0.7, 3.0])
    wins = 50 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
    assert bradley_terry(wins, prior=0) == pytest.approx(strengths, abs=1e-8)
    assert bradley_terry(wins, baseline=3, prior=0) == pytest.approx(strengths - 3, abs=1e-8)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_another_algorithm_finds_the_same_in_any_order(seed: int, methods: int) -> None:
    generator = np.random.default_rng(seed)
    wins = generator.integers(0, 20, (methods, methods)) + 0.5
    np.fill_diagonal(wins, math.nan)  # not read
    strengths = bradley_terry(wins, prior=0)
    off = np.where(np.eye(methods) > 0, 0.0, wins)
    assert strengths == pytest.approx(by_minorisation(off), abs=1e-6)
    order = np.concatenate([[0], 1 + generator.permutation(methods - 1)])
    assert bradley_terry(wins[np.ix_(order, order)], prior=0) == pytest.approx(strengths[order], abs=1e-7)


def test_an_unbeaten_method_is_finite_and_more_wins_make_it_stronger() -> None:
    few, many = (bradley_terry(np.array([[0.0, 0.0], [won, 0.0]]))[1] for won in (10.0, 1000.0))
    assert few == pytest.approx(math.log(10.5 / 0.5), abs=1e-9)
    assert many == pytest.approx(math.log(1000.5 / 0.5), abs=1e-9)


def test_pairs_that_never_met_get_no_wins() -> None:
    # 0 meets 1, 1 meets 2: strengths add up along the chain.
    wins = np.array([[0, 3, 0], [9, 0, 2], [0, 8, 0]], dtype=float)
    first = math.log(9.5 / 3.5)
    assert bradley_terry(wins) == pytest.approx([0, first, first + math.log(8.5 / 2.5)], abs=1e-8)


def test_tables_without_finite_strengths_are_refused() -> None:
    with pytest.raises(ValueError, match="no finite strengths"):
        bradley_terry(np.array([[0, 3, 0], [9, 0, 0], [0, 0, 0]], dtype=float))
    for wins in ([[0, 0], [9, 0]], [[0, 9], [0, 0]]):
        with pytest.raises(ValueError, match="no finite strengths"):
            bradley_terry(np.array(wins, dtype=float), prior=0)
    with pytest.raises(ValueError, match="square"):
        bradley_terry(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="square"):
        bradley_terry(np.zeros((0, 0)))
    for wrong in (-1.0, math.inf):
        with pytest.raises(ValueError, match="not negative"):
            bradley_terry(np.array([[0, wrong], [9, 0]]))


def test_elo_of_ten_to_one() -> None:
    assert elo(np.array([0.0, math.log(10), -math.log(10)])) == pytest.approx([1000, 1400, 600])
    assert elo(np.array([0.5, 0.5 + math.log(10)]), baseline=1) == pytest.approx([600, 1000])


def test_planted_strengths_lie_within_their_intervals() -> None:
    ranked = rank(contests(0, seeds=3, samples=2), list(PLANTED), "sft", 0)
    assert [each.method for each in ranked] == ["ppo", "dpo", "sft", "kto"]
    for each in ranked:
        planted = 1000 + 400 * PLANTED[each.method] / math.log(10)
        assert each.low <= planted <= each.high
        assert each.low <= each.elo <= each.high
        assert each.elo == pytest.approx(1000 + 400 * each.strength / math.log(10))
    baseline = next(each for each in ranked if each.method == "sft")
    assert baseline[1:] == (0, 1000, 1000, 1000)


def test_one_sample_without_seeds_is_the_fit_of_its_wins() -> None:
    outcomes = contests(1)
    methods = list(PLANTED)
    wins = np.zeros((4, 4))
    for (a, b), table in outcomes.items():
        wins[methods.index(a), methods.index(b)] = table.sum()
        wins[methods.index(b), methods.index(a)] = (1 - table).sum()
    found = {each.method: each.strength for each in rank(outcomes, methods, "dpo", 0, 99)}
    assert [found[method] for method in methods] == pytest.approx(bradley_terry(wins, baseline=2), abs=1e-8)


def test_two_methods_have_the_log_odds_of_jeffreys_interval() -> None:
    # 45 of 64: the 2.5% and 97.5% points of Beta(45.5, 19.5) are 0.5844 and 0.8044 (numerical integration below).
    ranked = rank({("a", "b"): np.array([[1.0] * 45 + [0.0] * 19])}, ["b", "a"], "b", 0, 4000)
    ends = [sigmoid((value - 1000) * math.log(10) / 400) for value in ranked[0][3:]]
    angles = np.linspace(0, math.pi / 2, 100_001)
    density = np.sin(angles) ** 90 * np.cos(angles) ** 38
    for end, mass in zip(ends, (0.025, 0.975), strict=True):
        inside = angles <= math.asin(math.sqrt(end))
        below = np.trapezoid(density[inside], angles[inside]) / np.trapezoid(density, angles)
        assert abs(below - mass) < 4 * math.sqrt(0.025 * 0.975 / 4000)


def test_order_of_methods_and_pairs_does_not_matter() -> None:
    outcomes = contests(2, seeds=2)
    forward = rank(outcomes, list(PLANTED), "sft", 0, 400)
    flipped = {(b, a): 1 - table for (a, b), table in outcomes.items()}
    backward = rank(flipped, list(PLANTED)[::-1], "sft", 0, 400)
    for one, other in zip(forward, backward, strict=True):
        assert one.method == other.method
        assert one.strength == pytest.approx(other.strength, abs=1e-8)
        assert one[3:] == pytest.approx(other[3:], abs=12)  # half wins are drawn anew


def test_an_unbeaten_method_has_a_finite_interval() -> None:
    first, last = rank({("a", "b"): np.ones((2, 64))}, ["a", "b"], "b", 0)
    assert (first.method, last.method) == ("a", "b")
    assert first.strength == pytest.approx(math.log(64.5 / 0.5))
    assert 1300 < first.low < first.elo < first.high < 4000


def test_seeds_that_differ_widen_the_interval() -> None:
    row = np.repeat([1.0, 0.0], [60, 40])
    same = np.stack([row, np.roll(row, 31), np.roll(row, 62)])
    apart = np.stack([np.repeat([1.0, 0.0], [won, 100 - won]) for won in (40, 60, 80)])
    narrow, wide = (rank({("a", "b"): table}, ["a", "b"], "b", 0)[0] for table in (same, apart))
    assert narrow.elo == wide.elo or abs(narrow.elo - wide.elo) < 2
    assert narrow.high - narrow.low < 120
    # Seeds' log-odds -0.41, 0.41, 1.39 about 0.41: Student's half is 4.30 * 0.2 / sqrt(3) / 0.24 = 2.07, 359 Elo.
    assert 600 < wide.high - wide.low < 900


def test_prompts_that_were_not_judged_do_not_count() -> None:
    outcomes = contests(3, prompts=60)
    pair = ("sft", "ppo")
    missing = outcomes[pair].copy()
    missing[:, 40:] = np.nan
    found = {each.method: each for each in rank({pair: missing}, ["sft", "ppo"], "sft", 0)}
    kept = {each.method: each for each in rank({pair: missing[:, :40]}, ["sft", "ppo"], "sft", 0)}
    assert found["ppo"].strength == pytest.approx(kept["ppo"].strength, abs=1e-9)
    assert found["ppo"].high - found["ppo"].low == pytest.approx(kept["ppo"].high - kept["ppo"].low, rel=0.1)
    differing = np.stack([np.repeat([1.0, 0.0], [won, 40 - won]) for won in (16, 24, 32)])
    padded = np.concatenate([differing, np.full((3, 120), np.nan)], axis=1)
    wide, same = (rank({pair: table}, ["sft", "ppo"], "sft", 0)[1] for table in (differing, padded))
    assert wide.method == "ppo"
    assert same.high - same.low == pytest.approx(wide.high - wide.low, rel=0.1)


def test_one_prompt_has_no_interval() -> None:
    first, baseline = rank({("a", "b"): np.array([[1.0]])}, ["a", "b"], "b", 0)
    assert baseline == ("b", 0, 1000, 1000, 1000)
    assert first.strength == pytest.approx(math.log(3))
    assert math.isnan(first.low)
    assert math.isnan(first.high)


def test_unusable_outcomes_are_refused() -> None:
    one = np.array([[1.0, 0.0]])
    with pytest.raises(ValueError, match="both orders"):
        rank({("a", "b"): one, ("b", "a"): 1 - one}, ["a", "b"], "a", 0)
    with pytest.raises(ValueError, match="a against c: not two of the methods a, b"):
        rank({("a", "c"): one}, ["a", "b"], "a", 0)
    with pytest.raises(ValueError, match="a against a: not two"):
        rank({("a", "a"): one}, ["a", "b"], "a", 0)
    with pytest.raises(ValueError, match="same seeds x prompts"):
        rank({("a", "b"): one, ("a", "c"): np.zeros((1, 3))}, ["a", "b", "c"], "a", 0)
    with pytest.raises(ValueError, match="same seeds x prompts"):
        rank({}, ["a", "b"], "a", 0)
    for wrong in (-0.5, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            rank({("a", "b"): np.array([[1.0, wrong]])}, ["a", "b"], "a", 0)
    for wrong in (np.array([[1.0, math.nan], [1.0, 0.5]]), np.full((1, 2), math.nan)):
        with pytest.raises(ValueError, match="some seeds only, or none"):
            rank({("a", "b"): wrong}, ["a", "b"], "a", 0)
    with pytest.raises(ValueError, match="no finite strengths"):
        rank({("a", "b"): one}, ["a", "b", "c"], "a", 0)
