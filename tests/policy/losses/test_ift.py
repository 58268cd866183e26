from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policy.losses.ift import further_tokens, ift_loss, ift_weights, residual_weight, temporal_residual

NAN = math.nan


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual.detach().double(), tensor(expected), rtol=tolerance, atol=tolerance)


# losses 4, 2, 1 and 3; what stands outside the mask must not matter
LOGPROBS = [[NAN, -4.0, -2.0, -1.0, NAN], [NAN, NAN, -3.0, NAN, NAN]]
MASK = torch.tensor([[False, True, True, True, False], [False, False, True, False, False]])
# with gamma 1/2: c = 4 + 1 + 1/4, 2 + 1/2, 1 = 21/4, 10/4, 4/4; their sum is 35/4
WEIGHTS = [3 * 21 / 35, 3 * 10 / 35, 3 * 4 / 35]


def test_the_weights_by_hand() -> None:
    weights = ift_weights(tensor(LOGPROBS), MASK, 0.5)
    close(weights, [[0, *WEIGHTS, 0], [0, 0, 1, 0, 0]])
    close(ift_weights(tensor(LOGPROBS), MASK, 0.0), [[1.0] * 5] * 2)
    # gamma 1 over 6 tokens of loss 1: c = 6, 5, 4, 3, 2, 1
    close(
        ift_weights(-torch.ones(1, 6), torch.ones(1, 6).bool(), 1.0), [[6 * c / 21 for c in (6, 5, 4, 3, 2, 1)]], 1e-6
    )


def test_the_loss_by_hand() -> None:
    logprobs = tensor(LOGPROBS).requires_grad_()
    loss, metrics = ift_loss(logprobs, MASK, gamma=0.5)
    first = (4 * WEIGHTS[0] + 2 * WEIGHTS[1] + 1 * WEIGHTS[2]) / 3
    close(loss, (first + 3) / 2)
    close(metrics["logps"], [-7.0, -3.0])
    assert not metrics["logps"].requires_grad
    close(ift_loss(logprobs, MASK, gamma=0.5, denominator=5)[0], (first + 3) / 5)
    loss.backward()
    assert logprobs.grad is not None
    # Through l W alone the gradient of the last token would be -W/6. The row's loss is q / s, with
    # q = sum l c = 108/4 and s = sum c = 35/4; for the last token dq = l1/4 + l2/2 + 2 l3 = 4 and
    # ds = 1/4 + 1/2 + 1 = 7/4, so that d(q/s) = (4 - 108/35 * 7/4) / (35/4) = -4 (1.4) / 35.
    close(-logprobs.grad[0, 3], (4 - 108 / 35 * 7 / 4) / (35 / 4) / 2)
    close(logprobs.grad[1], [0, 0, -0.5, 0, 0])
    assert logprobs.grad[0, 0] == logprobs.grad[0, 4] == 0


def test_gamma_0_is_the_mean_over_sequences_of_the_mean_over_tokens() -> None:
    close(ift_loss(tensor(LOGPROBS), MASK, gamma=0.0)[0], (7 / 3 + 3) / 2)


def test_without_loss_there_is_neither_loss_nor_gradient() -> None:
    logprobs = torch.tensor([[0.0, 0.0, 0.0], [NAN, -1.0, 0.0], [NAN, NAN, NAN]]).requires_grad_()
    mask = torch.tensor([[True, True, True], [False, True, True], [False, False, False]])
    loss, _ = ift_loss(logprobs, mask, gamma=0.9)
    close(loss, 1.0 * 2 * 1 / 2 / 2)
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
    assert logprobs.grad[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [1e-45, 1e-30, 1e-12, 1e4])
def test_tiny_and_huge_losses_stay_finite(size: float) -> None:
    logprobs = torch.full((1, 50), -size).requires_grad_()
    loss, _ = ift_loss(logprobs, torch.ones(1, 50).bool(), gamma=0.95)
    loss.backward()
    assert logprobs.grad is not None
    assert loss.isfinite()
    assert logprobs.grad.isfinite().all()


def test_half_precision_is_lifted() -> None:
    logprobs = tensor(LOGPROBS).nan_to_num().bfloat16()
    loss, metrics = ift_loss(logprobs, MASK, gamma=0.5)
    assert loss.dtype == metrics["logps"].dtype == ift_weights(logprobs, MASK, 0.5).dtype == torch.float32
    close(loss, (3 * (4 * 21 + 2 * 10 + 4) / 35 / 3 + 3) / 2, 1e-6)


rows = st.lists(st.lists(st.floats(-8, -0.01), min_size=1, max_size=9), min_size=2, max_size=4)


def padded(sequences: list[list[float]], before: int, after: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, sequences)) + before + after
    logprobs = torch.full((len(sequences), width), NAN, dtype=torch.float64)
    for i, row in enumerate(sequences):
        logprobs[i, before : before + len(row)] = tensor(row)
    return logprobs, ~logprobs.isnan()


@settings(max_examples=25, deadline=None)
@given(sequences=rows, gamma=st.sampled_from([0.0, 0.3, 0.95, 1.0]), before=st.integers(0, 3), after=st.integers(0, 3))
def test_padding_and_micro_batches_change_nothing(
    sequences: list[list[float]], gamma: float, before: int, after: int
) -> None:
    """Against the double sum of the definition, one sequence at a time."""
    expected = 0.0
    for row in sequences:
        future = [sum(gamma ** (k - t) * -row[k] for k in range(t, len(row))) for t in range(len(row))]
        weights = [len(row) * c / sum(future) for c in future] if gamma else [1.0] * len(row)
        expected += sum(-lp * w for lp, w in zip(row, weights, strict=True)) / len(row) / len(sequences)
    close(ift_loss(*padded(sequences, before, after), gamma=gamma)[0], expected, 1e-9)
    parts = [ift_loss(*padded(part, 0, after), gamma=gamma, denominator=len(sequences))[0]
             for part in (sequences[:1], sequences[1:])]  # fmt: skip
    close(parts[0] + parts[1], expected, 1e-9)


def test_further_tokens_are_the_models_choice_one_position_earlier() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    predicted = torch.tensor([[11, 12, 13, 14, 15], [16, 17, 18, 19, 20]])
    mask = torch.tensor([[False, False, True, True, False], [True, True, False, False, False]])
    assert further_tokens(predicted, ids, mask).tolist() == [[1, 2, 12, 13, 5], [6, 16, 8, 9, 10]]


def test_the_residual_mixes_the_embeddings() -> None:
    embedded, further = tensor([[[1.0, 2.0]]]), tensor([[[5.0, -2.0]]])
    close(temporal_residual(embedded, further, 0.25), [[[2.0, 1.0]]])
    close(temporal_residual(embedded, further, 0.0), [[[1.0, 2.0]]])
    close(temporal_residual(embedded, further, 1.0), [[[5.0, -2.0]]])


def test_the_noisy_weight_stays_in_0_to_1() -> None:
    assert residual_weight(0.2, 0.5, 1.3) == pytest.approx(0.33)
    assert residual_weight(0.2, 0.0, 1.3) == 0.2
    assert residual_weight(0.2, 0.5, -20.0) == 0
    assert residual_weight(0.4, 0.5, 20.0) == 1


@pytest.mark.parametrize("gamma", [-0.1, 1.1])
def test_a_gamma_outside_0_to_1_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma must lie in"):
        ift_loss(tensor(LOGPROBS), MASK, gamma=gamma)
