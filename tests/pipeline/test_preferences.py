"""Conversions between kinds of preferences: what comes out, what is counted, what is refused."""

from __future__ import annotations

import json
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import Split
from pipeline.errors import UserError
from pipeline.preferences import (
    Pair,
    convert,
    label_pairs,
    label_targets,
    load_demonstrations,
    load_preferences,
    ranking_labels,
    ranking_pairs,
    ranking_targets,
)
from pipeline.recipe import DataSection
from pipeline.records import LabelledResponse, Prompt, Ranking, SftExample
from tests.tiny_stage import write_rows

P, Q = Prompt("p"), Prompt("q")
RANKED = Ranking(P, ("ok", "best", "bad", "fine"), (1.0, 0.0, 2.0, 1.0), (5.0, 9.0, 1.0, 6.0), "f:1")
TIED = Ranking(Q, ("x", "y"), (3.0, 3.0), source="f:2")
PAIRED = Ranking(Q, ("good", "poor"), (0.0, 1.0), source="f:3")


def good(prompt: Prompt, response: str, source: str = "") -> LabelledResponse:
    return LabelledResponse(prompt, response, True, source)


def bad(prompt: Prompt, response: str, source: str = "") -> LabelledResponse:
    return LabelledResponse(prompt, response, False, source)


def write(path: Path, rows: list[dict[str, Any]]) -> DataSection:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSection(preferences=str(path))


def test_all_pairs_of_rankings() -> None:
    pairs, counts = ranking_pairs([RANKED, TIED, PAIRED], "all")
    assert pairs == [
        Pair(P, "best", "ok", 4.0),
        Pair(P, "ok", "bad", 4.0),
        Pair(P, "best", "bad", 8.0),
        Pair(P, "best", "fine", 3.0),
        Pair(P, "fine", "bad", 5.0),
        Pair(Q, "good", "poor", None),
    ]
    assert [pair.source for pair in pairs] == ["f:1"] * 5 + ["f:3"]
    assert counts == {
        "rankings": 3,
        "pairs": 6,
        "tied pairs left out": 2,
        "rankings with all answers tied left out": 1,
    }


def test_the_best_against_the_worst() -> None:
    ties = Ranking(Q, ("a", "b", "c", "d", "e"), (1.0, 0.0, 0.0, 2.0, 2.0), (1.0, 7.0, 8.0, 4.0, 3.0))
    pairs, counts = ranking_pairs([RANKED, TIED, ties], "best_worst")
    assert pairs == [Pair(P, "best", "bad", 8.0), Pair(Q, "b", "e", 4.0)]
    assert counts == {"rankings": 3, "pairs": 2, "rankings with all answers tied left out": 1}


def test_labels_of_rankings_stand_on_either_side_of_the_median() -> None:
    three = Ranking(Q, ("a", "b", "c"), (2.0, 0.0, 1.0), source="f:4")
    most_are_best = Ranking(Q, ("a", "b", "c"), (0.0, 0.0, 5.0), source="f:5")
    even = Ranking(P, ("a", "b", "c", "d"), (2.0, 0.0, 1.0, 3.0), source="f:6")
    labels, counts = ranking_labels([PAIRED, three, most_are_best, even, TIED])
    assert labels == [
        *(good(Q, "good"), bad(Q, "poor")),
        *(bad(Q, "a"), good(Q, "b")),
        bad(Q, "c"),
        *(bad(P, "a"), good(P, "b"), good(P, "c"), bad(P, "d")),
    ]
    assert [label.source for label in labels] == ["f:3"] * 2 + ["f:4"] * 2 + ["f:5"] + ["f:6"] * 4
    # the middle of three, two best of three, both tied
    assert counts == {"rankings": 5, "desirable": 4, "undesirable": 5, "answers at the median rank left out": 5}


def test_targets() -> None:
    best_twice = Ranking(Q, ("a", "b", "c"), (1.0, 0.0, 0.0), source="f:4")
    targets, counts = ranking_targets([RANKED, best_twice])
    assert targets == [SftExample(P, "best"), SftExample(Q, "b")]
    assert [target.source for target in targets] == ["f:1", "f:4"]
    assert counts == {"rankings": 2, "targets": 2}
    targets, counts = label_targets([bad(P, "a"), good(P, "b", "g:2"), good(Q, "c")])
    assert targets == [SftExample(P, "b"), SftExample(Q, "c")]
    assert targets[0].source == "g:2"
    assert counts == {"desirable answers": 2, "targets": 2, "undesirable answers left out": 1}


