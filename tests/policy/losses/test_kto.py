from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policy.losses.kto import kto_loss, kto_reference_point, kto_weights, mismatched


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual.detach().double(), tensor(expected), rtol=tolerance, atol=tolerance)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


GOOD = torch.tensor([True, False, True])


def kto(logprobs: Tensor, ref_logprobs: Tensor, desirable: Tensor, z: Tensor, **given: float) -> Tensor:
    return kto_loss(
        logprobs, ref_logprobs, desirable, z, beta=0.5, desirable_weight=1.5, undesirable_weight=2.0, **given
    )[0]


def test_the_loss_by_hand() -> None:
    # r = 2, -1, 0 and z = 1: beta (r - z) = 0.5, -1, -0.5
    logprobs = tensor([-3.0, -5.0, -4.0]).requires_grad_()
    z = tensor(1.0).requires_grad_()
    loss, metrics = kto_loss(
        logprobs, tensor([-5.0, -4.0, -4.0]), GOOD, z, beta=0.5, desirable_weight=1.5, undesirable_weight=2.0
    )
    close(loss, (1.5 * (1 - sigmoid(0.5)) + 2 * (1 - sigmoid(1)) + 1.5 * (1 - sigmoid(-0.5))) / 3)
    close(metrics["rewards/chosen"], [1.0, 0.0])
    close(metrics["rewards/rejected"], [-0.5])
    close(metrics["logps/chosen"], [-3.0, -4.0])
    close(metrics["logps/rejected"], [-5.0])
    close(metrics["rewards/accuracies"], [1.0, 1.0, 0.0])
    assert not any(value.requires_grad for value in metrics.values())
    loss.backward()
    assert z.grad is None
    assert logprobs.grad is not None
    slopes = [weight * 0.5 * sigmoid(x) * sigmoid(-x) / 3 for weight, x in ((-1.5, 0.5), (2, -1), (-1.5, -0.5))]
    close(logprobs.grad, slopes)


def test_the_reference_point_is_a_mean_bounded_at_0_without_gradient() -> None:
    logprobs = tensor([-1.0, -2.0, -3.0]).requires_grad_()
    z = kto_reference_point(logprobs, tensor([-4.0, -2.0, -2.0]))
    close(z, 2 / 3)
    assert not z.requires_grad
    close(kto_reference_point(logprobs, tensor([-4.0, -2.0, -2.0]), 2), 1.0)
    close(kto_reference_point(logprobs, tensor([-1.0, -1.0, -1.0])), 0.0)


def test_a_reward_at_the_reference_point_is_on_neither_side() -> None:
    logprobs = tensor([-3.0, -5.0])
    _, metrics = kto_loss(
        logprobs, logprobs, GOOD[:2], tensor(0.0), beta=0.5, desirable_weight=1.0, undesirable_weight=1.0
    )
    close(metrics["rewards/accuracies"], [0.0, 0.0])


def test_half_precision_is_lifted() -> None:
    # in bfloat16 1.00390625 would be 1, and -300.5 would be -300
    logprobs, ref = tensor([1.0, -300.0]).bfloat16(), tensor([-0.00390625, 0.5]).bfloat16()
    loss, metrics = kto_loss(
        logprobs, ref, GOOD[:2], torch.tensor(0.0), beta=1.0, desirable_weight=1.0, undesirable_weight=1.0
    )
    assert loss.dtype == metrics["logps/chosen"].dtype == metrics["rewards/accuracies"].dtype == torch.float32
    close(metrics["rewards/chosen"], [1.00390625])
    close(metrics["rewards/rejected"], [-300.5])
    close(kto_reference_point(logprobs[:1], ref[:1]), 1.00390625)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.tuples(st.floats(-50, 0), st.floats(-50, 0), st.booleans()), min_size=2, max_size=6),
    z=st.floats(0, 5),
    cut=st.integers(1, 5),
)
def test_micro_batches_add_up(rows: list[tuple[float, float, bool]], z: float, cut: int) -> None:
    cut = min(cut, len(rows) - 1)
    lp, ref, good = (list(column) for column in zip(*rows, strict=True))
    everything = slice(None)
    whole, *parts = [
        kto(tensor(lp[piece]), tensor(ref[piece]), torch.tensor(good[piece]), tensor(z), denominator=len(rows))
        for piece in (everything, slice(cut), slice(cut, None))
    ]
    mean = kto(tensor(lp), tensor(ref), torch.tensor(good), tensor(z))
    close(whole, mean.item(), 1e-9)
    close(parts[0] + parts[1], whole.item(), 1e-9)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.tuples(st.floats(-50, 0), st.booleans()), min_size=2, max_size=6))
def test_at_the_start_every_row_costs_half_its_weight(rows: list[tuple[float, bool]]) -> None:
    lp, good = (list(column) for column in zip(*rows, strict=True))
    z = kto_reference_point(tensor(lp), tensor(lp))
    loss = kto(tensor(lp), tensor(lp), torch.tensor(good), z)
    close(loss, sum(0.75 if each else 1.0 for each in good) / len(rows))


def test_extreme_log_probabilities_stay_finite() -> None:
    logprobs = torch.tensor([-1.0, -9000.0, 0.0, -9000.0]).requires_grad_()
    ref = torch.tensor([-9000.0, -1.0, -9000.0, -1.0])
    loss = kto(logprobs, ref, torch.tensor([True, True, False, False]), torch.tensor(3.0))
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
    close(loss, (0 + 1.5 + 2 + 0) / 4)


def test_the_weights_bring_the_balance_to_the_nearer_bound() -> None:
    assert kto_weights(10, 10) == (1, 1)
    assert kto_weights(15, 10) == (1, 1)
    assert kto_weights(10, 40) == (4, 1)
    assert kto_weights(30, 10) == (1, 2)
    assert kto_weights(16, 10) == (1, pytest.approx(16 / 15))
    for good, bad in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="count must be > 0, got 0"):
            kto_weights(good, bad)


@given(good=st.integers(1, 1000), bad=st.integers(1, 1000))
def test_the_weights_are_never_below_1_and_their_balance_is_in_bounds(good: int, bad: int) -> None:
    desirable, undesirable = kto_weights(good, bad)
    assert min(desirable, undesirable) == 1
    assert 1 - 1e-9 <= desirable * good / (undesirable * bad) <= 1.5 + 1e-9


def test_a_prompt_gets_the_next_rows_answer() -> None:
    assert mismatched(4).tolist() == [1, 2, 3, 0]
    assert mismatched(2).tolist() == [1, 0]
    with pytest.raises(ValueError, match="at least 2"):
        mismatched(1)


@pytest.mark.parametrize("name", ["beta", "desirable_weight", "undesirable_weight"])
def test_wrong_settings_are_refused(name: str) -> None:
    given = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, name: 0.0}
    with pytest.raises(ValueError, match=f"^{name} must be > 0"):
        kto_loss(tensor([-1.0]), tensor([-1.0]), GOOD[:1], tensor(0.0), **given)
