"""Length-controlled win rates: the regression of AlpacaEval 2. Pure; numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.evaluation.intervals import bernoulli_share, prompt_weights, seed_error, student_draws
from pipeline.evaluation.measures import Estimate

RIDGE = 1e-3
"""Weight of half the squared coefficients, beside the summed log-loss of the preferences."""
RESAMPLES = 999
_NUMBERS_AT_ONCE = 1_000_000
_STEPS = 200
_LARGEST_STEP = 2.0
_CONVERGED = 1e-9


class LengthControlled(NamedTuple):
    """Win rate at equal length, and the coefficients: constant, length term, difficulty (0 without)."""

    rate: float
    theta: float
    phi: float
    psi: float = 0.0


@dataclass(frozen=True)
class _Rows:
    """Features [N,3] (1, length term, difficulty), preferences [N], difficulty [N]."""

    features: np.ndarray
    preferences: np.ndarray
    difficulty: np.ndarray


def length_controlled(
    preferences: np.ndarray,
    length_differences: np.ndarray,
    difficulty: np.ndarray | None = None,
    ridge: float = RIDGE,
) -> LengthControlled:
    """Win rate that a judge would give at equal length, from N `preferences` (1 ours, 0 theirs, between: ties, shares).

    P(ours) = sigmoid(theta + phi tanh(d / std(d)) + psi difficulty), d [N] the lengths of ours minus theirs in
    characters, std with denominator N - 1; the coefficients minimise the summed log-loss against the preferences as
    soft labels plus ridge / 2 of their squares; the rate is the mean over the rows of P without the length term. Equal
    differences have no length term (phi is 0). Where all preferences are 1 or 0, or the length decides each, the
    likelihood has no maximum and the ridge ends the climb: the rate comes within 0.001 of 1 or 0 for the first, and for
    the second lies where the curve through the rows crosses equal length, which means little if no row is near it.

    Source: Dubois et al. (2024), arXiv 2404.04475, section 3, and github.com/tatsu-lab/alpaca_eval at
    cd543a1, metrics/glm_winrate.py. What differs there: an L1 penalty chosen by cross-validation, rows of two models
    that game the length added at weight 0.1 each, and a difficulty estimated over a leaderboard of models; here the
    ridge is fixed and small, and difficulty [N] is the caller's or left out ("length_controlled_minimal" there).

    Raises ValueError when there are no rows, lengths of the arguments differ, a number is not finite, a preference is
    outside 0..1, or the ridge is not above 0.
    """
    if ridge <= 0:
        raise ValueError(f"the ridge is above 0, not {ridge}")
    rows = _rows(preferences, length_differences, difficulty)
    ones = np.ones((1, len(rows.preferences)))
    found = _fit(rows, ones, np.zeros((1, 3)), ridge)
    return LengthControlled(float(_rate(rows, ones, found)[0]), *(float(value) for value in found[0]))


def length_controlled_interval(
    preferences: np.ndarray,
    length_differences: np.ndarray,
    seed: int,
    difficulty: np.ndarray | None = None,
    resamples: int = RESAMPLES,
) -> Estimate:
    """The rate of `length_controlled` with its 95% interval, for tables [S,P] or [S,P,K] of seeds, prompts, samples.

    The regression is fitted again for each resample of `crossed_interval`: prompts keep their rows of all seeds
    together, and Student's t is added for what seeds differ in the rate's influence values (Davison and Hinkley 1997,
    section 2.7). Half a won and half a lost row of equal length join each resample as in `win_rate`, so that a rate of
    1 or 0 has an interval. Lengths are scaled once, by all rows. NaN ends with one prompt. Raises ValueError as
    `length_controlled`, or when the tables have no prompts.
    """
    preferences = np.asarray(preferences, dtype=float)
    if preferences.ndim not in (2, 3):
        raise ValueError(f"needs preferences of seeds x prompts (x samples), not of shape {preferences.shape}")
    rows = _rows(preferences, length_differences, difficulty)
    seeds, prompts = preferences.shape[:2]
    ones = np.ones((1, preferences.size))
    found = _fit(rows, ones, np.zeros((1, 3)), RIDGE)
    rate = float(_rate(rows, ones, found)[0])
    if prompts < 2:
        return Estimate(rate, math.nan, math.nan)
    share = bernoulli_share(preferences.reshape(seeds, prompts, -1).mean(2)) / 2
    each = preferences.size // prompts
    generator = np.random.default_rng((seed, 2))
    padded = _padded(rows)
    draws = []
    for weights in prompt_weights(prompts, seed, resamples, _NUMBERS_AT_ONCE // each):
        spread = np.broadcast_to(
            weights[:, None, :, None] * prompts, (len(weights), seeds, prompts, each // seeds)
        ).reshape(len(weights), -1)
        added = generator.standard_gamma(share, (len(weights), 2)) * each
        all_weights = np.concatenate([spread, added], axis=1)
        draws.append(_rate(padded, all_weights, _fit(padded, all_weights, found, RIDGE)))
    influence = _influence(rows, found).reshape(seeds, prompts, -1).mean(2)
    moved = np.concatenate(draws) + seed_error(influence) * student_draws(seeds, seed, resamples)
    low, high = np.quantile(moved, (0.025, 0.975))
    return Estimate(rate, max(0.0, min(rate, float(low))), min(1.0, max(rate, float(high))))


def _rows(preferences: np.ndarray, differences: np.ndarray, difficulty: np.ndarray | None) -> _Rows:
    wanted, lengths = (np.asarray(values, dtype=float) for values in (preferences, differences))
    hard = np.zeros_like(wanted) if difficulty is None else np.asarray(difficulty, dtype=float)
    if not wanted.size or not wanted.shape == lengths.shape == hard.shape:
        raise ValueError(f"{wanted.shape} preferences, {lengths.shape} length differences, {hard.shape} difficulties")
    if not (np.isfinite(wanted).all() and np.isfinite(lengths).all() and np.isfinite(hard).all()):
        raise ValueError("a preference, length difference or difficulty is not finite")
    if wanted.min() < 0 or wanted.max() > 1:
        raise ValueError(f"preferences lie between 0 and 1, not {wanted.min()} and {wanted.max()}")
    wanted, lengths, hard = wanted.ravel(), lengths.ravel(), hard.ravel()
    term = np.tanh(lengths / lengths.std(ddof=1)) if np.ptp(lengths) > 0 else np.zeros_like(lengths)
    return _Rows(np.stack([np.ones_like(term), term, hard], axis=1), wanted, hard)


def _padded(rows: _Rows) -> _Rows:
    """With a won and a lost row of equal length and mean difficulty behind the others."""
    hard = np.full(2, rows.difficulty.mean())
    added = np.stack([np.ones(2), np.zeros(2), hard], axis=1)
    return _Rows(
        np.concatenate([rows.features, added]),
        np.concatenate([rows.preferences, [1.0, 0.0]]),
        np.concatenate([rows.difficulty, hard]),
    )


def _fit(rows: _Rows, weights: np.ndarray, start: np.ndarray, ridge: float) -> np.ndarray:
    """Coefficients [R,3] of the least penalised log-loss under each row of `weights` [R,N], by Newton's method.

    Steps are cut to 2 in the largest coefficient, which keeps Newton's method on a logistic likelihood from
    overshooting. Raises ArithmeticError when a fit has not converged in 200 steps.
    """
    width = rows.features.shape[1]
    products = (rows.features[:, :, None] * rows.features[:, None, :]).reshape(-1, width * width)
    found = np.repeat(start, len(weights) // len(start), axis=0)
    for _ in range(_STEPS):
        chance = _sigmoid(found @ rows.features.T)
        slope = (weights * (rows.preferences - chance)) @ rows.features - ridge * found
        curvature = ((weights * chance * (1 - chance)) @ products).reshape(-1, width, width) + ridge * np.eye(width)
        step = np.linalg.solve(curvature, slope[:, :, None])[:, :, 0]
        largest = np.abs(step).max(1, keepdims=True)
        found = found + step * np.minimum(1.0, _LARGEST_STEP / np.maximum(largest, _CONVERGED))
        if largest.max() < _CONVERGED:
            return found
    raise ArithmeticError(f"the length regression did not converge in {_STEPS} steps")


def _rate(rows: _Rows, weights: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Weighted mean over the rows of the chance to win without the length term, [R]."""
    equal = _sigmoid(found[:, :1] + found[:, 2:] * rows.difficulty)
    return (weights * equal).sum(1) / weights.sum(1)


def _influence(rows: _Rows, found: np.ndarray) -> np.ndarray:
    """First-order change [N] of the rate per unit of a row's weight, times N: its mean is 0 up to the ridge.

    Without the share of a prompt's difficulty, which is the same for all seeds.
    """
    count = len(rows.preferences)
    chance = _sigmoid(rows.features @ found[0])
    equal = _sigmoid(found[0, 0] + found[0, 2] * rows.difficulty)
    curvature = (rows.features * (chance * (1 - chance))[:, None]).T @ rows.features + RIDGE * np.eye(3)
    no_length = rows.features * np.array([1.0, 0.0, 1.0])
    towards = (equal * (1 - equal)) @ no_length / count
    moves = rows.features * (rows.preferences - chance)[:, None] @ np.linalg.solve(curvature, towards)
    return count * moves


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))
