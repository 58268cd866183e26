"""A held-out prompt that is trained on, in whatever spelling and data set, is refused with both rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import load_prompts
from pipeline.errors import UserError
from pipeline.leaks import refuse_leaks
from pipeline.recipe import DataSection
from tests.tiny_stage import write_rows


def data_of(folder: Path, **rows: list[dict[str, Any]]) -> DataSection:
    """A train and a held-out row of every data set, behind the given ones."""
    answers: dict[str, Any] = {
        "sft": {"response": " fine"},
        "preferences": {"chosen": " fine", "rejected": " bad"},
        "prompts": {},
    }
    files = {}
    for kind, columns in answers.items():
        own = [{"prompt": f"{kind} {side}", "split": side} for side in ("train", "eval")]
        made = [{**columns, **row} for row in [*rows.get(kind, []), *own]]
        files[kind] = str(write_rows(folder / f"{kind}.jsonl", made))
    return DataSection(**files)


def test_data_sets_without_a_leak_pass(tmp_path: Path) -> None:
    shared = [{"prompt": "the film", "split": "eval"}]
    refuse_leaks(data_of(tmp_path, sft=shared, preferences=shared, prompts=shared))


@pytest.mark.parametrize("kind", ["sft", "preferences"])
def test_both_rows_are_named(tmp_path: Path, kind: str) -> None:
    padding = [{"prompt": "first", "split": "train"}]
    data = data_of(
        tmp_path,
        **{kind: [*padding, {"prompt": "the film", "split": "train"}]},
        prompts=[*padding, *padding, {"prompt": "the film", "split": "eval"}],
    )
    told = rf"^data\.prompts: the held-out prompt at .*prompts\.jsonl:3 is also a training prompt of data\.{kind}, at "
    with pytest.raises(
        UserError, match=told + rf".*{kind}\.jsonl:2: a policy would be measured on what it learnt\. Give both"
    ):
        refuse_leaks(data)
    left_out = "held-out prompts left out because a stage trains on them"
    assert load_prompts(data).report["counts"][left_out] == 1


@pytest.mark.parametrize("spelling", ["The  film ", "THE FILM", "the\nfilm", "the \N{LATIN SMALL LIGATURE FI}lm"])
def test_another_spelling_is_told_and_not_refused(tmp_path: Path, spelling: str) -> None:
    """Public data are full of them, and the hash may put them on either side."""
    data = data_of(
        tmp_path,
        sft=[{"prompt": spelling, "split": "train"}],
        prompts=[{"prompt": "the film", "split": "eval"}, {"prompt": "another", "split": "eval"}],
    )
    assert refuse_leaks(data) == [
        "1 held-out prompts differ from a training prompt in case, whitespace or Unicode form alone"
    ]


def test_held_out_answers_and_demonstrations_are_not_trained_on_either(tmp_path: Path) -> None:
    held_out, trained = {"prompt": "the film", "split": "eval"}, {"prompt": "the film", "split": "train"}
    other = [{"prompt": "another", "split": "eval"}]
    with pytest.raises(UserError, match=r"^data\.preferences: the held-out prompt at .* training prompt of data\.sft"):
        refuse_leaks(data_of(tmp_path, sft=[trained], preferences=[held_out], prompts=other))
    with pytest.raises(UserError, match=r"^data\.sft: the held-out prompt at .* training prompt of data\.preferences"):
        refuse_leaks(data_of(tmp_path, sft=[held_out], preferences=[trained], prompts=other))


def test_a_later_turn_of_a_trained_conversation_leaks(tmp_path: Path) -> None:
    def asked(*turns: str) -> list[dict[str, str]]:
        roles = ("user", "assistant") * len(turns)
        return [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]

    data = data_of(
        tmp_path,
        preferences=[{"prompt": asked("hello"), "split": "train"}],
        prompts=[{"prompt": asked("hello", "yes ?", "the film"), "split": "eval"}],
    )
    with pytest.raises(UserError, match=re.escape("data.preferences")):
        refuse_leaks(data)


def test_prompts_that_ppo_trains_on_count_and_texts_without_a_prompt_do_not(tmp_path: Path) -> None:
    held_out, trained = {"prompt": "the film", "split": "eval"}, {"prompt": "the film", "split": "train"}
    with pytest.raises(UserError, match=r"a training prompt of data\.prompts, at .*prompts\.jsonl:1"):
        refuse_leaks(data_of(tmp_path, sft=[held_out], prompts=[trained, {"prompt": "another", "split": "eval"}]))
    rows = [{"text": "the film", "split": "train"}, {"text": "an end", "split": "eval"}]
    texts = str(write_rows(tmp_path / "texts.jsonl", rows))
    assert refuse_leaks(data_of(tmp_path, prompts=[held_out]).model_copy(update={"sft": texts})) == []
