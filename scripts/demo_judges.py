"""The demo's two gold judges: VADER's rules and a naive Bayes classifier of star labels.

Both read prompt and response as one text, and neither has seen the human ratings that the reward
model learns from: they measure what the policy gained beyond its reward model's opinion.
`python -m scripts.demo_judges DATA_DIR` prints how well each agrees with the human ratings.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

GAPS = (0.5, 1.0, 2.0)
MIN_DOCUMENTS = 3
"""A feature must stand in this many documents to be counted."""

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[!?]")


def vader(prompts: list[str], responses: list[str]) -> list[float]:
    """VADER compound score of each prompt + response, in [-1, 1]; 0 is neutral, higher is better.

    Raises UserError when vaderSentiment is not installed, ValueError for unequal lengths.
    Source: Hutto and Gilbert 2014; package vaderSentiment 3.3.2.
    """
    analyzer = _vader_analyzer()
    return [
        float(analyzer.polarity_scores(prompt + response)["compound"])
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def naive_bayes(prompts: list[str], responses: list[str], *, counts: str) -> list[float]:
    """Probability in [0, 1] that each prompt + response comes from a positive review.

    p = sigmoid(prior + sum over the distinct known uni- and bigrams f of log_odds[f]).

    Args:
        counts: path of the `naive_bayes.json` that `scripts.demo_data` wrote.

    Raises UserError when the file is missing or not such a file, ValueError for unequal lengths.
    """
    prior, log_odds = _load_naive_bayes(counts)
    return [
        _sigmoid(positive_log_odds(prompt + response, prior, log_odds))
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def positive_log_odds(text: str, prior: float, log_odds: Mapping[str, float]) -> float:
    """log P(positive | text) - log P(negative | text) in nats; unknown features count 0."""
    return prior + sum(log_odds.get(name, 0.0) for name in sorted(features(text)))


def features(text: str) -> set[str]:
    """Distinct words, `!`, `?` and pairs of neighbours of the lower-cased text.

    Example:
        >>> sorted(features("Good, good film!"))
        ['!', 'film', 'film !', 'good', 'good film', 'good good']
    """
    words = _WORD.findall(text.lower())
    return {*words, *(f"{a} {b}" for a, b in pairwise(words))}


def train_naive_bayes(documents: Iterable[tuple[str, bool]]) -> dict[str, Any]:
    """Naive Bayes with binary features of (text, is positive) documents, add-one smoothing.

    log_odds[f] = log((n_pos[f] + 1) / (D_pos + 2)) - log((n_neg[f] + 1) / (D_neg + 2)), where n
    counts the documents that hold f and D all documents of the class; prior = log(D_pos / D_neg).
    Features of fewer than `MIN_DOCUMENTS` documents are left out. A text is scored by the features
    it has alone: what a sentence lacks says nothing. Raises ValueError when a class is missing.
    """
    seen: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    size = {True: 0, False: 0}
    for text, positive in documents:
        seen[positive].update(features(text))
        size[positive] += 1
    if not size[True] or not size[False]:
        raise ValueError("naive Bayes needs documents of both classes")
    log_odds = {}
    for name in sorted(seen[True].keys() | seen[False].keys()):
        n_pos, n_neg = seen[True][name], seen[False][name]
        if n_pos + n_neg >= MIN_DOCUMENTS:
            odds = math.log((n_pos + 1) / (size[True] + 2)) - math.log((n_neg + 1) / (size[False] + 2))
            log_odds[name] = round(odds, 4)
    return {
        "documents": {"positive": size[True], "negative": size[False]},
        "prior": round(math.log(size[True] / size[False]), 6),
        "log_odds": log_odds,
    }


def pair_accuracy(scores: list[float], ratings: list[float], gap: float) -> tuple[float, int]:
    """Share of pairs, ratings at least `gap` > 0 apart, that scores order alike; and their number.

    Equal scores count one half; nan when there is no such pair. Time is quadratic.
    """
    import numpy as np

    score, rating = np.asarray(scores), np.asarray(ratings)
    right = total = 0.0
    for i in range(len(rating)):
        better = rating[i] - rating >= gap
        ahead = score[i] - score[better]
        right += (ahead > 0).sum() + 0.5 * (ahead == 0).sum()
        total += better.sum()
    return (float(right / total) if total else math.nan), int(total)


def _sigmoid(x: float) -> float:
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    return math.exp(x) / (1.0 + math.exp(x))


@functools.cache
def _vader_analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError as error:
        raise UserError(
            "The judge scripts.demo_judges:vader needs the package vaderSentiment.",
            mend="Install it with `pip install vaderSentiment==3.3.2` (part of the extra `demo`).",
        ) from error
    return SentimentIntensityAnalyzer()


@functools.cache
def _load_naive_bayes(path: str) -> tuple[float, dict[str, float]]:
    mend = "Build it with `python -m scripts.demo_data OUT_DIR`; `counts` is its naive_bayes.json."
    try:
        model = json.loads(Path(path).read_text(encoding="utf-8"))
        return float(model["prior"]), dict(model["log_odds"])
    except OSError as error:
        raise UserError(f"naive Bayes counts {path}: {error.strerror}.", mend=mend) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not hold naive Bayes counts ({error!r}).", mend=mend) from error


def main(argv: list[str] | None = None) -> int:
    """Print each judge's pair accuracy against the mean human ratings of the movie snippets."""
    from scripts.demo_data import load_snippets

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("data_dir", type=Path, help="directory that scripts.demo_data wrote")
    arguments = parser.parse_args(argv)
    counts = str(arguments.data_dir / "naive_bayes.json")
    judges: dict[str, Callable[[list[str], list[str]], list[float]]] = {
        "vader": vader,
        "naive_bayes": functools.partial(naive_bayes, counts=counts),
    }
    out = sys.stdout.write
    try:
        snippets = [s for s in load_snippets() if s.source == "movie"]
        texts, ratings = [s.text for s in snippets], [s.rating for s in snippets]
        out(f"{len(texts)} movie snippets; pair accuracy where human means differ by at least\n")
        out("judge        " + "".join(f"{gap:>8}" for gap in GAPS) + "   score of exactly 0 or 1/2\n")
        for name, judge in judges.items():
            scores = judge([""] * len(texts), texts)
            cells = "".join(f"{pair_accuracy(scores, ratings, gap)[0]:8.3f}" for gap in GAPS)
            neutral = 0.5 if name == "naive_bayes" else 0.0
            out(f"{name:13}{cells}   {sum(s == neutral for s in scores) / len(scores):.3f}\n")
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
