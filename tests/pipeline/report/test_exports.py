"""Files for other tools, checked by what their readers look up.

AlpacaEval's `evaluate` reads a JSON list into a table, needs `instruction` and `output`, takes the name from the one
value of `generator`, and matches reference outputs by instruction. Arena-Hard's `load_model_answers` names a model by
its file and finds answers by `uid`; its judge reads `messages[-1].content.answer` and the question's `category` and
`prompt`; its style control sums the integers of `metadata`, `token_len` first. FastChat's `check_data` wants an answer
to every `question_id`; its judge reads `choices[0].turns[0]` and the question's `turns` and `category`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.recipe import Recipe
from pipeline.report.exports import log_tables, tables_of, write_exports

PROMPTS = ["tell me\u2028of films", "and of books"]
METHODS = ["sft", "dpo"]
SEEDS = [0, 1]


def response(method: str, seed: int, prompt: int, sample: int) -> str:
    return f"{method} {seed} {prompt} {sample}"


def results() -> dict[str, Any]:
    rate = {"mean": 0.75, "low": 0.6, "high": 0.9, "p_holm": 0.01, "length_controlled": {"rate": 0.7}}
    estimate = {"mean": 0.5, "low": None, "high": None, "per_seed": [0.5, 0.5]}
    return {
        "name": "demo",
        "methods": METHODS,
        "baseline": "sft",
        "seeds": SEEDS,
        "measures": {method: {"gold": estimate} for method in METHODS},
        "win_rates": {
            "gold": {"dpo": {"sft": rate}, "sft": {"dpo": {**rate, "mean": 0.25, "length_controlled": None}}}
        },
        "cost": {"sft": {"wall_seconds": 3.0, "money": None}, "dpo": {"wall_seconds": 6.0}, "judges": {}},
    }


def samples() -> list[dict[str, Any]]:
    return [
        {
            "prompt_index": index,
            "sample": sample,
            "prompt": prompt,
            "answers": {
                method: [
                    {
                        "seed": seed,
                        "response": response(method, seed, index, sample),
                        "finished": True,
                        "tokens": 7,
                        "scores": {"gold": 0.5},
                        "score": None,
                        "kl": 0.1,
                    }
                    for seed in SEEDS
                ]
                for method in METHODS
            },
        }
        for index, prompt in enumerate(PROMPTS)
        for sample in range(2)
    ]


def lines(file: Path) -> list[dict[str, Any]]:
    """A line ends at a newline only, as when a file is iterated."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def test_alpaca_eval_finds_its_outputs(tmp_path: Path) -> None:
    folder = write_exports(results(), samples(), tmp_path) / "alpaca_eval"
    assert sorted(path.name for path in folder.iterdir()) == [
        "demo-dpo-seed0",
        "demo-dpo-seed1",
        "demo-sft-seed0",
        "demo-sft-seed1",
    ]
    rows = json.loads((folder / "demo-dpo-seed1" / "model_outputs.json").read_text())
    assert rows == [
        {"instruction": PROMPTS[0], "output": "dpo 1 0 0", "generator": "demo-dpo-seed1", "dataset": "demo"},
        {"instruction": PROMPTS[1], "output": "dpo 1 1 0", "generator": "demo-dpo-seed1", "dataset": "demo"},
    ]
    reference = json.loads((folder / "demo-sft-seed0" / "model_outputs.json").read_text())
    assert [row["instruction"] for row in reference] == [row["instruction"] for row in rows]


def test_arena_hard_finds_questions_and_answers(tmp_path: Path) -> None:
    folder = write_exports(results(), samples(), tmp_path) / "arena_hard"
    questions = lines(folder / "question.jsonl")
    assert [question["prompt"] for question in questions] == PROMPTS
    assert all(question["category"] in ("hard_prompt", "creative_writing") for question in questions)
    assert len({question["uid"] for question in questions}) == 2
    for file in (folder / "model_answer").glob("*.jsonl"):
        by_uid = {row["uid"]: row for row in lines(file)}
        for question in questions:
            row = by_uid[question["uid"]]
            assert row["model"] == file.stem
            assert row["messages"][0] == {"role": "user", "content": question["prompt"]}
            assert row["messages"][-1]["content"]["answer"].startswith(file.stem.split("-")[1])
            values = [v if isinstance(v, int) else sum(v.values()) for v in row["metadata"].values()]
            assert values == [7, 0, 0, 0]
            assert next(iter(row["metadata"])) == "token_len"


