"""Splits, counts and refusals of whole data sets."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import load_prompts, load_rankings, load_sft
from pipeline.errors import UserError
from pipeline.recipe import DataSection


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(count: int, **extra: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"p{i}", "chosen": "c", "rejected": "r", **extra} for i in range(count)]


def expected_side(prompt: str, seed: int, fraction: float) -> str:
    """Independent reading of the rule: the digest as a fraction of its range."""
    digest = hashlib.sha256(f"{seed}:{prompt}".encode()).hexdigest()
    return "eval" if int(digest[:16], 16) < fraction * 16**16 else "train"


@pytest.mark.parametrize(("seed", "fraction"), [(0, 0.1), (7, 0.1), (0, 0.5)])
def test_the_split_is_the_documented_hash(seed: int, fraction: float, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(200))
    split = load_rankings(DataSection(preferences=path, split_seed=seed, eval_fraction=fraction))
    for side, rankings in (("train", split.train), ("eval", split.eval)):
        assert rankings
        assert {expected_side(str(r.prompt.content), seed, fraction) for r in rankings} == {side}
    assert len(split.train) + len(split.eval) == 200


def test_the_share_held_out_is_the_fraction(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(4000))
    split = load_rankings(DataSection(preferences=path, eval_fraction=0.1))
    # binomial(4000, 0.1): mean 400, standard deviation 19; five of them
    assert abs(len(split.eval) - 400) < 95


WORDS = st.sampled_from(["a", "b", "c", "d", "e", "f", "g", "h"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=25), st.randoms(), st.integers(0, 3))
def test_no_prompt_is_in_two_splits_whatever_the_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], random: Any, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    filler = [{"prompt": f"p{i}", "response": "r"} for i in range(30)]
    body = [{"prompt": prompt, "response": response} for prompt, response in rows]
    sides: list[dict[str, str]] = []
    for name in ("a", "b"):
        random.shuffle(body)
        section = DataSection(sft=write(folder / f"{name}.jsonl", body + filler), split_seed=seed, eval_fraction=0.4)
        split = load_sft(section)
        train = {e.prompt.key for e in split.train if e.prompt}
        held_out = {e.prompt.key for e in split.eval if e.prompt}
        assert not train & held_out
        sides.append(dict.fromkeys(train, "train") | dict.fromkeys(held_out, "eval"))
    assert sides[0] == sides[1]


def test_a_conversation_stays_on_one_side(tmp_path: Path) -> None:
    rows = []
    for i in range(60):
        turns = [("user", f"q{i}"), ("assistant", "a1"), ("user", "more"), ("assistant", "a2")]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    split = load_sft(DataSection(sft=write(tmp_path / "a.jsonl", rows), eval_fraction=0.5))
    train = {example.source for example in split.train}
    held_out = {example.source for example in split.eval}
    assert len(split.train) + len(split.eval) == 120
    assert not train & held_out
    assert split.report["counts"]["conversations with several answers"] == 60


def test_text_rows_split_by_their_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": f"t{i}"} for i in range(100)])
    split = load_sft(DataSection(sft=path, eval_fraction=0.3))
    assert {expected_side(e.response, 0, 0.3) for e in split.eval} == {"eval"}
    assert {expected_side(e.response, 0, 0.3) for e in split.train} == {"train"}


def test_a_split_column_wins(tmp_path: Path) -> None:
    names = ["train", "eval", "validation", "test"]
    rows = [{"prompt": f"p{i}", "split": names[i % 4]} for i in range(40)]
    split = load_prompts(DataSection(prompts=write(tmp_path / "a.jsonl", rows)))
    assert [p.content for p in split.train] == [f"p{i}" for i in range(0, 40, 4)]
    assert len(split.eval) == 30
    assert split.report["split_by"] == "`split` column"


def test_one_prompt_in_both_splits_names_both_rows(tmp_path: Path) -> None:
    rows = [
        {"prompt": "same", "split": "train"},
        {"prompt": "x"},
        {"prompt": "same", "split": "test"},
    ]
    section = DataSection(prompts=write(tmp_path / "a.jsonl", rows), on_error="skip")
    with pytest.raises(UserError, match=r"a\.jsonl:3: .*eval split.*train split at .*a\.jsonl:1"):
        load_prompts(section)


def test_an_unknown_split_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "split": "gold"}])
    with pytest.raises(UserError, match=r"a\.jsonl:1: `split` is 'gold'.*train, eval"):
        load_prompts(DataSection(prompts=path))


def test_empty_splits_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", [{"prompt": "p", "split": "train"}])
    with pytest.raises(UserError, match=r"eval split is empty: none of the 1 .*Raise data\.eval_fr"):
        load_prompts(DataSection(prompts=one))
    other = write(tmp_path / "b.jsonl", [{"prompt": "p", "split": "eval"}])
    with pytest.raises(UserError, match=r"train split is empty.*Lower data\.eval_fraction"):
        load_prompts(DataSection(prompts=other))


def test_skipping_counts_and_lists(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = pairs(50)
    for i in range(25):
        rows.insert(2 * i, {"prompt": "p", "chosen": "", "rejected": "r"})
    path = write(tmp_path / "a.jsonl", rows)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"prompt": "cut')
    split = load_rankings(DataSection(preferences=path, on_error="skip"))
    skipped = split.report["skipped"]
    assert skipped["count"] == 26
    assert len(skipped["reasons"]) == 20
    assert skipped["reasons"][1] == f"{path}:3: `chosen` is empty ('')."
    assert split.report["rows"] == 76
    assert split.report["train"] + split.report["eval"] == 50
    text = "\n".join(split.lines())
    assert "skipped rows: 26" in text
    assert skipped["reasons"][0] in text
    json.dumps(split.report)


def test_a_file_of_bad_rows_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "p"}] * 3)
    with pytest.raises(UserError, match=r"all 3 rows were skipped; the first: .*a\.jsonl:1: has the"):
        load_sft(DataSection(sft=path, on_error="skip"))


def test_ranking_counts(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "responses": ["a", "b", "c"], "ranks": [0, 1, 1]} for i in range(40)]
    rows += [{"prompt": f"q{i}", "responses": ["a", "b"], "ranks": [2, 2]} for i in range(5)]
    rows += rows[:3]
    split = load_rankings(DataSection(preferences=write(tmp_path / "a.jsonl", rows)))
    counts = split.report["counts"]
    assert counts["ordered pairs"] == 43 * 2
    assert counts["tied pairs"] == 43 + 5
    assert counts["rankings without any ordered pair"] == 5
    assert counts["duplicate rows"] == 3
    assert split.report["answers_per_prompt"] == {"2": 5, "3": 43}


def test_rankings_without_any_pair_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "responses": ["a", "b"], "ranks": [1, 1]} for i in range(40)]
    with pytest.raises(UserError, match=r"all answers are tied.*lower rank"):
        load_rankings(DataSection(preferences=write(tmp_path / "a.jsonl", rows)))


def ranked(i: int, scores: list[float]) -> dict[str, Any]:
    return {"prompt": f"p{i}", "responses": ["a", "b"], "ranks": [0, 1], "scores": scores}


def test_reversed_ranks_are_found_by_their_scores(tmp_path: Path) -> None:
    wrong = [ranked(i, [0.2, 0.9]) for i in range(30)] + [ranked(40 + i, [2, 1]) for i in range(10)]
    with pytest.raises(UserError, match=r"in 30 of 40 answer pairs.*ranks look reversed"):
        load_rankings(DataSection(preferences=write(tmp_path / "a.jsonl", wrong)))
    noisy = [ranked(i, [0.9, 0.2]) for i in range(30)] + [ranked(40 + i, [1, 2]) for i in range(10)]
    split = load_rankings(DataSection(preferences=write(tmp_path / "b.jsonl", noisy)))
    assert split.report["counts"]["pairs whose scores contradict their ranks"] == 10


def test_prompts_are_unique_and_in_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 50}", "n": i} for i in range(120)]
    split = load_prompts(DataSection(prompts=write(tmp_path / "a.jsonl", rows)))
    assert len(split.train) + len(split.eval) == 50
    for side in (split.train, split.eval):
        numbers = [p.columns["n"] for p in side]
        assert numbers == sorted(numbers)
        assert max(numbers) < 50
    assert split.report["counts"]["repeated prompts left out"] == 70


def test_prompts_default_to_preferences_then_to_sft(tmp_path: Path) -> None:
    preferences = write(tmp_path / "prefs.jsonl", pairs(50) + pairs(50))
    sft = write(tmp_path / "sft.jsonl", [{"prompt": f"s{i}", "response": "r"} for i in range(50)])
    both = load_prompts(DataSection(preferences=preferences, sft=sft))
    assert {str(p.content)[0] for p in both.train + both.eval} == {"p"}
    assert len(both.train) + len(both.eval) == 50
    assert both.report["key"] == "data.preferences"
    rankings = load_rankings(DataSection(preferences=preferences))
    assert {p.key for p in both.eval} == {r.prompt.key for r in rankings.eval}
    only = load_prompts(DataSection(sft=sft))
    assert {str(p.content)[0] for p in only.train + only.eval} == {"s"}


def test_labels_give_prompts_but_rank_nothing(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i // 2}", "completion": f"r{i}", "label": i % 3 == 0} for i in range(120)]
    section = DataSection(preferences=write(tmp_path / "a.jsonl", rows))
    split = load_prompts(section)
    assert sorted(str(p.content) for p in split.train + split.eval) == sorted(f"p{i}" for i in range(60))
    assert split.report["counts"]["desirable answers"] == 40
    assert split.report["counts"]["undesirable answers"] == 80
    with pytest.raises(UserError, match=r"prompt/completion/label rows are labels.*do not rank.*kto.*dpo.*ift"):
        load_rankings(section)


def test_odd_transcripts_are_skipped_and_counted(tmp_path: Path) -> None:
    asked = [f"\n\nHuman: {i}?\n\nAssistant:" for i in range(40)]
    rows = [{"chosen": f"{text} yes", "rejected": f"{text} no"} for text in asked]
    rows[4] = {"chosen": asked[4] + " a", "rejected": asked[5] + " b"}
    rows[9] = {"chosen": asked[9] + " a", "rejected": asked[9] + " a"}
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"a\.jsonl:5: `rejected` differs from `chosen` before.*on_error: skip"):
        load_rankings(DataSection(preferences=path))
    split = load_rankings(DataSection(preferences=path, on_error="skip"))
    assert len(split.train) + len(split.eval) == 38
    assert [reason.partition(": ")[0] for reason in split.report["skipped"]["reasons"]] == [f"{path}:5", f"{path}:10"]


def test_text_rows_give_no_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": f"t{i}"} for i in range(50)])
    with pytest.raises(UserError, match=r"rows of data\.sft have no prompts.*Set data\.prompts"):
        load_prompts(DataSection(sft=path))


def test_held_out_prompts_that_a_stage_trains_on_are_left_out(tmp_path: Path) -> None:
    held_out = [{"prompt": p, "split": "eval"} for p in ("a", "b", "c", "d")] + [{"prompt": "e", "split": "train"}]
    demonstrations = [{"prompt": p, "response": "r", "split": s} for p, s in (("b", "train"), ("c", "eval"))]
    ranked = [{"prompt": p, "chosen": "x", "rejected": "y", "split": s} for p, s in (("d", "train"), ("a", "eval"))]
    section = DataSection(
        prompts=write(tmp_path / "prompts.jsonl", held_out),
        sft=write(tmp_path / "sft.jsonl", demonstrations),
        preferences=write(tmp_path / "preferences.jsonl", ranked),
    )
    split = load_prompts(section)
    assert [prompt.content for prompt in split.eval] == ["a", "c"]
    assert split.report["eval"] == 2
    assert "  held-out prompts left out because a stage trains on them: 2" in split.lines()


def test_held_out_prompts_that_are_all_trained_on_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "split": "eval"}, {"prompt": "b", "split": "train"}]
    demonstrations = [{"prompt": p, "response": "r", "split": s} for p, s in (("a", "train"), ("c", "eval"))]
    sft = write(tmp_path / "sft.jsonl", demonstrations)
    with pytest.raises(UserError, match=r"prompts\.jsonl:1, a training prompt at .*sft\.jsonl:1.*prompts of their own"):
        load_prompts(DataSection(prompts=write(tmp_path / "prompts.jsonl", rows), sft=sft))
