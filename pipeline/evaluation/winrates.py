"""Who wins: outcomes from scores, win rates with intervals, and the sentences that say it. Pure; numpy only."""

from __future__ import annotations

import math

import numpy as np

from pipeline.evaluation.intervals import (
    LEVEL,
    RESAMPLES,
    Tested,
    as_table,
    bernoulli_share,
    from_draws,
    prompt_draws,
    seed_error,
    student_draws,
)

EVEN = 0.5


def outcomes(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Share [S,P] of the K x L sample pairs of a prompt whose score is higher for `ours` [S,P,K] than `theirs` [S,P,L].

    A tie counts half. Every sample of ours meets every sample of theirs under the same training seed and prompt: the
    Mann-Whitney statistic of the prompt over K L. Raises ValueError when seeds or prompts differ, a prompt has no
    sample, or a score is not finite.
    """
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if ours.ndim != 3 or ours.shape[:2] != theirs.shape[:2] or theirs.ndim != 3 or not ours.size or not theirs.size:
        raise ValueError(f"needs scores of seeds x prompts x samples, not {ours.shape} against {theirs.shape}")
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise ValueError("a score is not finite")
    differences = ours[:, :, :, None] - theirs[:, :, None, :]
    return ((differences > 0) + EVEN * (differences == 0)).mean((2, 3))


def win_rate(outcome: np.ndarray, seed: int, resamples: int = RESAMPLES) -> Tested:
    """Win rate of `outcome` [S,P] (0 lost, 1 won, between: ties or several samples), tested against one half.

    The interval of `crossed_interval`, kept within 0..1, with half a won and half a lost prompt among the resampled
    ones: for one seed and plain wins and losses it is Jeffreys' interval (Brown, Cai and DasGupta 2001, Statistical
    Science 16), which stays honest near 0 and 1, where resampling alone sees no spread; at a rate of exactly 0 or 1 it
    is that of P wins or losses. The halves shrink with the spread of the prompts' outcomes (`bernoulli_share`), so
    that means over many samples are not pulled to one half. The rate itself is the plain mean.

    Coverage: see `crossed_interval`, whose measurements are of this function. Raises ValueError as
    `crossed_interval`, and for an outcome outside 0..1.
    """
    outcome = as_table(outcome)
    if outcome.min() < 0 or outcome.max() > 1:
        raise ValueError(f"outcomes lie between 0 and 1, not {outcome.min()} and {outcome.max()}")
    rate = float(outcome.mean())
    seeds, prompts = outcome.shape
    if prompts < 2:
        return Tested(rate, math.nan, math.nan, math.nan)
    share = bernoulli_share(outcome)
    generator = np.random.default_rng((seed, 2))
    weight = generator.beta(share, prompts, resamples)
    added = generator.beta(share / 2, share / 2, resamples)
    draws = (1 - weight) * (rate + prompt_draws(outcome.mean(0) - rate, seed, resamples)) + weight * added
    tested = from_draws(rate, draws + seed_error(outcome) * student_draws(seeds, seed, resamples), EVEN)
    return tested._replace(low=max(0.0, min(rate, tested.low)), high=min(1.0, max(rate, tested.high)))


def mirrored(tested: Tested) -> Tested:
    """The same win rate seen from the other side: 1 - mean, 1 - high, 1 - low, the same p-value."""
    return Tested(1 - tested.mean, 1 - tested.high, 1 - tested.low, tested.p)


def says(tested: Tested, adjusted_p: float, subject: str, other: str, what: str) -> str:
    """One sentence about a win rate of `subject` against `other` on judge `what`; `adjusted_p` is Holm's.

    A winner is named only where the adjusted p-value is below 0.05.
    """
    rate = _percent(tested.mean)
    if math.isnan(adjusted_p):
        return f"too few prompts to compare {subject} and {other} on {what}: wins {rate}%"
    figures = f"wins {rate}% [{_percent(tested.low)}, {_percent(tested.high)}], {_p(adjusted_p)} after Holm"
    if adjusted_p >= LEVEL:
        return f"no significant difference between {subject} and {other} on {what}: {figures}"
    verb = "beats" if tested.mean > EVEN else "loses to"
    return f"{subject} {verb} {other} on {what}: {figures}"


def says_difference(tested: Tested, adjusted_p: float, subject: str, other: str, what: str) -> str:
    """One sentence about the mean score of `subject` minus that of `other` on judge `what`; as `says`."""
    mean = f"difference {tested.mean:+.3g}"
    if math.isnan(adjusted_p):
        return f"too few prompts to compare {subject} and {other} on {what}: {mean}"
    figures = f"{mean} [{tested.low:+.3g}, {tested.high:+.3g}], {_p(adjusted_p)} after Holm"
    if adjusted_p >= LEVEL:
        return f"no significant difference between {subject} and {other} on {what}: {figures}"
    verb = "scores higher than" if tested.mean > 0 else "scores lower than"
    return f"{subject} {verb} {other} on {what}: {figures}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _p(p: float) -> str:
    """Rounded so that nothing crosses 0.05: two digits from 0.1, else three."""
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.2f}" if p >= 0.1 else f"p = {p:.3f}"
