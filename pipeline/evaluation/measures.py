"""Statistics of an evaluation: intervals, differences, diversity, lengths. Pure; numpy, and sacrebleu's BLEU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")
Gram = tuple[str, ...]

_WEIGHTS_AT_ONCE = 4_000_000
"""Resampling weights held in memory at a time (8 bytes each)."""


class Estimate(NamedTuple):
    """A mean with the ends of its 95% interval; the ends are NaN where no interval exists."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LengthStats:
    """Response lengths in tokens, the EOS included."""

    mean: float
    median: float
    p95: float
    minimum: int
    maximum: int


def wilson_interval(k: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return the Wilson score interval of the proportion of `k` successes in `n` trials.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with p = k/n; the default z gives 95%.
    Source: Wilson (1927), JASA 22. Raises ValueError unless 0 <= k <= n and n >= 1.
    """
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"a proportion needs 0 <= k <= n and n >= 1, not k={k}, n={n}")
    share = k / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def prompt_means(values_per_prompt: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the mean over the samples of each prompt, float64 [prompts].

    Raises ValueError when there is no prompt, or a prompt without a sample.
    """
    if not values_per_prompt:
        raise ValueError("no prompts to average over")
    for index, values in enumerate(values_per_prompt):
        if not len(values):
            raise ValueError(f"prompt {index} has no samples")
    return np.array([math.fsum(values) / len(values) for values in values_per_prompt])


def bootstrap_interval(values_per_prompt: Sequence[Sequence[float]], seed: int, resamples: int = 2000) -> Estimate:
    """Return the mean over prompts of their sample means, with its 95% bootstrap interval.

    The ends are percentiles. Prompts are resampled with their samples kept together, because
    samples of one prompt are not independent. The interval depends on the values and `seed` alone.
    With one prompt the ends are NaN. Source: Efron and Tibshirani (1993), chapter 13. Raises
    ValueError as `prompt_means`.
    """
    return _bootstrap(prompt_means(values_per_prompt), seed, resamples)


def paired_bootstrap(
    before: Sequence[Sequence[float]],
    after: Sequence[Sequence[float]],
    seed: int,
    resamples: int = 2000,
) -> Estimate:
    """Return the mean of after - before over the same prompts, with its 95% interval.

    Row i of both belongs to the same prompt; the numbers of samples may differ. Resampling the
    per-prompt differences removes the spread between prompts that both policies share. Raises
    ValueError as `prompt_means` and when the numbers of prompts differ.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} prompts before against {len(after)} after")
    return _bootstrap(prompt_means(after) - prompt_means(before), seed, resamples)


def distinct_n(token_sequences: Sequence[Sequence[int]], n: int) -> float:
    """Return the number of different n-grams over the number of n-grams, pooled over all sequences.

    1 means that nothing repeats; 0 when no sequence has n tokens. Falls with the number of
    sequences, so compare equal numbers only. Source: Li et al. (2016), arXiv 1510.03055, section
    5.1.
    """
    grams = [gram for sequence in token_sequences for gram in _ngrams(sequence, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """Return the mean over texts of the BLEU of each against all others, 0 to 100; high means that they are alike.

    BLEU-4 of sacrebleu's sentence level: words of its `13a` tokenisation with their case, precisions clipped by the
    greatest count in any one other text, the closest other length for the brevity penalty, exponential smoothing,
    orders up to the text's own length (`nrefs:var|case:mixed|eff:yes|tok:13a|smooth:exp`). An empty text scores
    0. Rises with the number of texts, so compare equal numbers only. Source: Zhu et al. (2018), arXiv 1802.01886
    (Texygen), section 4. Raises ValueError for fewer than two texts.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    if len(texts) < 2:
        raise ValueError(f"each text is compared with the others, and there are {len(texts)} in all")
    split = Tokenizer13a()
    words = [split(text.rstrip()).split() for text in texts]
    counts = [Counter(gram for n in range(1, 5) for gram in _ngrams(each, n)) for each in words]
    most = _two_greatest(counts)
    lengths = Counter(len(each) for each in words)
    scores = []
    for each, own in zip(words, counts, strict=True):
        right, total = [0] * 4, [0] * 4
        for gram, count in own.items():
            greatest, second = most[gram]
            total[len(gram) - 1] += count
            right[len(gram) - 1] += min(count, second if count == greatest else greatest)
        others = lengths - Counter([len(each)])
        closest = min(others, key=lambda length: (abs(length - len(each)), length))
        scores.append(
            BLEU.compute_bleu(right, total, len(each), closest, smooth_method="exp", effective_order=True).score
        )
    return math.fsum(scores) / len(scores)


def _two_greatest(counts: Sequence[Counter[Gram]]) -> dict[Gram, tuple[int, int]]:
    """The two greatest counts of every n-gram over the texts; equal where two texts have the greatest."""
    most: dict[Gram, tuple[int, int]] = {}
    for own in counts:
        for gram, count in own.items():
            greatest, second = most.get(gram, (0, 0))
            most[gram] = (count, greatest) if count > greatest else (greatest, max(second, count))
    return most


def repetition(token_sequences: Sequence[Sequence[int]], n: int = 3) -> float:
    """Return the mean over sequences of 1 - different n-grams / n-grams; 0 for shorter ones.

    0 means that no response repeats itself. Source: seq-rep-n of Welleck et al. (2020), arXiv
    1908.04319, section 6.1.
    """
    shares = []
    for sequence in token_sequences:
        grams = _ngrams(sequence, n)
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return math.fsum(shares) / len(shares) if shares else 0.0


def length_stats(lengths: Sequence[int]) -> LengthStats:
    """Return mean, median, 95th percentile (linear between ranks), least and greatest.

    Raises ValueError when there are none.
    """
    if not lengths:
        raise ValueError("no lengths to summarise")
    array = np.asarray(lengths)
    return LengthStats(
        mean=float(array.mean()),
        median=float(np.median(array)),
        p95=float(np.percentile(array, 95)),
        minimum=int(array.min()),
        maximum=int(array.max()),
    )


def _bootstrap(values: np.ndarray, seed: int, resamples: int) -> Estimate:
    count = len(values)
    mean = float(values.mean())
    if count < 2:
        return Estimate(mean, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    offsets = values - mean  # so that a constant has an interval of width zero
    rows = max(1, _WEIGHTS_AT_ONCE // count)
    means = np.concatenate(
        [
            generator.multinomial(count, np.full(count, 1 / count), size=min(rows, resamples - start)) @ offsets / count
            for start in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(mean, mean + float(low), mean + float(high))


def _ngrams(sequence: Sequence[T], n: int) -> list[tuple[T, ...]]:
    return [tuple(sequence[start : start + n]) for start in range(len(sequence) - n + 1)]
