"""Which rows go through a model together, on which rank: slices of a batch of similar length, within a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.ranks import ALONE, Ranks
from reward_model.score import token_batches
from rollout.batch import RolloutBatch

ENOUGH_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens in one forward beyond which a device gains less by more of them than it loses by padding."""


class Slice(NamedTuple):
    """Rows of one forward; where they do not count, they only keep this rank in step with the others."""

    rows: list[int]
    counts: bool = True


def slices(batch: RolloutBatch, max_tokens: int, ranks: Ranks = ALONE, *, in_step: bool = False) -> list[Slice]:
    """This rank's rows in slices of at most `max_tokens` padded tokens, longest first.

    A slice that has work enough for the device is closed where the next row would be mostly padding. Ranks take turns
    in order of length, so that they have about the same work. `in_step` gives all ranks equally many slices, as
    sharded models need: every forward gathers their weights from all ranks.
    """
    each = _slices_by_rank(batch, max_tokens, ranks)
    own = [Slice(rows) for rows in each[ranks.rank]]
    if in_step:
        own += [Slice([0], counts=False)] * (max(map(len, each)) - len(own))
    return own


def micro_batches(batch: RolloutBatch, max_tokens: int) -> list[list[int]]:
    """The rows of `slices` on one rank."""
    return [rows for rows, _ in slices(batch, max_tokens)]


def most_padded_tokens(batch: RolloutBatch, max_tokens: int, ranks: Ranks = ALONE) -> int:
    """Tokens of the slices of the rank that has most of them, padding included."""
    lengths = batch.attention_mask.sum(1).tolist()
    each = _slices_by_rank(batch, max_tokens, ranks)
    return max(sum(len(rows) * max(lengths[row] for row in rows) for rows in own) for own in each)


def _slices_by_rank(batch: RolloutBatch, max_tokens: int, ranks: Ranks) -> list[list[list[int]]]:
    lengths = batch.attention_mask.sum(1).tolist()
    order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    enough = ENOUGH_TOKENS["cuda" if batch.prompt_ids.is_cuda else "cpu"]
    shares: list[Sequence[int]] = [order[rank :: ranks.world] for rank in range(ranks.world)]
    return [
        [[own[i] for i in slice_] for slice_ in token_batches([lengths[row] for row in own], max_tokens, enough)]
        for own in shares
    ]