def test_style_is_counted_outside_code(tmp_path: Path) -> None:
    rows = samples()
    text = "# Title\n## Part\n1. one\n2. two\n- point\n**bold** and __bold__\n```\n# no title\n- no point\n```\n"
    rows[0]["answers"]["sft"][0]["response"] = text
    folder = write_exports(results(), rows, tmp_path) / "arena_hard" / "model_answer"
    style = lines(folder / "demo-sft-seed0.jsonl")[0]["metadata"]
    assert style == {
        "token_len": 7,
        "header_count": {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 2, "unordered": 1},
        "bold_count": {"**": 1, "__": 1},
    }


def test_mt_bench_finds_questions_and_answers(tmp_path: Path) -> None:
    folder = write_exports(results(), samples(), tmp_path) / "mt_bench"
    questions = lines(folder / "question.jsonl")
    assert [(question["question_id"], question["turns"]) for question in questions] == [
        (0, [PROMPTS[0]]),
        (1, [PROMPTS[1]]),
    ]
    needs_reference = ("math", "reasoning", "coding", "arena-hard-200")
    assert all(question["category"] not in needs_reference for question in questions)
    for file in (folder / "model_answer").glob("*.jsonl"):
        by_id = {row["question_id"]: row for row in lines(file)}
        assert all(question["question_id"] in by_id for question in questions)
        _, method, seed = file.stem.split("-")
        assert by_id[1]["choices"] == [{"index": 0, "turns": [response(method, int(seed[-1]), 1, 0)]}]
        assert by_id[1]["model_id"] == file.stem


def test_exports_are_the_same_each_time_and_what_others_put_there_stays(tmp_path: Path) -> None:
    def contents() -> dict[str, bytes]:
        return {str(file): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    write_exports(results(), samples(), tmp_path)
    before = contents()
    paid_for = tmp_path / "exports" / "alpaca_eval" / "annotations.json"
    paid_for.write_text("[]")
    write_exports(results(), samples(), tmp_path)
    assert contents() == before | {str(paid_for): b"[]"}
    guide = (tmp_path / "exports" / "README.md").read_text()
    assert "--baseline-model demo-sft-seed0" in guide


def test_tables_hold_headline_win_rates_costs_and_first_samples() -> None:
    tables = tables_of(results(), samples())
    assert tables["headline"][1] == [["sft", "gold", 0.5, None, None], ["dpo", "gold", 0.5, None, None]]
    assert tables["win_rates"][1][0] == ["gold", "dpo", "sft", 0.75, 0.6, 0.9, 0.01, 0.7]
    assert tables["win_rates"][1][1][-1] is None
    assert [row[:2] for row in tables["costs"][1]] == [["sft", 3.0], ["dpo", 6.0]]
    columns, rows = tables["samples"]
    assert columns == ["prompt", "method", "seed", "response", "tokens", "scores"]
    assert len(rows) == len(PROMPTS) * len(METHODS) * len(SEEDS)
    assert rows[0] == [PROMPTS[0], "sft", 0, "sft 0 0 0", 7, '{"gold": 0.5}']


def recipe(wandb: str) -> Recipe:
    return Recipe.model_validate({"name": "demo", "model": {"name_or_path": "m"}, "tracking": {"wandb": wandb}})


def test_nothing_goes_to_wandb_where_it_is_off(tmp_path: Path) -> None:
    log_tables(results(), samples(), recipe("off"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_wandb_offline_holds_the_tables_and_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_ARTIFACT_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    out = tmp_path / "demo" / "compare"
    out.mkdir(parents=True)
    (out / "report.html").write_text("<!doctype html><title>the page</title>")
    (out / "results.json").write_text(json.dumps(results()))
    log_tables(results(), samples(), recipe("offline"), out)
    log_tables(results(), samples(), recipe("offline"), out)
    runs = sorted((tmp_path / "demo" / "wandb").glob("offline-run-*"))
    assert runs
    assert all(run.name.endswith((out / "wandb_id.txt").read_text()) for run in runs)
    media = [path for run in runs for path in (run / "files" / "media").rglob("*") if path.is_file()]
    tables = {path.name.split("_")[0] if "win" not in path.name else "win_rates" for path in media}
    assert {"headline", "win_rates", "costs", "samples", "report"} <= tables
    table = json.loads(next(path for path in media if path.name.startswith("win_rates")).read_text())
    assert table["data"][0] == ["gold", "dpo", "sft", 0.75, 0.6, 0.9, 0.01, 0.7]
    page = next(path for path in media if path.suffix == ".html").read_text()
    assert "the page" in page
