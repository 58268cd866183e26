"""The answers of a comparison for the page: packed by column, compressed, and no larger than a page may be."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.report.facts import KL, SCORE, Facts
from pipeline.report.parts import Cell, SampleBrowser, Table
from pipeline.report.wording import counted, finite, number, plain

PACKED_LIMIT = 1_000_000
"""Characters that the packed answers may take in the page."""
EXCERPT = 5
"""Prompts whose answers stand in the Markdown report."""
_DECIMALS = 3
_CUT = 400
_SHORT = {SCORE: "reward model (trained on)", KL: "KL"}


def sample_browser(facts: Facts, samples: Sequence[Mapping[str, Any]]) -> SampleBrowser | None:
    """The answers side by side; None where there are none.

    Where all of them do not fit into `PACKED_LIMIT`, later samples of a prompt are left out first, then prompts.
    """
    if not samples:
        return None
    rows = sorted(samples, key=lambda row: (row["prompt_index"], row["sample"]))
    numbers = sorted({row["sample"] for row in rows})
    kept, packed = _fitting(facts, rows, numbers)
    return SampleBrowser(
        packed,
        _kept_note(rows, kept),
        facts.methods,
        facts.seeds,
        len({row["sample"] for row in kept}),
        [_excerpt(facts, row) for row in rows if row["sample"] == numbers[0]][:EXCERPT],
    )


def _fitting(
    facts: Facts, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]
) -> tuple[Sequence[Mapping[str, Any]], str]:
    for last in reversed(numbers):
        kept = [row for row in rows if row["sample"] <= last]
        packed = pack(facts, kept)
        if len(packed) <= PACKED_LIMIT:
            return kept, packed
    kept = [row for row in rows if row["sample"] == numbers[0]]
    while len(packed := pack(facts, kept)) > PACKED_LIMIT and len(kept) > 1:
        kept = kept[: max(1, int(len(kept) * 0.9 * PACKED_LIMIT / len(packed)))]
    return kept, packed


def _kept_note(rows: Sequence[Mapping[str, Any]], kept: Sequence[Mapping[str, Any]]) -> str:
    prompts, shown = len({row["prompt_index"] for row in rows}), len({row["prompt_index"] for row in kept})
    each, left = len({row["sample"] for row in rows}), len({row["sample"] for row in kept})
    size = f"{counted(prompts, 'prompt')}, {counted(each, 'sample')} each"
    if len(kept) == len(rows):
        return f"All answers: {size}. They also lie in samples.jsonl."
    return f"The page holds {left} of {each} samples of {shown} of {prompts} prompts; samples.jsonl holds all ({size})."


def pack(facts: Facts, rows: Sequence[Mapping[str, Any]]) -> str:
    """JSON of the rows by column, zlib-compressed, in base64: no character of an answer stands in the page's markup.

    The JSON has `judges`, `rows` as [prompt_index, sample, prompt], and `answers[method][seed]` with the columns
    `text`, `tokens`, `finished` and `values` (a list for each judge), null where an answer is missing.
    """
    judges = _judged(rows, facts)
    answers = {
        method: [_columns([_answer(row, method, seed) for row in rows], judges) for seed in facts.seeds]
        for method in facts.methods
    }
    content = {
        "methods": facts.methods,
        "seeds": facts.seeds,
        "judges": [_SHORT.get(name) or facts.judge_title(name) for name in judges],
        "rows": [[row["prompt_index"], row["sample"], _text(row["prompt"])] for row in rows],
        "answers": answers,
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _judged(rows: Sequence[Mapping[str, Any]], facts: Facts) -> list[str]:
    """What answers carry: judges in the order of the recipe, the trained reward, the KL."""
    named: dict[str, None] = {}
    for row in rows:
        for answers in row["answers"].values():
            for answer in answers:
                named |= dict.fromkeys(answer.get("scores") or {})
                named |= {SCORE: None} if finite(answer.get("score")) is not None else {}
    judges = [name for name in facts.judges if name in named] + [n for n in named if n not in (*facts.judges, SCORE)]
    return [*judges, *([SCORE] if SCORE in named and SCORE not in judges else []), KL]


def _answer(row: Mapping[str, Any], method: str, seed: int) -> Mapping[str, Any] | None:
    return next((one for one in row["answers"].get(method, ()) if one["seed"] == seed), None)


def _value(answer: Mapping[str, Any], name: str) -> float | None:
    if name == KL:
        return finite(answer.get("kl"))
    return finite((answer.get("scores") or {}).get(name, answer.get("score") if name == SCORE else None))


def _columns(answers: Sequence[Mapping[str, Any] | None], judges: Sequence[str]) -> dict[str, list[Any]]:
    def rounded(answer: Mapping[str, Any] | None, name: str) -> float | None:
        value = None if answer is None else _value(answer, name)
        return None if value is None else round(value, _DECIMALS)

    return {
        "text": [None if one is None else one["response"] for one in answers],
        "tokens": [None if one is None else one.get("tokens") for one in answers],
        "finished": [None if one is None else int(bool(one.get("finished"))) for one in answers],
        "values": [[rounded(one, name) for one in answers] for name in judges],
    }


def _text(prompt: object) -> str:
    return prompt if isinstance(prompt, str) else plain(prompt)


def _excerpt(facts: Facts, row: Mapping[str, Any]) -> Table:
    seed = facts.seeds[0]
    judges = _judged([row], facts)
    rows = []
    for method in facts.methods:
        answer = _answer(row, method, seed)
        if answer is None:
            rows.append([Cell(method, method=method), Cell("no answer", tone="missing"), *_blanks(judges)])
            continue
        values = [_value(answer, name) for name in judges]
        cells = [Cell("none" if value is None else number(value, _DECIMALS), tone="number") for value in values]
        rows.append([Cell(method, method=method), Cell(_cut(answer["response"]), tone="words"), *cells])
    header = ["method", "answer", *(_SHORT.get(name) or facts.judge_title(name) for name in judges)]
    return Table(f"sample-{row['prompt_index']}", _cut(_text(row["prompt"])), header, rows)


def _blanks(judges: Iterable[str]) -> list[Cell]:
    return [Cell("none", tone="missing") for _ in judges]


def _cut(text: str) -> str:
    text = text.strip() or "(empty)"
    return text if len(text) <= _CUT else f"{text[:_CUT]} ..."