def test_pairs_of_labels_are_of_one_prompt() -> None:
    labels = [
        bad(P, "no", "g:1"),
        good(Q, "q yes", "g:2"),
        good(P, "yes", "g:3"),
        good(P, "same", "g:4"),
        bad(P, "same", "g:5"),
        good(P, "alone", "g:6"),
        bad(Q, "q no", "g:7"),
        bad(Prompt("r"), "alone too", "g:8"),
    ]
    pairs, counts = label_pairs(labels)
    assert pairs == [Pair(P, "yes", "no"), Pair(Q, "q yes", "q no")]
    assert [pair.source for pair in pairs] == ["g:3 and g:1", "g:2 and g:7"]
    assert counts == {
        "labels": 8,
        "pairs": 2,
        "answers without a partner left out": 2,
        "pairs with equal or empty answers left out": 1,
    }


@st.composite
def rankings(draw: st.DrawFn, answers: st.SearchStrategy[str], *, unique: bool = True) -> Ranking:
    responses = draw(st.lists(answers, min_size=2, max_size=6, unique=unique))
    count = len(responses)
    ranks = draw(st.lists(st.integers(0, 3).map(float), min_size=count, max_size=count))
    ratings = draw(st.none() | st.lists(st.integers(0, 9).map(float), min_size=count, max_size=count).map(tuple))
    return Ranking(draw(st.sampled_from([P, Q])), tuple(responses), tuple(ranks), ratings)


def shuffled(ranking: Ranking, order: list[int]) -> Ranking:
    ratings = None if ranking.ratings is None else tuple(ranking.ratings[i] for i in order)
    return Ranking(
        ranking.prompt,
        tuple(ranking.responses[i] for i in order),
        tuple(ranking.ranks[i] for i in order),
        ratings,
    )


@given(st.lists(rankings(st.sampled_from("abcdefg")), max_size=5), st.randoms())
def test_every_ordered_pair_comes_once_in_whatever_order_the_rows_are(given: list[Ranking], random: Any) -> None:
    expected: Counter[tuple[str, str, str, float | None]] = Counter()
    for r in given:
        for i, j in permutations(range(len(r.ranks)), 2):
            if r.ranks[i] < r.ranks[j]:
                margin = None if r.ratings is None else r.ratings[i] - r.ratings[j]
                expected[r.prompt.key, r.responses[i], r.responses[j], margin] += 1
    mixed = [shuffled(r, random.sample(range(len(r.ranks)), len(r.ranks))) for r in random.sample(given, len(given))]
    for rows in (given, mixed):
        pairs, counts = ranking_pairs(rows, "all")
        assert Counter((p.prompt.key, p.chosen, p.rejected, p.margin) for p in pairs) == expected
        assert counts["pairs"] == len(pairs) == sum(r.ordered_pairs() for r in rows)
        assert counts["tied pairs left out"] == sum(r.tied_pairs() for r in rows)
    assert Counter(map(repr, ranking_labels(given)[0])) == Counter(map(repr, ranking_labels(mixed)[0]))


ROUGH = st.sampled_from(["a", "b", "", " \n"])
LABELS = st.lists(st.builds(LabelledResponse, st.sampled_from([P, Q]), ROUGH, st.booleans()), max_size=12)


@given(st.lists(rankings(ROUGH, unique=False), max_size=5), LABELS)
def test_neither_equal_nor_empty_answers_come_out(given: list[Ranking], labels: list[LabelledResponse]) -> None:
    for pairs, counts in (ranking_pairs(given, "all"), ranking_pairs(given, "best_worst"), label_pairs(labels)):
        assert {frozenset((pair.chosen, pair.rejected)) for pair in pairs} <= {frozenset("ab")}
        assert counts["pairs"] == len(pairs)
    singles = (ranking_labels(given), ranking_targets(given), label_targets(labels))
    assert {row.response for rows, _ in singles for row in rows} <= {"a", "b"}
    for _, counts in singles:
        assert all(count > 0 for count in counts.values())


