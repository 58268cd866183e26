"""The question to a language model, and the verdict in its answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.evaluation.judge_question import question, read_template, verdict
from pipeline.recipe_judges import LlmJudge


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"),
        ("b", "B"),
        ("TIE\n\n", "TIE"),
        ("The first rambles.\nIt is A.\nB", "B"),
        ("Answer: A", "A"),
        ("**Final verdict: B**", "B"),
        ("**Verdict:** Tie.", "TIE"),
        ("[[A]]", "A"),
        ("My answer is: `B`", "B"),
        ("Answer A", "A"),
        ("The better answer is Answer B.", "B"),
        ("$\\boxed{\\text{TIE}}$", "TIE"),
        ("", None),
        (" \n ", None),
        ("A\nbecause it is shorter", None),
        ("A or B", None),
        ("A is better", None),
        ("A/B/TIE", None),
        ("C", None),
        ("Neither", None),
        ("AB", None),
        ("A tie", None),
        ("I cannot decide between A and B", None),
    ],
)
def test_the_last_line_is_the_verdict(text: str, expected: str | None) -> None:
    assert verdict(text) == expected


def test_slots_inside_texts_stay_as_they_are() -> None:
    asked = question("{criterion}|{prompt}|{a}|{b}|{c}|{{a}}", "c {a}", "{b} p", "{a}", "{prompt}")
    assert asked == "c {a}|{b} p|{a}|{prompt}|{c}|{{a}}"


def _settings(**keys: object) -> LlmJudge:
    return LlmJudge.model_validate({"base_url": "http://127.0.0.1:1/v1", "model": "m", **keys})


def test_a_template_is_a_text_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("question.txt").write_text("{prompt}: {a} or {b}?")
    assert read_template("x", _settings(template="question.txt")) == "{prompt}: {a} or {b}?"
    assert read_template("x", _settings(template="{prompt} {a} {b}")) == "{prompt} {a} {b}"
    assert "{criterion}" in read_template("x", _settings(criterion="brevity"))


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"template": "{prompt} {a}"}, r"eval\.judges\.x\.llm\.template: the question has no \{b\}\."),
        ({"template": "absent.txt"}, r"no \{prompt\} and no \{a\} and no \{b\} and no file of this name"),
        ({"template": "{prompt} {a} {b}", "criterion": "brevity"}, r"has no \{criterion\}"),
    ],
)
def test_a_question_without_its_slots_is_refused(keys: dict[str, object], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        read_template("x", _settings(**keys))
