"""What a comparison leaves for other tools: answer files of AlpacaEval, Arena-Hard and MT-Bench, and W&B tables.

Every file holds the first sample of one method and one seed, under the name `<run>-<method>-seed<k>`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import write_text
from pipeline.recipe import Recipe
from pipeline.tracking import open_wandb

EXPORTS = "exports"
SAMPLE = 0
"""Which sample of each prompt is exported: these tools read one answer per question."""
SHOWN_ROWS = 200
"""Rows of W&B's table of samples."""
CATEGORY = {"arena_hard": "hard_prompt", "mt_bench": "writing"}
"""Categories that the tools' judges have settings for, and that need no reference answers."""
_CODE = re.compile(r"```([^`]*)```")
GUIDE = """\
# Answers for other tools

First sample of every method and seed: {names}. The baseline is {baseline}.

- AlpacaEval: `alpaca_eval --model_outputs alpaca_eval/NAME/model_outputs.json --reference_outputs \
alpaca_eval/{baseline}/model_outputs.json`
- Arena-Hard (arena-hard-auto): copy `arena_hard` to `data/tristage`, set `bench_name: tristage` and `model_list` in the
  setting file, and in `utils/judge_utils.py` the `baseline` of `hard_prompt` to {baseline}.
- MT-Bench (FastChat, `fastchat/llm_judge`): copy `mt_bench` to `data/tristage`, then `gen_judgment.py --bench-name \
tristage --mode pairwise-baseline --baseline-model {baseline}`. Questions have one turn.

The questions are this recipe's held-out prompts, not those of the benchmarks: the numbers compare these methods with
each other and with no leaderboard.
"""

Row = Mapping[str, Any]


def generator(results: Row, method: str, seed: int) -> str:
    """The name of a method's answers: `demo-ppo-seed0`."""
    return f"{results['name']}-{method}-seed{seed}"


def write_exports(results: Row, samples: Sequence[Row], out: Path) -> Path:
    """Writes `out/exports` and returns it: answer files, question files, and a guide; what others put there stays.

    Args:
        results: results.json.
        samples: rows of samples.jsonl; a row's `prompt` is the question, a conversation's turns as one text.
    """
    folder = out / EXPORTS
    rows = [row for row in samples if row["sample"] == SAMPLE]
    for tool in CATEGORY:
        (folder / tool / "model_answer").mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "arena_hard" / "question.jsonl", [_arena_question(row) for row in rows])
    _write_lines(folder / "mt_bench" / "question.jsonl", [_mt_question(row) for row in rows])
    for method in results["methods"]:
        for seed in results["seeds"]:
            name = generator(results, method, seed)
            answers = [(row, _answer(row, method, seed)) for row in rows]
            directory = folder / "alpaca_eval" / name
            directory.mkdir(parents=True, exist_ok=True)
            outputs = [_alpaca_output(row, answer, name, results["name"]) for row, answer in answers]
            write_text(directory / "model_outputs.json", json.dumps(outputs, ensure_ascii=False, indent=1) + "\n")
            file = f"{name}.jsonl"
            _write_lines(
                folder / "arena_hard" / "model_answer" / file, [_arena_answer(*each, name) for each in answers]
            )
            _write_lines(folder / "mt_bench" / "model_answer" / file, [_mt_answer(*each, name) for each in answers])
    names = [f"`{generator(results, method, results['seeds'][0])}`" for method in results["methods"]]
    baseline = generator(results, results["baseline"], results["seeds"][0])
    write_text(folder / "README.md", GUIDE.format(names=", ".join(names) + " ...", baseline=baseline))
    return folder


def _answer(row: Row, method: str, seed: int) -> Row:
    return next(answer for answer in row["answers"][method] if answer["seed"] == seed)


def _uid(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _alpaca_output(row: Row, answer: Row, name: str, dataset: str) -> dict[str, str]:
    return {"instruction": row["prompt"], "output": answer["response"], "generator": name, "dataset": dataset}


def _arena_question(row: Row) -> dict[str, str]:
    category = CATEGORY["arena_hard"]
    return {"uid": _uid(row["prompt"]), "category": category, "subcategory": category, "prompt": row["prompt"]}


def _arena_answer(row: Row, answer: Row, name: str) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": {"answer": answer["response"]}},
    ]
    return {
        "uid": _uid(row["prompt"]),
        "ans_id": _uid(row["prompt"], name),
        "model": name,
        "messages": messages,
        "tstamp": 0.0,
        "metadata": _style(answer["response"], answer["tokens"]),
    }


