"""The answers of all arms side by side: for judges that compare them, and for `samples.jsonl`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.compare.gather import Gathered
from pipeline.recipe_compare import BASELINE


def prompts_and_answers(gathered: Gathered) -> tuple[list[str], dict[str, dict[int, list[list[str]]]]]:
    """The prompts [P] and answers[method][seed][prompt][sample]."""
    prompts = [row["prompt"] for row in gathered.of[BASELINE][0].rows[:: gathered.samples]]
    size = gathered.samples
    answers = {
        method: {
            each.arm.seed: [_texts(each.rows[place * size :][:size]) for place in range(len(prompts))] for each in of
        }
        for method, of in gathered.of.items()
    }
    return prompts, answers


def _texts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [row["response"] for row in rows]


def side_by_side(gathered: Gathered, judges: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of `samples.jsonl`: a prompt and the sample of each method and seed that shares its random numbers."""
    size = gathered.prompts * gathered.samples
    for place in range(size):
        answers = {
            method: [_answer(each.arm.seed, each.rows[place], judges) for each in of]
            for method, of in gathered.of.items()
        }
        row = gathered.of[BASELINE][0].rows[place]
        head = {key: row[key] for key in ("prompt_index", "sample", "prompt")}
        yield {**head, "answers": answers}


def _answer(seed: int, row: Mapping[str, Any], judges: Sequence[str]) -> dict[str, Any]:
    kept = {key: row.get(key) for key in ("response", "finished", "tokens", "score", "kl")}
    return {"seed": seed, **kept, "scores": {name: row[name] for name in judges}}
