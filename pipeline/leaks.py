"""Held-out prompts that a stage trains on: refused before anything is trained or measured."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

from pipeline.data import load_records
from pipeline.errors import UserError
from pipeline.recipe import DataSection
from pipeline.records import Prompt


def refuse_leaks(data: DataSection) -> list[str]:
    """Raises UserError, naming both rows, when a held-out prompt of any data set is also a training prompt of one.

    The data sets are `data.sft`, `data.preferences` and `data.prompts`. Prompts are the same when what decides their
    side of the split (`Prompt.split_key`) is: only rows with `split` columns of their own can be, for the hash of the
    prompt puts equal ones on one side. Returns a sentence for people where held-out prompts differ from training
    prompts in case, whitespace or Unicode form alone.

    Errors:
        UserError: also as `load_records`.
    """
    sources = {"sft": data.sft, "preferences": data.preferences, "prompts": data.prompts}
    splits = {kind: load_records(kind, source, data) for kind, source in sources.items() if source is not None}
    trained_on: dict[str, tuple[str, str]] = {}
    for kind, split in splits.items():
        for prompt, place in _prompts(split.train):
            trained_on.setdefault(prompt.split_key, (f"data.{kind}", place))
    held_out = [(kind, prompt, place) for kind, split in splits.items() for prompt, place in _prompts(split.eval)]
    leaks = [(kind, place, trained_on[p.split_key]) for kind, p, place in held_out if p.split_key in trained_on]
    if leaks:
        kind, place, (key, other_place) = leaks[0]
        more = f" {len(leaks) - 1} more are trained on." if len(leaks) > 1 else ""
        raise UserError(
            f"data.{kind}: the held-out prompt at {place} is also a training prompt of {key}, at {other_place}: a "
            f"policy would be measured on what it learnt.{more}",
            mend="Give both rows the same `split`, or leave that column out of both files; or remove one of them.",
        )
    normal = {_normal(key) for key in trained_on}
    alike = {prompt.split_key for _, prompt, _ in held_out if _normal(prompt.split_key) in normal}
    if not alike:
        return []
    return [f"{len(alike)} held-out prompts differ from a training prompt in case, whitespace or Unicode form alone"]


def _prompts(records: Iterable[Any]) -> Iterable[tuple[Prompt, str]]:
    """Prompts with the places of their rows; a plain text has none."""
    for record in records:
        prompt = record if isinstance(record, Prompt) else record.prompt
        if prompt is not None:
            yield prompt, record.source


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