def _style(text: str, tokens: int) -> dict[str, Any]:
    """What Arena-Hard's style control counts outside code blocks; `token_len` is in the policy's own tokens."""
    plain = _CODE.sub("", text)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, plain, re.MULTILINE))

    return {
        "token_len": max(int(tokens), 1),
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def _mt_question(row: Row) -> dict[str, Any]:
    return {"question_id": row["prompt_index"], "category": CATEGORY["mt_bench"], "turns": [row["prompt"]]}


def _mt_answer(row: Row, answer: Row, name: str) -> dict[str, Any]:
    return {
        "question_id": row["prompt_index"],
        "answer_id": _uid(row["prompt"], name),
        "model_id": name,
        "choices": [{"index": 0, "turns": [answer["response"]]}],
        "tstamp": 0.0,
    }


def _write_lines(file: Path, rows: Sequence[Row]) -> None:
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def log_tables(results: Row, samples: Sequence[Row], recipe: Recipe, out: Path) -> None:
    """Sends headline, win rates, costs and samples as tables, and `out/report.html`, to W&B; nothing where it is off.

    The run is `<recipe's name>/compare`; a comparison that is made again continues it. Raises UserError as every stage
    does when W&B cannot be started.
    """
    if recipe.tracking.wandb == "off":
        return
    import wandb

    run = open_wandb(out, recipe, "compare")
    tables: dict[str, Any] = {
        name: wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
        for name, (columns, rows) in tables_of(results, samples).items()
        if rows
    }
    page = out / "report.html"
    if page.is_file():
        tables["report"] = wandb.Html(str(page))
        artifact = wandb.Artifact(f"{recipe.name}-compare", type="report")
        for file in (page, out / "report.md", out / "results.json"):
            if file.is_file():
                artifact.add_file(str(file))
        run.log_artifact(artifact)
    run.log(tables)
    run.finish()


def tables_of(results: Row, samples: Sequence[Row]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Columns and rows of each table: headline (mean and interval per measure), win_rates, costs, samples."""
    measures = results.get("measures") or {}
    return {
        "headline": (
            ["method", "measure", "mean", "low", "high"],
            [
                [method, name, entry["mean"], entry.get("low"), entry.get("high")]
                for method, entries in measures.items()
                for name, entry in entries.items()
            ],
        ),
        "win_rates": (
            ["judge", "method", "against", "mean", "low", "high", "p_holm", "length_controlled"],
            list(_rate_rows(results.get("win_rates") or {})),
        ),
        "costs": _cost_table(results),
        "samples": (["prompt", "method", "seed", "response", "tokens", "scores"], list(_sample_rows(samples))),
    }


def _rate_rows(rates: Row) -> Iterator[list[Any]]:
    for judge, of in rates.items():
        for method, against in of.items():
            for other, entry in against.items():
                controlled = (entry.get("length_controlled") or {}).get("rate")
                ends = [entry["mean"], entry.get("low"), entry.get("high"), entry.get("p_holm"), controlled]
                yield [judge, method, other, *ends]


def _cost_table(results: Row) -> tuple[list[str], list[list[Any]]]:
    keys = ["wall_seconds", "cpu_seconds", "gpu_seconds", "peak_memory_gib", "peak_gpu_memory_gib", "money"]
    costs = {method: entry for method, entry in results["cost"].items() if method in results["methods"]}
    rows = [[method, *(entry.get(key) for key in keys)] for method, entry in costs.items()]
    return ["method", *keys], rows


def _sample_rows(samples: Sequence[Row]) -> Iterator[list[Any]]:
    """The first samples, a row per answer; scores as JSON, because judges differ from one comparison to the next."""
    first = [row for row in samples if row["sample"] == SAMPLE]
    rows = (
        [row["prompt"], method, answer["seed"], answer["response"], answer["tokens"], json.dumps(answer["scores"])]
        for row in first
        for method, answers in row["answers"].items()
        for answer in answers
    )
    for _, row in zip(range(SHOWN_ROWS), rows, strict=False):
        yield row
