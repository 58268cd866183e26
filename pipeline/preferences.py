"""Preferences in the kind that a method learns from: pairs, labels or targets, made from what `data.preferences` holds.

Every conversion is a pure function of its rows, which it reads in their order, and counts what it made and left out. No
pair of equal answers and no empty answer comes out of any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median
from typing import Any, Literal, overload

from pipeline.data import Split, check_rankings, has_labels, load_records, load_sft
from pipeline.errors import UserError
from pipeline.recipe import DataSection
from pipeline.records import LabelledResponse, Prompt, Ranking, SftExample

Kind = Literal["pairs", "labels", "targets"]
Which = Literal["all", "best_worst"]
"""Values of `data.ranking_pairs`."""
UNUSABLE = "pairs with equal or empty answers left out"


@dataclass(frozen=True, slots=True)
class Pair:
    """A better and a worse answer to one prompt."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None
    """Rating of `chosen` minus that of `rejected`, in the data's own unit; below 0 where ratings contradict ranks."""
    source: str = field(default="", compare=False)


def load_preferences(data: DataSection) -> Split[Ranking] | Split[LabelledResponse]:
    """`data.preferences` in the kind it has: rankings, of which pairs are those with two answers, or labels.

    Raises UserError as `load_sft`, and for rankings as `check_rankings`.
    """
    split = load_records("preferences", data.preferences, data)
    return split if has_labels(split) else check_rankings(split)


def load_demonstrations(data: DataSection) -> Split[SftExample]:
    """`data.sft`; where it is not set, the best or desirable answers of `data.preferences`.

    Raises UserError as `load_sft` and `convert`.
    """
    if data.sft is not None or data.preferences is None:
        return load_sft(data)
    return convert(load_preferences(data), "targets", data.ranking_pairs)


@overload
def convert(
    split: Split[Ranking] | Split[LabelledResponse], kind: Literal["targets"], which: Which
) -> Split[SftExample]: ...
@overload
def convert(
    split: Split[Ranking] | Split[LabelledResponse], kind: Kind, which: Which
) -> Split[Pair] | Split[LabelledResponse] | Split[SftExample]: ...
def convert(
    split: Split[Ranking] | Split[LabelledResponse], kind: Kind, which: Which
) -> Split[Pair] | Split[LabelledResponse] | Split[SftExample]:
    """The preferences as rows of `kind`, with `conversion` in the report: from, to, train, eval and counts.

    Raises UserError when a side is left without rows, and when only one label is left to train on.
    """
    read: list[Any] = [*split.train, *split.eval]
    rankings = "pairs" if all(isinstance(r, Ranking) and len(r.responses) == 2 for r in read) else "rankings"
    given = "labels" if has_labels(split) else rankings
    train, counts = _converted(split.train, kind, which)
    held_out, more = _converted(split.eval, kind, which)
    counts = counts + more
    for side, rows in (("train", train), ("eval", held_out)):
        if not rows:
            left_out = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise UserError(
                f"data.preferences: its {given} give no {kind} for the {side} split ({left_out}).",
                mend=f"Add rows that do, or train with a method that learns from {given}. {_NEEDS[kind]}",
            )
    labels = {row.desirable for row in train if isinstance(row, LabelledResponse)}
    if len(labels) == 1:
        only = "desirable" if labels == {True} else "undesirable"
        raise UserError(
            f"data.preferences: every answer of the train split is labelled {only}, and KTO needs both labels.",
            mend="Add answers with the other label.",
        )
    entry = {"from": given, "to": kind, "train": len(train), "eval": len(held_out), "counts": dict(counts)}
    return Split(train, held_out, {**split.report, "conversion": entry})


_NEEDS: dict[Kind, str] = {
    "pairs": "A pair needs two different answers to one prompt, one of them better.",
    "labels": "A label needs an answer that is better or worse than the median of its ranking.",
    "targets": "A target needs a desirable answer.",
}


def _converted(rows: Sequence[Any], kind: Kind, which: Which) -> tuple[list[Any], Counter[str]]:
    labelled = any(isinstance(row, LabelledResponse) for row in rows)
    if kind == "pairs":
        return label_pairs(rows) if labelled else ranking_pairs(rows, which)
    if kind == "labels":
        return _labels(rows) if labelled else ranking_labels(rows)
    return label_targets(rows) if labelled else ranking_targets(rows)


