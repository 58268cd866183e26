"""What the direct methods train on: prompts with their answers as tokens, and the reference's log-probabilities."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from pipeline.artifacts import write_json
from pipeline.equal_batches import turns
from pipeline.errors import UserError
from pipeline.ranks import ALONE, Ranks
from pipeline.sharding import is_sharded, through
from policy.answers import AnswerBatch, Group, answer_logprobs, collate_answers
from policy.losses.kto import mismatched
from reward_model.score import token_batches

if TYPE_CHECKING:
    from pipeline.encoding import EncodedLabelled, EncodedPair

REFERENCE_TOKENS = 8192
"""Tokens in one forward of the reference."""


@dataclass(frozen=True, slots=True)
class Row:
    """One element of a batch: a prompt and its answers.

    Attributes:
        pairs: (chosen, rejected) answers of the group by number, for the pair methods.
        desirable: the label of the one answer, for KTO.
        other: the same prompt with another prompt's answer, whose log-probabilities estimate KTO's KL.
        reference: log-probability under the reference of each answer of the group, then of `other`'s, nats; () where
            the method has none.
    """

    group: Group
    pairs: tuple[tuple[int, int], ...] = ()
    desirable: bool = True
    other: Group | None = None
    reference: tuple[float, ...] = ()

    @property
    def tokens(self) -> int:
        """Of prompt and answers, which sorts rows into batches of similar length."""
        return self.group.tokens

    @property
    def groups(self) -> tuple[Group, ...]:
        """What the reference reads."""
        return (self.group,) if self.other is None else (self.group, self.other)


class Rows(Dataset[Row]):
    """Rows as a torch data set."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


@dataclass(frozen=True)
class RowCollator:
    """Makes the tensors of a batch; `shared` puts all answers of a prompt into its row."""

    pad_token_id: int
    shared: bool

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The tensors of `AnswerBatch`, and `pairs` [N,2], `desirable` [A], `reference` [A], and those of `other`."""
        batch = collate_answers([row.group for row in rows], self.pad_token_id, shared=self.shared).as_dict()
        starts = [0]
        for row in rows:
            starts.append(starts[-1] + len(row.group.answer_ids))
        pairs = [(start + a, start + b) for start, row in zip(starts, rows, strict=False) for a, b in row.pairs]
        batch["pairs"] = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
        batch["desirable"] = torch.tensor([row.desirable for row in rows])
        if all(row.reference for row in rows):
            values = [value for row in rows for value in row.reference[: len(row.group.answer_ids)]]
            batch["reference"] = torch.tensor(values, dtype=torch.float32)
        others = [row.other for row in rows if row.other is not None]
        if others:
            other = collate_answers(others, self.pad_token_id, shared=False)
            batch |= {f"other_{name}": tensor for name, tensor in other.as_dict().items()}
            batch["other_reference"] = torch.tensor([row.reference[-1] for row in rows], dtype=torch.float32)
        return batch


def pair_rows(pairs: Sequence[EncodedPair]) -> list[Row]:
    """One row per prompt and data row, with every answer once however many pairs it is in."""
    grouped: dict[tuple[str, tuple[int, ...]], list[EncodedPair]] = {}
    for pair in pairs:
        grouped.setdefault((pair.pair.source, tuple(pair.prompt_ids)), []).append(pair)
    rows = []
    for members in grouped.values():
        number: dict[tuple[int, ...], int] = {}
        found = [
            (number.setdefault(tuple(m.chosen_ids), len(number)), number.setdefault(tuple(m.rejected_ids), len(number)))
            for m in members
        ]
        rows.append(Row(Group(members[0].prompt_ids, list(number)), tuple(found)))
    return rows


def label_rows(labelled: Sequence[EncodedLabelled], seed: int) -> list[Row]:
    """One row per answer; each also gets the answer of the next row of a random order, for the KL estimate.

    Which answer that is stays fixed, so that the reference's log-probability of it is computed once.
    Source: Ethayarajh et al., arXiv:2402.01306, section 4.1 (mismatched pairs of a batch).
    """
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(seed)).tolist()
    partner = {row: order[after] for row, after in zip(order, mismatched(len(order)).tolist(), strict=True)}
    return [
        Row(
            Group(row.prompt_ids, [row.response_ids]),
            desirable=row.row.desirable,
            other=Group(row.prompt_ids, [labelled[partner[number]].response_ids]),
        )
        for number, row in enumerate(labelled)
    ]


def with_reference(rows: Sequence[Row], sums: Sequence[float]) -> list[Row]:
    """The rows with the reference's log-probabilities, which stand in `sums` in the order of the rows' answers."""
    values, done = iter(sums), []
    for row in rows:
        answers = sum(len(group.answer_ids) for group in row.groups)
        done.append(replace(row, reference=tuple(next(values) for _ in range(answers))))
    return done


def reference_sums(
    rows: Sequence[Row],
    model: PreTrainedModel,
    pad_token_id: int,
    *,
    shared: bool,
    autocast: Callable[[], AbstractContextManager[Any]],
    ranks: Ranks = ALONE,
) -> list[float]:
    """sum log p of every answer of the rows under `model`, nats, by forwards without a gradient.

    The ranks share the forwards, which are the same ones however many ranks there are; all get all sums.
    """
    groups = [group for row in rows for group in row.groups]
    batches = list(token_batches([group.tokens for group in groups], REFERENCE_TOKENS))
    own: dict[int, list[float]] = {}
    for number, counted in turns(len(batches), ranks, in_step=is_sharded(model)):
        batch = collate_answers([groups[i] for i in batches[number]], pad_token_id, shared=shared)
        moved = AnswerBatch.of({k: v.to(model.device) for k, v in batch.as_dict().items()}, shared=shared)
        with torch.no_grad(), autocast():
            found = through(model, model, partial(answer_logprobs, model, moved)).answers.tolist()
        if counted:
            for value, place in zip(found, batch.group.tolist(), strict=True):
                own.setdefault(batches[number][place], []).append(value)
    sums = {group: values for part in ranks.gather(own) for group, values in part.items()}
    return [value for group in range(len(groups)) for value in sums[group]]


def cached_sums(
    folder: Path, key: Any, rows: Sequence[Row], compute: Callable[[], list[float]], ranks: Ranks = ALONE
) -> tuple[list[float], bool]:
    """What `compute` gives, kept in `folder` under the hash of `key` and the rows' tokens; True where it was there.

    The first rank reads and writes for all; all call `compute`.

    Raises UserError where a sum is not finite.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode())
    for row in rows:
        for group in row.groups:
            digest.update(json.dumps([list(group.prompt_ids), [list(ids) for ids in group.answer_ids]]).encode())
    file = folder / f"{digest.hexdigest()[:32]}.json"
    kept = ranks.broadcast(json.loads(file.read_text()) if ranks.is_main and file.exists() else None)
    if kept is not None:
        return kept, True
    sums = compute()
    if not all(map(math.isfinite, sums)):
        raise UserError(
            "the reference gives log-probabilities that are not finite.",
            mend="Train it anew, or name another one: its weights hold no usable numbers.",
        )
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}.partial")
        write_json(unfinished, sums)
        os.replace(unfinished, file)
    return sums, False
