from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reward_model.losses import (
    bradley_terry_loss,
    pairs_of_ranks,
    plackett_luce_loss,
    ranking_loss,
)


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual.double(), tensor(expected), rtol=tolerance, atol=tolerance)


def nll(difference: float) -> float:
    """-log sigmoid(difference)."""
    return math.log1p(math.exp(-difference))


def logsumexp(*values: float) -> float:
    return math.log(sum(math.exp(value) for value in values))


def test_bradley_terry_by_hand() -> None:
    chosen, rejected = tensor([2.0, 0.0, 1.0]), tensor([1.0, 3.0, 1.0])
    loss, metrics = bradley_terry_loss(chosen, rejected)
    close(loss, (nll(1) + nll(-3) + nll(0)) / 3)
    close(metrics["accuracy"], 1 / 3)
    close(metrics["margin"], -2 / 3)
    assert metrics["pairs"] == 3
    loss, _ = bradley_terry_loss(chosen, rejected, margin=tensor([0.5, 1.0, 0.0]))
    close(loss, (nll(0.5) + nll(-4) + nll(0)) / 3)
    loss, _ = bradley_terry_loss(chosen, rejected, centering=0.1)
    close(loss, (nll(1) + nll(-3) + nll(0)) / 3 + 0.1 * (9 + 9 + 4) / 3)
    loss, metrics = bradley_terry_loss(chosen[:0], rejected[:0])
    close(loss, 0.0)
    close(metrics["accuracy"], 0.0)


def test_pairs_of_ranks_drop_ties_and_put_the_lower_rank_first() -> None:
    better, worse = pairs_of_ranks(torch.tensor([2, 0, 2, 1]))
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [
        (1, 3), (1, 0), (1, 2), (3, 0), (3, 2),
    ]  # fmt: skip
    assert pairs_of_ranks(torch.tensor([1, 1, 1]))[0].tolist() == []
    assert pairs_of_ranks(torch.tensor([0.5, 0.25]))[0].tolist() == [1]


# two prompts: scores 1, 3, 0 ranked 0, 1, 1 (a tie); scores 2, 2.5 ranked 1, 0; the third has no
# ordered pair
SCORES = [[1.0, 3.0, 0.0], [2.0, 2.5, math.nan], [7.0, 7.5, math.nan]]
RANKS = [[0, 1, 1], [1, 0, 0], [4, 4, 0]]
MASK = [[True, True, True], [True, True, False], [True, True, False]]


def case() -> tuple[Tensor, Tensor, Tensor]:
    return tensor(SCORES).requires_grad_(), torch.tensor(RANKS), torch.tensor(MASK)


def test_ranking_loss_by_hand() -> None:
    scores, ranks, mask = case()
    loss, metrics = ranking_loss(scores, ranks, mask)
    close(loss.detach(), ((nll(-2) + nll(1)) / 2 + nll(0.5)) / 2)
    assert {key: metrics[key].item() for key in ("pairs", "ties", "prompts")} == {
        "pairs": 3, "ties": 2, "prompts": 2,
    }  # fmt: skip
    close(metrics["accuracy"], 2 / 3)
    close(metrics["margin"], (-2 + 1 + 0.5) / 3)
    assert not metrics["margin"].requires_grad
    (gradient,) = torch.autograd.grad(loss, scores)
    a, b, c = (1 / (1 + math.exp(d)) for d in (-2, 1, 0.5))
    close(gradient[0], [-(a + b) / 4, a / 4, b / 4])
    close(gradient[1], [c / 2, -c / 2, 0.0])
    close(gradient[2], [0.0, 0.0, 0.0])


def test_ranking_loss_options_by_hand() -> None:
    scores, ranks, mask = (x.detach() for x in case())
    loss, _ = ranking_loss(scores, ranks, mask, reduction="pair_mean")
    close(loss, (nll(-2) + nll(1) + nll(0.5)) / 3)
    loss, _ = ranking_loss(scores, ranks, mask, reduction="pair_mean", denominator=6)
    close(loss, (nll(-2) + nll(1) + nll(0.5)) / 6)
    loss, _ = ranking_loss(scores, ranks, mask, denominator=4)
    close(loss, ((nll(-2) + nll(1)) / 2 + nll(0.5)) / 4)
    margins = tensor([[3.0, 1.0, 1.5], [0.0, 0.5, math.nan], [0.0, 0.0, 0.0]])
    loss, _ = ranking_loss(scores, ranks, mask, margins=margins)
    close(loss, ((nll(-4) + nll(-0.5)) / 2 + nll(0)) / 2)
    loss, _ = ranking_loss(scores, ranks, mask, centering=0.1)
    squares = ((1 + 3) ** 2 + (1 + 0) ** 2) / 2 + (2 + 2.5) ** 2
    close(loss, ((nll(-2) + nll(1)) / 2 + nll(0.5)) / 2 + 0.1 * squares / 2)
    with pytest.raises(ValueError, match="reduction"):
        ranking_loss(scores, ranks, mask, reduction="mean")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="denominator"):
        ranking_loss(scores, ranks, mask, denominator=0)


