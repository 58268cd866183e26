from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policy.tensors import (
    left_aligned,
    left_pad,
    logprobs_from_hidden,
    logprobs_from_logits,
    masked_mean,
    masked_reduce,
    masked_sum,
    masked_var,
    masked_whiten,
    right_pad,
    shifted_response_hidden,
)

X = torch.tensor([[1.0, 2.0, 90.0], [6.0, 70.0, 80.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, False, False]])
NOTHING = torch.zeros(2, 3, dtype=torch.bool)


def close(actual: Tensor, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


def test_masked_sum_mean_and_variance_by_hand() -> None:
    # 1, 2, 6: sum 9, mean 3, squared deviations 4 + 1 + 9 = 14
    close(masked_sum(X, MASK), 9.0)
    close(masked_mean(X, MASK), 3.0)
    close(masked_mean(X, MASK, 4), 2.25)
    close(masked_mean(X, MASK, torch.tensor(4)), 2.25)
    close(masked_var(X, MASK), 14 / 3)
    close(masked_var(X, MASK, unbiased=True), 7.0)


def test_no_entry_and_one_entry_are_defined() -> None:
    one = NOTHING.clone()
    one[1, 0] = True
    close(masked_mean(X, NOTHING), 0.0)
    for unbiased in (False, True):
        close(masked_var(X, NOTHING, unbiased), 0.0)
        close(masked_var(X, one, unbiased), 0.0)
        close(masked_whiten(X, NOTHING, unbiased=unbiased), [[0.0] * 3] * 2)
        close(masked_whiten(X, one, unbiased=unbiased), [[0.0] * 3] * 2)
    close(masked_whiten(X, one, shift_mean=False), [[0.0] * 3, [6.0, 0.0, 0.0]])


@pytest.mark.parametrize("denominator", [0, -1.0, float("nan")])
def test_a_denominator_that_is_no_count_is_refused(denominator: float) -> None:
    with pytest.raises(ValueError, match="denominator"):
        masked_mean(X, MASK, denominator)


def test_whiten_by_hand() -> None:
    scale = 1 / math.sqrt(14 / 3 + 1e-8)
    close(masked_whiten(X, MASK), [[-2 * scale, -scale, 0], [3 * scale, 0, 0]])
    scale = 1 / math.sqrt(7 + 1e-8)
    close(masked_whiten(X, MASK, unbiased=True), [[-2 * scale, -scale, 0], [3 * scale, 0, 0]])
    scale = 1 / math.sqrt(14 / 3 + 1e-8)
    close(masked_whiten(X, MASK, shift_mean=False), [[3 - 2 * scale, 3 - scale, 0], [3 + 3 * scale, 0, 0]])
    close(masked_whiten(X, MASK, eps=4 / 3), [[-2 / 6**0.5, -1 / 6**0.5, 0], [3 / 6**0.5, 0, 0]])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_is_masked_reaches_neither_value_nor_gradient(poison: float) -> None:
    x = torch.where(MASK, X, poison).requires_grad_()
    parts = [
        masked_mean(x, MASK),
        masked_var(x, MASK),
        masked_whiten(x, MASK).square().sum(),
        masked_reduce(x, MASK, "sequence_mean"),
    ]
    torch.stack(parts).sum().backward()
    assert torch.stack(parts).isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (x.grad[~MASK] == 0).all()


def test_reductions_by_hand() -> None:
    # rows: mean(1, 2) = 1.5 and mean(6) = 6; the third row has no token and is not counted
    x = torch.cat([X, X[:1]])
    mask = torch.cat([MASK, NOTHING[:1]])
    close(masked_reduce(x, mask), 3.0)
    close(masked_reduce(x, mask, "token_mean", 18), 0.5)
    close(masked_reduce(x, mask, "sequence_mean"), 3.75)
    close(masked_reduce(x, mask, "sequence_mean", 5), 1.5)
    close(masked_reduce(x, torch.zeros_like(mask), "sequence_mean"), 0.0)
    with pytest.raises(ValueError, match="reduction"):
        masked_reduce(x, mask, "mean")  # pyright: ignore[reportArgumentType]


@given(st.lists(st.lists(st.floats(-50, 50), min_size=1, max_size=5), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_whitened_values_have_mean_0_variance_1_whatever_the_padding(
    rows: list[list[float]],
) -> None:
    flat = torch.tensor([v for row in rows for v in row], dtype=torch.float64)
    padded = torch.full((len(rows), 7), 1e6, dtype=torch.float64)
    mask = torch.zeros(len(rows), 7, dtype=torch.bool)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
        mask[i, : len(row)] = True
    whitened = masked_whiten(padded, mask)
    assert (whitened[~mask] == 0).all()
    expected = (flat - flat.mean()) / (flat.var(unbiased=False) + 1e-8).sqrt()
    torch.testing.assert_close(whitened[mask], expected, rtol=1e-9, atol=1e-7)


def test_left_aligned_rows_by_hand() -> None:
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 9, 9], [0, 4, 9, 9, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 0, 0]], dtype=torch.bool)
    aligned = left_aligned(ids, mask)
    assert aligned.shape == (3, 3)
    assert aligned[0].tolist() == [5, 6, 7]
    assert aligned[1].tolist() == [1, 2, 3]
    assert aligned[2, 0] == 4
    late = torch.tensor([[False, True], [True, True]])
    assert left_aligned(torch.tensor([[8, 4], [2, 3]]), late).tolist() == [[4, 4], [2, 3]]


