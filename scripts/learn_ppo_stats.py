"""Statistics of the learning experiment: intervals over seeds and prompts, order within error, best of n. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.evaluation.measures import Estimate
from pipeline.evaluation.policy_eval import PolicyReport

RESAMPLES = 4000
STUDENT_975 = (
    *(12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814),
    *(2.20099, 2.17881, 2.16037, 2.14479, 2.13145, 2.11991, 2.10982, 2.10092, 2.09302, 2.08596),
    *(2.07961, 2.07387, 2.06866, 2.06390, 2.05954, 2.05553, 2.05183, 2.04841, 2.04523),
)
"""0.975 quantiles of Student's t with 1, 2, ... 29 degrees of freedom."""
ERRORS = 2.0
"""Standard errors that noise may take a difference below zero."""


class Step(NamedTuple):
    """From one setting to the next: the change of a measure, and its standard error."""

    before: str
    after: str
    difference: float
    error: float

    @property
    def rises(self) -> bool:
        """Whether the measure does not fall by more than `ERRORS` standard errors."""
        return self.difference >= -ERRORS * self.error


def hierarchical_bootstrap(differences: Sequence[np.ndarray], seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean over training seeds of their means over prompts, with its 95% percentile interval.

    `differences[s]` [prompts] are the paired differences of training seed s. Each resample draws the training seeds
    with replacement, then the prompts of each drawn one. With few seeds the interval is too narrow where the seeds
    differ much: the plug-in variance between S seeds is (S - 1) / S of the true one; `over_seeds` is not. One prompt of
    one seed has no spread and gives NaN ends. Source: Davison and Hinkley (1997), section 3.8.
    """
    count = len(differences)
    mean = float(np.mean([values.mean() for values in differences]))
    if count == 1 and len(differences[0]) < 2:
        return Estimate(mean, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    drawn = generator.integers(count, size=(resamples, count))
    means = np.empty(drawn.shape)
    for index, values in enumerate(differences):
        size, chosen = len(values), drawn == index
        weights = generator.multinomial(size, np.full(size, 1 / size), size=int(chosen.sum()))
        means[chosen] = weights @ (values - mean) / size  # offsets: a constant has an interval of width zero
    low, high = np.quantile(means.mean(1), (0.025, 0.975))
    return Estimate(mean, mean + float(low), mean + float(high))


def over_seeds(differences: Sequence[np.ndarray]) -> Estimate | None:
    """The same mean with Student's 95% interval over the means of the seeds; None unless there are 2 to 30 seeds.

    mean -+ t s / sqrt(S), s the standard deviation (denominator S - 1) of the S means.
    """
    means = np.array([values.mean() for values in differences])
    count = len(means)
    if not 2 <= count <= len(STUDENT_975) + 1:
        return None
    half = STUDENT_975[count - 2] * float(means.std(ddof=1)) / math.sqrt(count)
    return Estimate(float(means.mean()), float(means.mean()) - half, float(means.mean()) + half)


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean over prompts: standard deviation (denominator n - 1) / sqrt(n)."""
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def steps(measured: Mapping[str, np.ndarray]) -> list[Step]:
    """The change from each setting to the next, paired by prompt: `measured[setting]` [prompts]."""
    pairs = zip(measured, list(measured)[1:], strict=False)
    changes = [(one, other, measured[other] - measured[one]) for one, other in pairs]
    return [Step(one, other, float(change.mean()), standard_error(change)) for one, other, change in changes]


def best_of(scores: Sequence[float], n: int) -> list[int]:
    """Of each `n` consecutive scores the index of the highest, the first of equals. Raises ValueError for a rest."""
    if len(scores) % n:
        raise ValueError(f"{len(scores)} scores are not groups of {n}")
    groups = np.asarray(scores).reshape(-1, n)
    return [int(group * n + place) for group, place in enumerate(groups.argmax(1))]


def best_of_kl_bound(n: int) -> float:
    """log n - (n - 1) / n nats: no best-of-n policy is further from its base. Source: Beirami et al., 2401.01879."""
    return math.log(n) - (n - 1) / n


def per_prompt(report: PolicyReport, name: str) -> np.ndarray:
    """Mean over the samples of each prompt [prompts] of a judge, of `score`, or of `kl`."""
    if name != "kl":
        return np.array(report.per_prompt[name])
    return np.array([row["kl"] for row in report.rows]).reshape(report.prompts, -1).mean(1)
