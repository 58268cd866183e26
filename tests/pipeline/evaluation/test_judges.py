"""Judges: what is called, and what is refused by name and row."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.evaluation.judges import JudgeFunction, load_judges
from pipeline.recipe import EvalSection, Judge

MODULE = """
def longer(prompts, responses, unit=1):
    return [len(p + r) / unit for p, r in zip(prompts, responses)]

def empties(prompts, responses):
    prompts.clear()
    responses.clear()
    return [0.0, 0.0]

def short_list(prompts, responses):
    return [0.0]

def nan_on_empty(prompts, responses):
    return [float("nan") if not r else 1.0 for r in responses]

def drops_the_empty(prompts, responses):
    return [1.0 for r in responses if r]

def numbers_as_text(prompts, responses):
    return ["1" for _ in responses]

def text(prompts, responses):
    return ["high" for _ in responses]

def raises_on_empty(prompts, responses):
    return [1 / len(r) for r in responses]

def raises_on_batches(prompts, responses):
    if len(responses) > 1:
        raise RuntimeError("one at a time")
    return [1.0]

def single_number(prompts, responses):
    return 3.0

def one_list(responses):
    return [1.0 for _ in responses]

constant = 3
"""


@pytest.fixture
def judges_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"judges_of_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"broken_{name}.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    return name


def _load(function: str, **kwargs: object) -> JudgeFunction:
    return load_judges(EvalSection(judges={"mine": Judge(function=function, kwargs=kwargs)}))["mine"]


def test_kwargs_are_bound_and_numbers_are_floats(judges_module: str) -> None:
    judge = _load(f"{judges_module}:longer", unit=2)
    assert judge(["ab", "c"], ["cd", ""]) == [2.0, 0.5]


def test_a_judge_gets_lists_of_its_own(judges_module: str) -> None:
    prompts, responses = ["ab", "c"], ["cd", ""]
    assert _load(f"{judges_module}:empties")(prompts, responses) == [0.0, 0.0]
    assert (prompts, responses) == (["ab", "c"], ["cd", ""])


def test_no_judges_give_none() -> None:
    assert load_judges(EvalSection()) == {}


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("short_list", "the whole batch: returned 1 values for 2 responses"),
        ("nan_on_empty", r"row 1 \(''\): returned nan, which is not a finite number"),
        ("text", "row 0 .*returned 'high', which is not a finite number"),
        ("raises_on_empty", r"row 1 \(''\): ZeroDivisionError"),
        ("raises_on_batches", "the whole batch: RuntimeError: one at a time"),
        ("single_number", r"row 0 \('good'\): returned float for 1 responses"),
        ("drops_the_empty", r"row 1 \(''\): returned 0 values for 1 responses"),
        ("numbers_as_text", "row 0 .*returned '1', which is not a finite number"),
    ],
)
def test_a_bad_answer_names_judge_and_row(judges_module: str, function: str, problem: str) -> None:
    judge = _load(f"{judges_module}:{function}")
    with pytest.raises(UserError, match=f"judge mine: .*{problem}"):
        judge(["a", "b"], ["good", ""])


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("{}", "is '.*'"),
        ("{}:", "is '.*'"),
        ("no_such_module:f", "importing no_such_module failed: ModuleNotFoundError"),
        ("broken_{}:f", "importing broken_.* failed: ModuleNotFoundError: .*a_package_that_is_not_there"),
        ("{}:missing", "has no missing"),
        ("{}:constant", "is not callable"),
        ("{}:one_list", "cannot be called with"),
    ],
)
def test_an_unusable_judge_is_refused_at_set_up(judges_module: str, function: str, problem: str) -> None:
    with pytest.raises(UserError, match=rf"eval\.judges\.mine.*{problem}"):
        _load(function.format(judges_module))


def test_unknown_kwargs_are_refused_at_set_up(judges_module: str) -> None:
    with pytest.raises(UserError, match="units"):
        _load(f"{judges_module}:longer", units=2)
