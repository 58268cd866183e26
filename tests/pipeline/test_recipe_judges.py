"""`eval.judges` of a recipe: what is accepted, what is refused in which words, and what no stage depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.load import dump_recipe, load_recipe
from pipeline.recipe import Recipe
from pipeline.stages import STAGES, fingerprint, named_files

HEAD = "name: t\nmodel: {name_or_path: m}\ndata: {preferences: rows.jsonl}\n"
LLM = {"base_url": "http://127.0.0.1:8000/v1", "model": "m"}


def _load(tmp_path: Path, judge: str) -> Recipe:
    file = tmp_path / "r.yaml"
    file.write_text(f"{HEAD}eval:\n  judges:\n    x: {judge}\n")
    return load_recipe(file)


def test_the_three_kinds_load_and_dump(tmp_path: Path) -> None:
    kinds = ["{function: 'a:b', kwargs: {c: 1}}", "{votes: votes.jsonl}", "{llm: {base_url: 'https://h/v1', model: m}}"]
    recipes = [_load(tmp_path, kind) for kind in kinds]
    for recipe in recipes:
        again = tmp_path / "again.yaml"
        again.write_text(dump_recipe(recipe))
        assert load_recipe(again) == recipe
    llm = recipes[-1].eval.judges["x"].llm
    assert llm is not None
    assert (llm.api_key_env, llm.temperature, llm.samples_per_prompt, llm.pairs) == ("OPENAI_API_KEY", 0, 1, "baseline")


@pytest.mark.parametrize(
    ("judge", "problem"),
    [
        ("{}", "eval.judges.x: give exactly one of `function`, `llm` and `votes`"),
        ("{function: 'a:b', votes: v.csv}", "eval.judges.x: give exactly one of"),
        ("{votes: v.csv, kwargs: {c: 1}}", "`kwargs` are arguments of a `function`, and this judge is none"),
        ("{llm: {model: m}}", "eval.judges.x.llm.base_url: this key is required"),
        ("{llm: {base_url: 'http://h/v1', modle: m, model: m}}", "eval.judges.x.llm.modle: unknown key. Did you mean"),
        ("{llm: {base_url: 'h:80/v1', model: m}}", "`base_url` is no http:// or https:// address"),
        ("{llm: {base_url: 'http://[::1', model: m}}", "`base_url` is no http:// or https:// address"),
        ("{llm: {base_url: 'http://u:hush@h/v1', model: m}}", "`base_url` holds more than an address"),
        ("{llm: {base_url: 'http://h/v1/chat/completions', model: m}}", "`base_url` names the route too"),
        (
            "{llm: {base_url: 'http://h/v1', model: m, api_key_env: sk-hush}}",
            "`api_key_env` is the name of an environm",
        ),
        ("{llm: {base_url: 'http://h/v1', model: m, price_per_million_input_tokens: 1}}", "give both prices"),
        ("{llm: {base_url: 'http://h/v1', model: m, request: {n: 2}}}", "`request` sets 'n'"),
        (
            "{llm: {base_url: 'http://h/v1', model: m, constrain: true, request: {structured_outputs: {regex: A}}}}",
            "say the same thing",
        ),
        ("{llm: {base_url: 'http://h/v1', model: m, temperature: -1}}", "eval.judges.x.llm.temperature: "),
    ],
)
def test_what_makes_no_sense_is_refused_with_file_and_line(tmp_path: Path, judge: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        _load(tmp_path, judge)
    assert problem in str(caught.value)
    assert "r.yaml:6" in str(caught.value)
    assert "hush" not in str(caught.value)


def test_the_name_of_a_judge_that_keeps_files_is_a_file_s(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"{HEAD}eval:\n  judges:\n    a/b: {{votes: v.csv}}\n")
    with pytest.raises(UserError, match="files are called after judge 'a/b': rename it"):
        load_recipe(file)
    file.write_text(f"{HEAD}eval:\n  judges:\n    a/b: {{function: 'a:b'}}\n")
    assert list(load_recipe(file).eval.judges) == ["a/b"]


def _recipe(rows: Path, judges: dict[str, Any]) -> Recipe:
    judges = {"v": {"function": "a:b", "kwargs": {"file": str(rows)}}, **judges}
    tree = {"name": "t", "model": {"name_or_path": "m"}, "data": {"preferences": str(rows)}, "eval": {"judges": judges}}
    return Recipe.model_validate(tree)


@pytest.mark.parametrize("stage", list(STAGES))
def test_pairwise_judges_decide_no_stage(stage: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    plain = _recipe(rows, {})
    judged = _recipe(rows, {"m": {"llm": {**LLM, "template": str(rows)}}, "people": {"votes": str(rows)}})
    before = fingerprint(plain, stage, {})
    assert fingerprint(judged, stage, {}) == before
    assert named_files(judged, stage) == named_files(plain, stage)
    if "eval" in STAGES[stage].sections:  # as it was when functions were the only judges
        assert before["sections"]["eval"]["judges"] == {"v": {"function": "a:b", "kwargs": {"file": str(rows)}}}
