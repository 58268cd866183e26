"""Held-out prompts that a stage trains on: refused before anything is trained or measured."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

from pipeline.data import load_records, prompts_source
from pipeline.errors import UserError
from pipeline.recipe import DataSection
from pipeline.records import Prompt


def refuse_leaks(data: DataSection) -> None:
    """Raises UserError, naming both rows, when a held-out prompt is also a training prompt of any data set.

    Held out are the prompts that `load_prompts` holds out, which leaves such ones out where a single stage asks for
    them; trained on are those of `data.sft`, `data.preferences` and `data.prompts`. Prompts are the same when what
    decides their side of the split (`Prompt.split_key`) is, case, whitespace and Unicode forms aside. Only rows with
    `split` columns of their own can leak: the hash of the prompt puts equal ones on one side.

    Errors:
        UserError: also as `load_records`.
    """
    sources = {"sft": data.sft, "preferences": data.preferences, "prompts": data.prompts}
    splits = {kind: load_records(kind, source, data) for kind, source in sources.items() if source is not None}
    held_out_kind, _ = prompts_source(data)
    trained_on: dict[str, tuple[str, Prompt, str]] = {}
    for kind, split in splits.items():
        for prompt, place in _prompts(split.train):
            trained_on.setdefault(_normal(prompt), (f"data.{kind}", prompt, place))
    held_out = _prompts(splits[held_out_kind].eval) if held_out_kind in splits else []
    found = [(prompt, place, trained_on.get(_normal(prompt))) for prompt, place in held_out]
    leaks = [(prompt, place, row) for prompt, place, row in found if row is not None]
    if leaks:
        prompt, place, (key, other, other_place) = leaks[0]
        alike = "is" if prompt == other else "is, but for case, whitespace or later turns,"
        more = f" {len(leaks) - 1} more are trained on." if len(leaks) > 1 else ""
        raise UserError(
            f"data.{held_out_kind}: the held-out prompt at {place} {alike} also a training prompt of {key}, at "
            f"{other_place}: a policy would be measured on what it learnt.{more}",
            mend="Give both rows the same `split`, or leave that column out of both files; or remove one of them.",
        )


def _prompts(records: Iterable[Any]) -> Iterable[tuple[Prompt, str]]:
    """Prompts with the places of their rows; a plain text has none."""
    for record in records:
        prompt = record if isinstance(record, Prompt) else record.prompt
        if prompt is not None:
            yield prompt, record.source


def _normal(prompt: Prompt) -> str:
    return " ".join(unicodedata.normalize("NFKC", prompt.split_key).casefold().split())
