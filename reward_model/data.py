"""Rankings as training rows: one row per prompt with all its answers, batches without a worker process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler

from pipeline.errors import UserError
from pipeline.tokens import EncodedRanking
from reward_model.score import right_pad

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments

MEGABATCH = 50
"""Batches that are sorted by length together: enough to pad little, few enough to stay random."""


def ordered_pairs(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """(better, worse) positions of every pair with different ranks; ties make no pair.

    Source: InstructGPT (arXiv 2203.02155), eq. 1: all comparisons of one prompt.
    """
    return [
        (i, j) if ranks[i] < ranks[j] else (j, i) for i, j in combinations(range(len(ranks)), 2) if ranks[i] != ranks[j]
    ]


def with_ordered_pair(rankings: Sequence[EncodedRanking]) -> list[EncodedRanking]:
    """The rankings from which a pairwise loss can learn: at least two answers of different rank."""
    return [ranking for ranking in rankings if len(set(ranking.ranks)) > 1]


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the model and its tokenizer can take, for `check_rankings`."""

    vocabulary: int
    positions: int | None
    pad_token_id: int


def check_rankings(rankings: Sequence[EncodedRanking], limits: ModelLimits) -> None:
    """Refuse rankings that the model would read wrongly.

    Raises UserError for a token outside the vocabulary, for a sequence beyond the model's positions, and for an
    answer that ends in the padding token: sequence classifiers of transformers look for the last token that is not
    padding, so such an answer would be scored one token too early.
    """
    for ranking in rankings:
        for answer in ranking.response_ids:
            length = len(ranking.prompt_ids) + len(answer)
            if limits.positions is not None and length > limits.positions:
                raise UserError(
                    f"a prompt and answer of data.preferences have {length} tokens, the model has "
                    f"{limits.positions} positions.",
                    mend="Lower data.max_prompt_tokens or data.max_response_tokens.",
                )
            highest = max(max(ranking.prompt_ids, default=0), max(answer))
            if highest >= limits.vocabulary:
                raise UserError(
                    f"the tokenizer gives token {highest}, the model knows {limits.vocabulary} tokens.",
                    mend="Use the tokenizer that belongs to the model, or resize the model's embeddings.",
                )
            if answer[-1] == limits.pad_token_id:
                raise UserError(
                    "an answer of data.preferences was cut so that it ends in the text of the padding token.",
                    mend="Take the token out of the answer or set model.pad_token to one that the text never uses.",
                )


def ranking_dataset(rankings: Sequence[EncodedRanking]) -> Dataset:
    """The rankings as a `datasets.Dataset`, one row per prompt.

    Columns: `responses` (K token lists, each prompt + answer), `ranks` [K], `ratings` [K] or null, and `length`, the
    longest of the K in tokens.
    """
    from datasets import Dataset

    rows = [[[*ranking.prompt_ids, *answer] for answer in ranking.response_ids] for ranking in rankings]
    return Dataset.from_dict(
        {
            "responses": rows,
            "ranks": [list(ranking.ranks) for ranking in rankings],
            "ratings": [None if r.ratings is None else list(r.ratings) for r in rankings],
            "length": [max(len(row) for row in answers) for answers in rows],
        }
    )


@dataclass(frozen=True, slots=True)
class RankingCollator:
    """Makes a batch of B prompts: their N answers as rows of one right-padded matrix.

    `mask` [B, K] True where a prompt has a k-th answer (K = most answers in the batch); row n of `input_ids` and
    `attention_mask` [N, S] is the n-th True of `mask`, read row by row. `ranks` and, `with_ratings`, `ratings` are
    [B, K] float32, zero where there is no answer. `mask` comes first: the libraries read B off the first tensor.
    """

    pad_token_id: int
    with_ratings: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of these rows of `ranking_dataset`."""
        width = max(len(row["ranks"]) for row in rows)
        mask = torch.tensor([[k < len(row["ranks"]) for k in range(width)] for row in rows])
        input_ids, attention_mask = right_pad(
            [answer for row in rows for answer in row["responses"]], self.pad_token_id
        )
        batch = {"mask": mask, "input_ids": input_ids, "attention_mask": attention_mask}
        for column in ("ranks", "ratings") if self.with_ratings else ("ranks",):
            values = torch.zeros(mask.shape)
            values[mask] = torch.tensor([value for row in rows for value in row[column]])
            batch[column] = values
        return batch


class LengthGroupedSampler(Sampler[int]):
    """Every index once, in batches of similar length in random order; the longest full batch comes first.

    The order is a function of (seed, epoch) alone, so a resumed epoch goes on exactly where it stopped.
    transformers' sampler of the same name draws from the global generator and runs from long to short.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        span = self.batch_size * MEGABATCH
        batches = []
        for start in range(0, len(order), span):
            ordered = sorted(order[start : start + span], key=lambda i: self.lengths[i], reverse=True)
            batches += [ordered[at : at + self.batch_size] for at in range(0, len(ordered), self.batch_size)]
        last = batches.pop() if len(batches[-1]) < self.batch_size and len(batches) > 1 else None
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        longest = max(range(len(batches)), key=lambda b: max(self.lengths[i] for i in batches[b]))
        batches[0], batches[longest] = batches[longest], batches[0]
        yield from (index for batch in [*batches, *([last] if last else [])] for index in batch)


def training_order(args: TrainingArguments, lengths: Sequence[int]) -> Sampler[int]:
    """The order of the rows that have these lengths, one epoch after the other, by `train_sampling_strategy`.

    It depends on the seed, the epoch and the rows of an optimiser step over all ranks alone, so that any number of
    ranks takes the same steps.

    Errors:
        UserError: a strategy that gives the ranks rows by their lengths.
    """
    seed, strategy = args.seed if args.data_seed is None else args.data_seed, args.train_sampling_strategy
    if strategy == "group_by_length":
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return LengthGroupedSampler(lengths, step, seed)
    if strategy == "sequential":
        return SequentialSampler(lengths)
    if strategy == "random":
        from accelerate.data_loader import SeedableRandomSampler

        return SeedableRandomSampler(lengths, data_seed=seed)
    raise UserError(
        f"trainer.train_sampling_strategy: {strategy} is none that the stages know.",
        mend="Set it to random, group_by_length or sequential.",
    )
