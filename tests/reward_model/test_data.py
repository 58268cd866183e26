"""Rankings become batches without losing an answer, a rank or the order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.tokens import EncodedRanking
from reward_model.data import (
    LengthGroupedSampler,
    ModelLimits,
    RankingCollator,
    check_rankings,
    ordered_pairs,
    ranking_dataset,
    with_ordered_pair,
)
from tests.reward_model.tiny import EOS, PAD, random_rankings

LIMITS = ModelLimits(vocabulary=40, positions=8, pad_token_id=PAD)


def test_ordered_pairs_drop_ties() -> None:
    # A > B = C > D: AB AC AD BD CD, no BC
    assert ordered_pairs((0, 1, 1, 2)) == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    assert ordered_pairs((1, 0)) == [(1, 0)]


def test_all_tied_rankings_are_left_out() -> None:
    tied = EncodedRanking([1], [[3], [4]], (1.0, 1.0), None)
    ordered = EncodedRanking([1], [[3], [4], [5]], (1.0, 1.0, 0.0), None)
    assert with_ordered_pair([tied, ordered]) == [ordered]


def rows_of(rankings: list[EncodedRanking]) -> list[dict[str, Any]]:
    return list(ranking_dataset(rankings))  # pyright: ignore[reportReturnType]


def test_a_batch_by_hand() -> None:
    rankings = [
        EncodedRanking([1], [[3, EOS], [4, 5, EOS]], (1.0, 0.0), (-1.0, 2.0)),
        EncodedRanking([1, 6], [[7], [8], [9]], (0.0, 2.0, 1.0), (3.0, 0.5, 1.0)),
    ]
    batch = RankingCollator(PAD, with_ratings=True)(rows_of(rankings))
    assert next(iter(batch)) == "mask"
    assert batch["mask"].tolist() == [[True, True, False], [True, True, True]]
    assert batch["input_ids"].tolist() == [
        [1, 3, EOS, PAD],
        [1, 4, 5, EOS],
        [1, 6, 7, PAD],
        [1, 6, 8, PAD],
        [1, 6, 9, PAD],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [3, 4, 3, 3, 3]
    assert batch["ranks"].tolist() == [[1.0, 0.0, 0.0], [0.0, 2.0, 1.0]]
    assert batch["ratings"].tolist() == [[-1.0, 2.0, 0.0], [3.0, 0.5, 1.0]]


def test_ratings_stay_out_unless_wanted() -> None:
    rankings = [EncodedRanking([1], [[3], [4]], (0.0, 1.0), None)]
    assert "ratings" not in RankingCollator(PAD)(rows_of(rankings))


def test_lengths_are_those_of_the_longest_answer() -> None:
    dataset = ranking_dataset([EncodedRanking([1, 6], [[3], [4, 5, 6]], (0.0, 1.0), None)])
    assert dataset["length"] == [5]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 5), st.integers(0, 3))
def test_sampler_gives_every_index_once_and_the_same_order_again(count: int, batch: int, seed: int, epoch: int) -> None:
    lengths = [(7 * index) % 13 + 1 for index in range(count)]
    first = LengthGroupedSampler(lengths, batch, seed)
    first.set_epoch(epoch)
    order = list(first)
    assert sorted(order) == list(range(count))
    torch.rand(1)  # the global generator has no part in it
    again = LengthGroupedSampler(lengths, batch, seed)
    again.set_epoch(epoch)
    assert list(again) == order
    assert max(lengths[index] for index in order[:batch]) == max(lengths) or count < batch


def test_sampler_orders_differ_between_epochs_and_group_lengths() -> None:
    lengths = [index % 10 + 1 for index in range(200)]
    sampler = LengthGroupedSampler(lengths, 10, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    batches = [[lengths[i] for i in first[at : at + 10]] for at in range(0, 200, 10)]
    assert all(max(batch) - min(batch) <= 1 for batch in batches)
    # neither from long to short nor from short to long
    tops = [max(batch) for batch in batches]
    assert tops not in (sorted(tops), sorted(tops, reverse=True))


def test_good_rankings_pass() -> None:
    check_rankings(random_rankings(6, seed=0), ModelLimits(40, 96, PAD))
    check_rankings(random_rankings(6, seed=0), ModelLimits(40, None, PAD))


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ([1, 2, 3, 4], [5, 6, 7, 8, EOS], "9 tokens, the model has 8 positions"),
        ([1], [40, EOS], "token 40, the model knows 40"),
        ([40], [3, EOS], "token 40, the model knows 40"),
        ([1], [3, PAD], "padding token"),
    ],
)
def test_what_the_model_would_misread_is_refused(prompt: list[int], answer: list[int], text: str) -> None:
    with pytest.raises(UserError, match=text):
        check_rankings([EncodedRanking(prompt, [[3], answer], (0.0, 1.0), None)], LIMITS)