def test_plackett_luce_by_hand() -> None:
    scores = tensor([[1.0, 3.0, 0.0, 2.0]])
    ranks, mask = torch.tensor([[2, 1, 9, 4]]), torch.ones(1, 4, dtype=torch.bool)
    # order 1, 0, 3, 2
    expected = logsumexp(3, 1, 2, 0) - 3 + logsumexp(1, 2, 0) - 1 + logsumexp(2, 0) - 2
    close(plackett_luce_loss(scores, ranks, mask)[0], expected)
    loss, metrics = plackett_luce_loss(*case())
    # the tied answers 3 and 0 are each compared with nothing: only the best one counts
    first, second = logsumexp(1, 3, 0) - 1, nll(0.5)
    close(loss.detach(), (first + second) / 2)
    assert metrics["prompts"] == 2
    close(plackett_luce_loss(*case(), denominator=8)[0].detach(), (first + second) / 8)
    squares = ((1 + 3) ** 2 + (1 + 0) ** 2) / 2 + (2 + 2.5) ** 2
    loss, _ = plackett_luce_loss(*case(), centering=0.1)
    close(loss.detach(), (first + second + 0.1 * squares) / 2)


def test_plackett_luce_tie_in_the_middle_compares_each_with_those_below() -> None:
    # ranks 0, 1, 1, 2: the two equals never meet
    scores = tensor([[0.5, 1.0, -1.0, 2.0]]).requires_grad_()
    loss, metrics = plackett_luce_loss(scores, torch.tensor([[0, 1, 1, 2]]), torch.ones(1, 4, dtype=torch.bool))
    expected = logsumexp(0.5, 1, -1, 2) - 0.5 + logsumexp(1, 2) - 1 + logsumexp(-1, 2) + 1
    close(loss.detach(), expected)
    assert (metrics["pairs"].item(), metrics["ties"].item()) == (5, 1)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.isfinite().all()


def test_plackett_luce_refuses_what_it_has_not() -> None:
    scores, ranks, mask = case()
    with pytest.raises(ValueError, match="margin"):
        plackett_luce_loss(scores, ranks, mask, margins=torch.zeros_like(scores))
    with pytest.raises(ValueError, match="mean over prompts"):
        plackett_luce_loss(scores, ranks, mask, reduction="pair_mean")


@pytest.mark.parametrize("loss_of", [ranking_loss, plackett_luce_loss])
def test_nothing_to_learn_is_zero_with_a_zero_gradient(loss_of: Callable[..., Any]) -> None:
    scores = tensor([[1.0, 2.0], [3.0, 4.0]]).requires_grad_()
    mask = torch.tensor([[True, True], [True, False]])
    loss, metrics = loss_of(scores, torch.zeros(2, 2).long(), mask)
    close(loss.detach(), 0.0)
    assert metrics["pairs"] == metrics["prompts"] == 0
    close(torch.autograd.grad(loss, scores)[0], [[0.0, 0.0], [0.0, 0.0]])


@pytest.mark.parametrize("loss_of", [ranking_loss, plackett_luce_loss])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_two_answers_are_bradley_terry(loss_of: Callable[..., Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(5, 2, dtype=torch.float64, generator=generator)
    flipped = torch.rand(5, generator=generator) < 0.5
    ranks = torch.stack([flipped, ~flipped], dim=1).long()
    best = torch.where(flipped, scores[:, 1], scores[:, 0])
    worst = torch.where(flipped, scores[:, 0], scores[:, 1])
    expected, of_pairs = bradley_terry_loss(best, worst, centering=0.01)
    loss, metrics = loss_of(scores, ranks, torch.ones(5, 2, dtype=torch.bool), centering=0.01)
    torch.testing.assert_close(loss, expected)
    for key in ("accuracy", "margin"):
        torch.testing.assert_close(metrics[key], of_pairs[key])


@pytest.mark.parametrize("loss_of", [ranking_loss, plackett_luce_loss])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_padding_order_and_micro_batches_do_not_matter(loss_of: Callable[..., Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(4, 4, dtype=torch.float64, generator=generator)
    ranks = torch.randint(0, 3, (4, 4), generator=generator)
    mask = torch.rand(4, 4, generator=generator) < 0.8
    ranks[0, 0], ranks[0, 1], mask[0] = 0, 1, True
    loss, metrics = loss_of(scores, ranks, mask)
    order = torch.randperm(4, generator=generator)
    permuted = [x[:, order] for x in (scores, ranks, mask)]
    torch.testing.assert_close(loss_of(*permuted)[0], loss)
    padded = [torch.cat([x, torch.zeros_like(x)], dim=1) for x in (scores, ranks, mask)]
    torch.testing.assert_close(loss_of(*padded)[0], loss)
    shifted = loss_of(scores + 5.0, ranks * 10 + 3, mask)[0]
    torch.testing.assert_close(shifted, loss)
    prompts = int(metrics["prompts"])
    parts = [
        loss_of(scores[rows], ranks[rows], mask[rows], denominator=prompts)[0] for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(parts[0] + parts[1], loss)


@given(st.integers(0, 10_000), st.integers(2, 4))
@settings(max_examples=20, deadline=None)
def test_plackett_luce_probabilities_of_all_orders_sum_to_1(seed: int, k: int) -> None:
    scores = torch.randn(1, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ranks = torch.tensor(list(permutations(range(k))))
    mask = torch.ones(1, k, dtype=torch.bool)
    losses = [plackett_luce_loss(scores, row[None], mask)[0] for row in ranks]
    close(torch.stack(losses).neg().exp().sum(), 1.0)
