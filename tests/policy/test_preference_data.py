"""Rows of the direct methods: every answer once, mismatched partners, the reference's sums in their places."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pipeline.encoding import EncodedLabelled, EncodedPair
from pipeline.errors import UserError
from pipeline.preferences import Pair
from pipeline.recipe_direct import ContrastSection, ContrastTexts
from pipeline.records import LabelledResponse, Prompt
from policy.answers import Group
from policy.preference_data import Row, RowCollator, cached_sums, label_rows, pair_rows, with_reference
from policy.preference_rows import contrast_examples

A, B, C = [7, 2], [8, 2], [9, 9, 2]


def encoded(prompt: int, chosen: list[int], rejected: list[int], source: str) -> EncodedPair:
    return EncodedPair([1, prompt], chosen, rejected, Pair(Prompt(str(prompt)), "c", "r", source=source))


def labelled(answer: int, desirable: bool) -> EncodedLabelled:
    return EncodedLabelled([1, answer], [answer, 2], LabelledResponse(Prompt("p"), "r", desirable))


def test_pairs_of_one_ranking_share_its_answers() -> None:
    pairs = [encoded(5, A, B, "f:1"), encoded(5, A, C, "f:1"), encoded(5, C, B, "f:1"), encoded(5, B, A, "f:2")]
    rows = pair_rows(pairs)
    assert [list(map(list, row.group.answer_ids)) for row in rows] == [[A, B, C], [B, A]]
    assert [row.pairs for row in rows] == [((0, 1), (0, 2), (2, 1)), ((0, 1),)]
    batch = RowCollator(0, shared=True)(with_reference(rows, [-1.0, -2.0, -3.0, -4.0, -5.0]))
    assert batch["pairs"].tolist() == [[0, 1], [0, 2], [2, 1], [3, 4]]
    assert batch["reference"].tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0]
    assert batch["input_ids"].shape == (2, 9)
    assert RowCollator(0, shared=False)(rows)["input_ids"].shape == (5, 5)


@pytest.mark.parametrize("seed", range(3))
def test_every_answer_is_the_partner_of_another_prompt_once(seed: int) -> None:
    answers = [labelled(n, n % 2 == 0) for n in range(10, 17)]
    rows = label_rows(answers, seed)
    assert [row.desirable for row in rows] == [True, False, True, False, True, False, True]
    partners = []
    for row, own in zip(rows, answers, strict=True):
        assert row.other is not None
        assert list(row.other.prompt_ids) == own.prompt_ids
        partners.append(row.other.answer_ids[0][0])
        assert partners[-1] != own.response_ids[0]
    assert sorted(partners) == list(range(10, 17))
    batch = RowCollator(0, shared=False)(with_reference(rows, [float(n) for n in range(14)]))
    assert batch["reference"].tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    assert batch["other_reference"].tolist() == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0]
    assert batch["other_ids"].tolist()[::2] == partners


def test_a_reference_is_computed_once_for_the_same_model_and_data(tmp_path: Path) -> None:
    rows, calls = [Row(Group([1], [[2]])), Row(Group([1, 5], [[6, 2], [7]]))], []

    def compute() -> list[float]:
        calls.append(1)
        return [-0.1, -1.5, -2.25]

    assert cached_sums(tmp_path / "c", ["model"], rows, compute) == ([-0.1, -1.5, -2.25], False)
    assert cached_sums(tmp_path / "c", ["model"], rows, compute) == ([-0.1, -1.5, -2.25], True)
    assert len(calls) == 1
    assert not cached_sums(tmp_path / "c", ["other model"], rows, compute)[1]
    assert not cached_sums(tmp_path / "c", ["model"], rows[::-1], compute)[1]
    assert len(list((tmp_path / "c").iterdir())) == 3


def test_a_reference_without_usable_numbers_is_refused_and_not_kept(tmp_path: Path) -> None:
    rows = [Row(Group([1], [[2]]))]
    with pytest.raises(UserError, match="not finite"):
        cached_sums(tmp_path / "c", ["model"], rows, lambda: [math.nan])
    assert cached_sums(tmp_path / "c", ["model"], rows, lambda: [-1.0]) == ([-1.0], False)


def test_contrast_examples_show_the_worse_answer_but_for_a_share() -> None:
    pairs = [Pair(Prompt(f"q{n}"), f"good {n}", f"bad {n}", margin=float(n)) for n in range(200)]
    section = ContrastSection(instruction="I", plain_share=0.25, curriculum=True)
    examples = contrast_examples(pairs, section, seed=0)
    assert [example.response for example in examples] == [f"good {n}" for n in reversed(range(200))]
    shown = [
        example
        for example in examples
        if example.prompt is not None and "Worse answer: bad" in str(example.prompt.content)
    ]
    assert 0.68 < len(shown) / 200 < 0.82
    assert shown[0].prompt == Prompt(
        "Instruction: I\nQuestion: q{n}\nWorse answer: bad {n}\nBetter answer: ".format(n=shown[0].response[5:])
    )
    assert contrast_examples(pairs, section, seed=0) == examples
    chat = Pair(Prompt(({"role": "user", "content": "q"},)), "good", "bad")
    (example,) = contrast_examples([chat], ContrastSection(plain_share=0.0, template="chinese"), seed=0)
    assert example.prompt == Prompt(({"role": "user", "content": "指令: \n问题: q\n消极回答: bad\n积极回答: "},))


def test_without_margins_unlike_answers_come_first() -> None:
    pairs = [Pair(Prompt("q"), "abcd", other) for other in ("abce", "wxyz", "abyz")]
    examples = contrast_examples(pairs, ContrastSection(plain_share=0.0, curriculum=True), seed=0)
    assert ["wxyz" in str(e.prompt) for e in examples] == [True, False, False]
    assert "abce" in str(examples[2].prompt)


def test_a_template_without_a_slot_is_refused() -> None:
    texts = ContrastTexts(training="{instruction}{prompt}{chosen}", inference="{instruction}{prompt}{chosen}")
    with pytest.raises(UserError, match=r"contrast\.template: the training template lacks the slot \{rejected\}"):
        contrast_examples([], ContrastSection(template=texts), seed=0)


def test_rows_without_a_reference_have_none() -> None:
    batch = RowCollator(0, shared=False)([Row(Group([1], [[2]]))])
    assert "reference" not in batch
    assert torch.equal(batch["desirable"], torch.tensor([True]))
