"""How often the 95% intervals hold the truth: simulated judges with planted rates and strengths.

Every number is deterministic. With n simulations a coverage of 95% is measured to sqrt(0.95 * 0.05 / n): 0.7% for 1000.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from pipeline.evaluation.bradley_terry import rank
from pipeline.evaluation.intervals import crossed_interval
from pipeline.evaluation.length_control import length_controlled_interval
from pipeline.evaluation.winrates import outcomes, win_rate

RATES = (0.5, 0.6, 0.9)
EACH = 300
"""Simulations of each rate, half of them with ties."""
RESAMPLES = 400
"""Of 401 places the ends leave out 10 on each side: 2.494%."""
LOWEST, HIGHEST = 0.92, 0.98


def rates_of_seeds(generator: np.random.Generator, effect: str, shape: tuple[int, int], rate: float) -> np.ndarray:
    """True rates [S] of seeds: normal about `rate`, with 1 or 4 times the error of a seed's mean as deviation.

    At most half of what is left to 0 or 1, and cut evenly there, so that the mean stays `rate`.
    """
    seeds, prompts = shape
    spread = {"moderate": 1, "strong": 4}.get(effect, 0) * math.sqrt(rate * (1 - rate) / prompts)
    room = min(rate, 1 - rate)
    moves = generator.normal(0, 1, 100) * min(spread, room / 2)
    return rate + moves[np.abs(moves) <= room][:seeds]


def judged(generator: np.random.Generator, effect: str, shape: tuple[int, int], rate: float, ties: float) -> np.ndarray:
    """Outcomes [S,P] of a judge whose true win rate is `rate`; `ties` of what could be a tie is one."""
    chances = np.repeat(rates_of_seeds(generator, effect, shape, rate)[:, None], shape[1], axis=1)
    if effect == "prompts":
        chances = chances + 0.9 * min(rate, 1 - rate) * generator.uniform(-1, 1, (1, shape[1]))
    tie = 2 * ties * np.minimum(chances, 1 - chances)
    drawn = generator.random(shape)
    return np.where(drawn < tie, 0.5, (drawn < chances + tie / 2) * 1.0)


CASES = [
    (seeds, prompts, effect)
    for seeds, effects in ((1, ("none", "prompts")), (3, ("none", "prompts", "moderate", "strong")))
    for prompts in (64, 256)
    for effect in effects
]


@pytest.fixture(scope="module")
def held() -> dict[tuple[int, int, str, float], float]:
    """Share of the simulations whose interval holds the true rate."""
    shares = {}
    for index, (case, rate) in enumerate(itertools.product(CASES, RATES)):
        generator = np.random.default_rng((11, index))
        hits = 0
        for number in range(EACH):
            table = judged(generator, case[2], case[:2], rate, 0.5 * (number % 2))
            tested = win_rate(table, number, RESAMPLES)
            hits += tested.low <= rate <= tested.high
        shares[*case, rate] = hits / EACH
    return shares


@pytest.mark.parametrize("case", CASES)
def test_win_rates_are_covered(case: tuple[int, int, str], held: dict[tuple[int, int, str, float], float]) -> None:
    measured = float(np.mean([held[*case, rate] for rate in RATES]))
    assert LOWEST <= measured <= HIGHEST


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("seeds", [1, 3])
def test_every_rate_is_covered(seeds: int, rate: float, held: dict[tuple[int, int, str, float], float]) -> None:
    measured = [share for case, share in held.items() if (case[0], case[3]) == (seeds, rate)]
    assert LOWEST <= float(np.mean(measured)) <= HIGHEST


def test_rates_from_scores_of_several_samples_are_covered() -> None:
    # Ours wins where its score is above: normal scores whose difference is above 0 with the planted chance; prompts
    # shift both alike, so that they do not change who wins.
    generator = np.random.default_rng(17)
    hits = 0
    for number in range(2 * EACH):
        rate, quantile = ((0.5, 0.0), (0.6, 0.2533471), (0.9, 1.2815516))[number % 3]
        prompt = generator.normal(0, 3, (1, 64, 1))
        ours = prompt + generator.normal(quantile * math.sqrt(2), 1, (3, 64, 4))
        theirs = prompt + generator.normal(0, 1, (3, 64, 4))
        tested = win_rate(outcomes(ours, theirs), number, RESAMPLES)
        hits += tested.low <= rate <= tested.high
    assert LOWEST <= hits / (2 * EACH) <= HIGHEST


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("prompts", [64, 256])
def test_mean_differences_are_covered(prompts: int, spread: float) -> None:
    generator = np.random.default_rng(19)
    hits = 0
    for number in range(2 * EACH):
        seeds = generator.normal(0, spread / math.sqrt(prompts), (3, 1))
        values = 0.3 + seeds + generator.normal(0, 0.7, (1, prompts)) + generator.normal(0, 1, (3, prompts))
        tested = crossed_interval(values, number, 0.3, RESAMPLES)
        hits += tested.low <= 0.3 <= tested.high
        assert (tested.p >= 0.05) == (tested.low <= 0.3 <= tested.high)
    assert LOWEST <= hits / (2 * EACH) <= HIGHEST


@pytest.mark.parametrize("spread", [0.0, 0.4])
def test_length_controlled_rates_are_covered(spread: float) -> None:
    # A judge that likes length (phi 1.5, ours longer by one deviation); at equal length the odds are e^0.5 to 1.
    generator = np.random.default_rng(23)
    truth = 0.6224593 if not spread else float(np.mean(1 / (1 + np.exp(-0.5 - generator.normal(0, spread, 100_000)))))
    hits = 0
    for number in range(EACH):
        lengths = generator.normal(1, 1, (3, 100))
        seeds = generator.normal(0, spread, (3, 1))
        logits = 0.5 + seeds + 1.5 * np.tanh(lengths / lengths.std(ddof=1))
        preferences = (generator.random((3, 100)) < 1 / (1 + np.exp(-logits))) * 1.0
        estimate = length_controlled_interval(preferences, lengths, number, resamples=199)
        hits += estimate.low <= truth <= estimate.high
    assert LOWEST <= hits / EACH <= HIGHEST


@pytest.mark.parametrize("spread", [0.0, 0.8])
def test_elo_is_covered(spread: float) -> None:
    generator = np.random.default_rng(29)
    planted = np.array([0.0, 0.4, 1.2])
    hits = np.zeros(3)
    for number in range(EACH):
        strengths = planted + generator.normal(0, spread, (3, 3))
        tables = {}
        for a, b in itertools.combinations(range(3), 2):
            chances = 1 / (1 + np.exp(strengths[:, b] - strengths[:, a]))
            tables[str(a), str(b)] = (generator.random((3, 64)) < chances[:, None]) * 1.0
        for each in rank(tables, ["0", "1", "2"], "0", number, 199):
            place = int(each.method)
            hits[place] += each.low <= 1000 + 400 / math.log(10) * planted[place] <= each.high
    assert hits[0] == EACH  # the baseline
    assert LOWEST <= hits[1] / EACH <= HIGHEST
    assert LOWEST <= hits[2] / EACH <= HIGHEST