def ranking_pairs(rankings: Sequence[Ranking], which: Which) -> tuple[list[Pair], Counter[str]]:
    """`all`: every two answers of different rank; `best_worst`: one pair per ranking.

    The one pair is the first of the best answers against the last of the worst. Margins come from the ratings.
    """
    counts: Counter[str] = Counter(rankings=len(rankings))
    pairs = []
    for ranking in rankings:
        ranks = ranking.ranks
        counts["rankings with all answers tied left out"] += ranking.ordered_pairs() == 0
        if which == "all":
            counts["tied pairs left out"] += ranking.tied_pairs()
            order = [(a, b) if ranks[a] < ranks[b] else (b, a) for a, b in combinations(range(len(ranks)), 2)]
        else:
            best, worst = ranks.index(min(ranks)), len(ranks) - 1 - ranks[::-1].index(max(ranks))
            order = [(best, worst)]
        for better, worse in order:
            if ranks[better] == ranks[worse]:
                continue
            ratings = ranking.ratings
            margin = None if ratings is None else ratings[better] - ratings[worse]
            chosen, rejected = ranking.responses[better], ranking.responses[worse]
            pairs.append(Pair(ranking.prompt, chosen, rejected, margin, ranking.source))
    return _usable(pairs, counts)


def label_pairs(labels: Sequence[LabelledResponse]) -> tuple[list[Pair], Counter[str]]:
    """Per prompt, its n-th desirable answer against its n-th undesirable one; those without a partner are counted."""
    counts: Counter[str] = Counter(labels=len(labels))
    of_prompt: dict[Prompt, tuple[list[LabelledResponse], list[LabelledResponse]]] = {}
    for row in labels:
        of_prompt.setdefault(row.prompt, ([], []))[row.desirable].append(row)
    pairs = []
    for bad, good in of_prompt.values():
        counts["answers without a partner left out"] += abs(len(good) - len(bad))
        for better, worse in zip(good, bad, strict=False):
            source = f"{better.source} and {worse.source}"
            pairs.append(Pair(better.prompt, better.response, worse.response, None, source))
    return _usable(pairs, counts)


def _usable(pairs: list[Pair], counts: Counter[str]) -> tuple[list[Pair], Counter[str]]:
    kept = [p for p in pairs if p.chosen.strip() and p.rejected.strip() and p.chosen != p.rejected]
    return kept, +(counts + Counter({"pairs": len(kept), UNUSABLE: len(pairs) - len(kept)}))


def ranking_labels(rankings: Sequence[Ranking]) -> tuple[list[LabelledResponse], Counter[str]]:
    """Answers better than the median rank are desirable, worse ones undesirable; those at the median are left out.

    A pair gives one of each.
    """
    labels = []
    answers = 0
    for ranking in rankings:
        answers += len(ranking.ranks)
        middle = median(ranking.ranks)
        for response, rank in zip(ranking.responses, ranking.ranks, strict=True):
            if rank != middle:
                labels.append(LabelledResponse(ranking.prompt, response, rank < middle, ranking.source))
    at_median = answers - len(labels)
    made, counts = _labels(labels)
    return made, +(Counter({"rankings": len(rankings), "answers at the median rank left out": at_median}) + counts)


def _labels(labels: Sequence[LabelledResponse]) -> tuple[list[LabelledResponse], Counter[str]]:
    kept = [row for row in labels if row.response.strip()]
    good = sum(row.desirable for row in kept)
    counts = {"desirable": good, "undesirable": len(kept) - good, "empty answers left out": len(labels) - len(kept)}
    return kept, +Counter(counts)


def ranking_targets(rankings: Sequence[Ranking]) -> tuple[list[SftExample], Counter[str]]:
    """The best answer of each ranking, the first of those that tie."""
    best = [(r, r.responses[r.ranks.index(min(r.ranks))]) for r in rankings]
    return _targets([SftExample(r.prompt, response, r.source) for r, response in best], "rankings")


def label_targets(labels: Sequence[LabelledResponse]) -> tuple[list[SftExample], Counter[str]]:
    """The desirable answers."""
    good = [SftExample(row.prompt, row.response, row.source) for row in labels if row.desirable]
    targets, counts = _targets(good, "desirable answers")
    return targets, +(Counter({"undesirable answers left out": len(labels) - len(good)}) + counts)


def _targets(examples: list[SftExample], given: str) -> tuple[list[SftExample], Counter[str]]:
    kept = [example for example in examples if example.response.strip()]
    counts = {given: len(examples), "targets": len(kept), "empty answers left out": len(examples) - len(kept)}
    return kept, +Counter(counts)