def test_each_kind_becomes_each_kind_and_says_so(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "responses": ["a", "b", "c"], "ranks": [0, 1, 2]} for i in range(40)]
    split = load_preferences(write(tmp_path / "a.jsonl", rows))
    size, held_out = len(split.train), len(split.eval)
    pairs = convert(split, "pairs", "all")
    assert (len(pairs.train), len(pairs.eval)) == (3 * size, 3 * held_out)
    assert pairs.report["conversion"] == {
        "from": "rankings",
        "to": "pairs",
        "train": 3 * size,
        "eval": 3 * held_out,
        "counts": {"rankings": 40, "pairs": 120},
    }
    line = f"  rankings -> pairs: {3 * size} train, {3 * held_out} eval (40 rankings, 120 pairs)"
    assert line in pairs.lines()
    assert "conversion" not in split.report
    assert len(convert(split, "pairs", "best_worst").train) == size
    labels = convert(split, "labels", "all")
    assert labels.report["conversion"]["counts"] == {
        "rankings": 40,
        "answers at the median rank left out": 40,
        "desirable": 40,
        "undesirable": 40,
    }
    assert {type(row) for row in convert(split, "targets", "all").eval} == {SftExample}
    json.dumps(labels.report)


def test_labels_stay_or_become_pairs_and_targets(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i // 2}", "completion": f"r{i}", "label": i % 2 == 0} for i in range(80)]
    split = load_preferences(write(tmp_path / "a.jsonl", rows))
    same = convert(split, "labels", "all")
    assert (same.train, same.eval) == (split.train, split.eval)
    assert same.report["conversion"]["counts"] == {"desirable": 40, "undesirable": 40}
    pairs = convert(split, "pairs", "all").train
    assert {type(pair) for pair in pairs} == {Pair}
    assert len(pairs) == len(split.train) / 2
    targets = convert(split, "targets", "all")
    assert targets.report["conversion"]["from"] == "labels"
    assert len(targets.train) == len(split.train) / 2


def test_pairs_are_called_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r"} for i in range(40)]
    split = convert(load_preferences(write(tmp_path / "a.jsonl", rows)), "labels", "all")
    assert split.report["conversion"]["from"] == "pairs"
    assert split.report["conversion"]["counts"] == {"rankings": 40, "desirable": 40, "undesirable": 40}


def test_what_leaves_nothing_to_learn_from_is_refused() -> None:
    alone = Split([good(P, "a"), bad(Q, "b")], [good(Prompt("r"), "c")])
    message = r"its labels give no pairs for the train split \(3 labels, 3 answers without a partner.*two different"
    with pytest.raises(UserError, match=message):
        convert(alone, "pairs", "all")
    undesirable = Split([bad(P, "a")], [good(Q, "b")])
    with pytest.raises(UserError, match=r"give no targets for the train split"):
        convert(undesirable, "targets", "all")
    with pytest.raises(UserError, match=r"every answer of the train split is labelled undesirable, and KTO needs both"):
        convert(undesirable, "labels", "all")
    with pytest.raises(UserError, match=r"every answer of the train split is labelled desirable"):
        convert(Split([good(P, "a"), good(P, "b")], [bad(Q, "b")]), "labels", "all")
    with pytest.raises(UserError, match=r"its pairs give no labels for the eval split"):
        convert(Split([PAIRED], [TIED]), "labels", "all")


def test_rankings_are_checked_when_loaded(tmp_path: Path) -> None:
    tied = [{"prompt": f"p{i}", "responses": ["a", "b"], "ranks": [1, 1]} for i in range(40)]
    with pytest.raises(UserError, match="all answers are tied"):
        load_preferences(write(tmp_path / "a.jsonl", tied))


def test_without_demonstrations_the_best_answers_are_learnt(tmp_path: Path) -> None:
    pairs = [{"prompt": f"p{n}", "chosen": f" good {n}", "rejected": " bad", "split": side(n)} for n in range(4)]
    preferences = str(write_rows(tmp_path / "pairs.jsonl", pairs))
    split = load_demonstrations(DataSection(preferences=preferences))
    assert [(e.prompt.content, e.response) for e in split.train if e.prompt] == [
        (f"p{n}", f" good {n}") for n in (1, 2, 3)
    ]
    assert [e.response for e in split.eval] == [" good 0"]
    assert split.report["conversion"]["to"] == "targets"
    rows = [{"prompt": f"p{n}", "response": " own", "split": side(n)} for n in range(4)]
    own = load_demonstrations(DataSection(preferences=preferences, sft=str(write_rows(tmp_path / "sft.jsonl", rows))))
    assert {e.response for e in own.train} == {" own"}


def side(n: int) -> str:
    return "train" if n else "eval"