def test_padding_by_hand() -> None:
    rows = [[5, 9], [7], [], [1, 2, 9]]
    ids, mask = left_pad(rows, 9)
    assert ids.tolist() == [[9, 5, 9], [9, 9, 7], [9, 9, 9], [1, 2, 9]]
    assert mask.tolist() == [
        [False, True, True],
        [False, False, True],
        [False, False, False],
        [True, True, True],
    ]
    assert (ids.dtype, mask.dtype) == (torch.long, torch.bool)
    ids, mask = right_pad(rows, 9)
    assert ids.tolist() == [[5, 9, 9], [7, 9, 9], [9, 9, 9], [1, 2, 9]]
    assert mask.tolist() == [
        [True, True, False],
        [True, False, False],
        [False, False, False],
        [True, True, True],
    ]
    with pytest.raises(ValueError, match="empty"):
        left_pad([], 0)


@given(st.lists(st.lists(st.integers(0, 99), max_size=6), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_padding_loses_no_token(rows: list[list[int]]) -> None:
    for pad in (left_pad, right_pad):
        ids, mask = pad(rows, 3)
        assert [ids[i][mask[i]].tolist() for i in range(len(rows))] == rows
        assert ids.shape[1] == max(len(row) for row in rows)


def test_logprobs_by_hand() -> None:
    # softmax of log(1, 2, 5) is 1/8, 2/8, 5/8; at temperature 1/2 the weights are squared
    logits = torch.tensor([[1.0, 2.0, 5.0], [5.0, 2.0, 1.0]], dtype=torch.float64).log()
    ids = torch.tensor([1, 0])
    close(logprobs_from_logits(logits, ids), [math.log(1 / 4), math.log(5 / 8)])
    close(logprobs_from_logits(logits, ids, 0.5), [math.log(4 / 30), math.log(25 / 30)])


def test_logprobs_are_computed_in_float32_and_survive_large_logits() -> None:
    logits = torch.tensor([300.0, 100.0, 300.0], dtype=torch.bfloat16)
    logprob = logprobs_from_logits(logits, torch.tensor(1))
    assert logprob.dtype == torch.float32
    close(logprob, -200 - math.log(2), 1e-6)
    assert logprobs_from_logits(logits.double(), torch.tensor(1)).dtype == torch.float64


def dense(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T + (0 if bias is None else bias)
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    return distribution.log_prob(ids), distribution.entropy()


def make(n: int = 7, dim: int = 3, vocab: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((n, dim), (vocab, dim), (vocab,))
    )
    return hidden, weight, bias, torch.randint(vocab, (n,), generator=generator)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunked_scores_and_gradients_equal_the_dense_ones(
    chunk_size: int, temperature: float, with_bias: bool
) -> None:
    hidden, weight, bias_values, ids = make()
    bias = bias_values if with_bias else None
    inputs = [hidden, weight] + ([bias_values] if with_bias else [])
    scores = logprobs_from_hidden(hidden, weight, ids, bias=bias, temperature=temperature, chunk_size=chunk_size)
    logprobs, entropy = dense(hidden, weight, ids, bias, temperature)
    torch.testing.assert_close(scores.logprobs, logprobs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores.entropy, entropy, rtol=1e-12, atol=1e-12)
    w = torch.arange(1.0, 8.0, dtype=torch.float64)
    ours = torch.autograd.grad((w * scores.logprobs + w.square() * scores.entropy).sum(), inputs)
    theirs = torch.autograd.grad((w * logprobs + w.square() * entropy).sum(), inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("with_entropy", [True, False])
def test_gradcheck(with_entropy: bool) -> None:
    hidden, weight, bias, ids = make(n=4)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        scores = logprobs_from_hidden(
            hidden, weight, ids, bias=bias, temperature=1.3, chunk_size=3, with_entropy=with_entropy
        )
        return tuple(scores) if with_entropy else (scores.logprobs,)

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


def test_frozen_weight_and_frozen_hidden_get_no_gradient() -> None:
    hidden, weight, _, ids = make()
    expected = torch.autograd.grad(dense(hidden, weight, ids, None, 1.0)[0].sum(), [hidden, weight])
    only_hidden = logprobs_from_hidden(hidden, weight.detach(), ids, chunk_size=2).logprobs.sum()
    only_weight = logprobs_from_hidden(hidden.detach(), weight, ids, chunk_size=2).logprobs.sum()
    torch.testing.assert_close(torch.autograd.grad(only_hidden, hidden)[0], expected[0])
    torch.testing.assert_close(torch.autograd.grad(only_weight, weight)[0], expected[1])


def test_without_entropy_it_is_nan_and_the_logprobs_stay() -> None:
    hidden, weight, _, ids = make()
    scores = logprobs_from_hidden(hidden, weight, ids, with_entropy=False)
    assert scores.entropy.isnan().all()
    assert not scores.entropy.requires_grad
    torch.testing.assert_close(scores.logprobs, dense(hidden, weight, ids, None, 1.0)[0])


def test_no_rows_a_forbidden_token_and_bad_settings() -> None:
    hidden, weight, bias, ids = make()
    empty = logprobs_from_hidden(hidden[:0], weight, ids[:0])
    assert (empty.logprobs.shape, empty.entropy.shape) == ((0,), (0,))
    forbidden = bias.detach().clone()
    forbidden[2] = -torch.inf
    scores = logprobs_from_hidden(hidden, weight, torch.zeros(7).long(), bias=forbidden)
    kept = torch.tensor([0, 1, 3, 4])
    _, entropy = dense(hidden, weight[kept], torch.zeros(7).long(), bias[kept], 1.0)
    torch.testing.assert_close(scores.entropy, entropy)
    gradient = torch.autograd.grad(scores.entropy.sum() + scores.logprobs.sum(), hidden)[0]
    assert gradient.isfinite().all()
    with pytest.raises(ValueError, match="temperature"):
        logprobs_from_hidden(hidden, weight, ids, temperature=0.0)
    with pytest.raises(ValueError, match="chunk_size"):
        logprobs_from_hidden(hidden, weight, ids, chunk_size=0)
    with pytest.raises(ValueError, match="temperature"):
        logprobs_from_logits(weight, torch.zeros(5).long(), -1.0)


def test_at_most_one_chunk_of_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = torch.log_softmax

    def seen(x: Tensor, dim: int) -> Tensor:
        sizes.append(x.shape[0])
        return real(x, dim=dim)

    monkeypatch.setattr(torch, "log_softmax", seen)
    hidden, weight, _, ids = make()
    logprobs_from_hidden(hidden, weight, ids, chunk_size=3).logprobs.sum().backward()
    assert sizes == [3, 3, 1, 3, 3, 1]


def test_autocast_runs_the_product_in_its_dtype_forward_and_backward() -> None:
    hidden, weight, _, ids = (t.detach() for t in make(dim=64))
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = logprobs_from_hidden(hidden, weight, ids, chunk_size=3).logprobs
        theirs = logprobs_from_logits(hidden @ weight.T, ids)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    exact = logprobs_from_hidden(hidden, weight, ids).logprobs
    assert (ours - exact).abs().max() > 1e-4
    ours_grad = torch.autograd.grad(ours.sum(), [hidden, weight])
    exact_grad = torch.autograd.grad(exact.sum(), [hidden, weight])
    for ours_, exact_ in zip(ours_grad, exact_grad, strict=True):
        assert ours_.dtype == torch.float32
        assert (ours_ - exact_).norm() < 2e-2 * exact_.norm()


def test_response_hidden_is_one_position_early() -> None:
    # prompts of 3 and 1 tokens, R = 2: position 2 predicts token 3 and 3 token 4; 0 predicts 1 and 1 predicts 2
    hidden = torch.arange(5.0).reshape(1, 5, 1).expand(2, 5, 2)
    found = shifted_response_hidden(hidden, torch.tensor([3, 1]), 2)
    assert found[..., 0].tolist() == [[2.0, 3.0], [0.0, 1.0]]
    assert found[..., 1].tolist() == found[..., 0].tolist()
    # a row that ends before R response tokens: its last position, which no mask lets through
    assert shifted_response_hidden(hidden, torch.tensor([4, 1]), 3)[0, :, 0].tolist() == [3.0, 4.0, 4.0]
    with pytest.raises(ValueError, match="prompt"):
        shifted_response_hidden(hidden, torch.tensor([3, 0]), 2)
