from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policy.ppo.maths import (
    ImportanceOptions,
    KLKind,
    PolicyLossOptions,
    StepCounts,
    explained_variance,
    gae,
    importance_weights,
    kl_estimate,
    kl_loss,
    length_penalty,
    missing_eos_penalty,
    policy_loss,
    token_rewards,
    value_loss,
)

T, F = True, False
POISON = float("nan")


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, tensor(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "expected"),
    # d = log 2, 0, -log 4: exp(-d) = 1/2, 1, 4
    [
        ("k1", [math.log(2), 0.0, -math.log(4)]),
        ("k2", [math.log(2) ** 2 / 2, 0.0, math.log(4) ** 2 / 2]),
        ("k3", [1 / 2 - 1 + math.log(2), 0.0, 4 - 1 - math.log(4)]),
    ],
)
def test_kl_estimates_by_hand(kind: KLKind, expected: list[float]) -> None:
    logprobs = tensor([-1.0, -2.0, -3.0])
    ref = logprobs - tensor([math.log(2), 0.0, -math.log(4)])
    close(kl_estimate(logprobs, ref, kind), expected)


def test_k3_is_bounded_and_the_others_are_not() -> None:
    logprobs, ref = tensor([-900.0, -5.0]), tensor([-5.0, -900.0])
    close(kl_estimate(logprobs, ref, "k3"), [10.0, 10.0])
    close(kl_estimate(tensor([-0.5]), tensor([-30.5]), "k3"), [10.0])
    close(kl_estimate(logprobs, ref, "k1"), [-895.0, 895.0])
    close(kl_estimate(logprobs, ref, "k2"), [895.0**2 / 2, 895.0**2 / 2])
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate(logprobs, ref, "k4")  # pyright: ignore[reportArgumentType]


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_k1_and_k3_average_to_the_kl_of_two_distributions(seed: int) -> None:
    p, q = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    p, q = (0.3 * p).log_softmax(0), (0.3 * q).log_softmax(0)
    exact = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    assert (kl_estimate(p, q, "k3") >= 0).all()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * kl_estimate(p, q, kind)).sum(), exact)


def test_penalties_by_hand() -> None:
    scores = tensor([5.0, 1.0, -9.0])
    finished = torch.tensor([T, F, T])
    close(missing_eos_penalty(scores, finished, 2.0), [5.0, -1.0, -9.0])
    assert missing_eos_penalty(scores, finished, None) is scores
    mask = torch.tensor([[T, T, T], [T, F, F], [T, T, F]])
    close(length_penalty(scores, mask, 0.5), [3.5, 0.5, -10.0])


def test_the_score_stands_on_the_last_token_and_kl_on_every_token() -> None:
    mask = torch.tensor([[T, T, F], [T, T, T], [T, F, F], [F, F, F]])
    logprobs = tensor([[-1.0, -2.0, POISON], [-1.0, -1.0, -1.0], [-3.0, POISON, 0.0], [9.0] * 3])
    ref = tensor([[-2.0, -1.5, POISON], [-1.0, -1.0, -3.0], [-3.0, 7.0, 0.0], [POISON] * 3])
    rewards, kl = token_rewards(tensor([10.0, 20.0, 30.0, 40.0]), logprobs, ref, mask, 0.1)
    close(kl, [[1.0, -0.5, 0.0], [0.0, 0.0, 2.0], [0.0] * 3, [0.0] * 3])
    close(rewards, [[-0.1, 10.05, 0.0], [0.0, 0.0, 19.8], [30.0, 0.0, 0.0], [0.0] * 3])


def test_token_rewards_take_the_estimate_asked_for_and_carry_no_gradient() -> None:
    logprobs = tensor([[-1.0, -2.0]]).requires_grad_()
    mask = torch.tensor([[T, T]])
    rewards, kl = token_rewards(tensor([1.0]), logprobs, tensor([[-4.0, -2.0]]), mask, 0.5, "k2")
    close(kl, [[4.5, 0.0]])
    close(rewards, [[-2.25, 1.0]])
    assert not rewards.requires_grad
    assert not kl.requires_grad


def test_gae_by_hand() -> None:
    # gamma = lam = 1/2, backwards: delta_2 = 4 - 2 = 2; delta_1 = 1 + 1 - 4 = -2;
    # A_1 = -2 + 2/4 = -1.5; delta_0 = 0 + 2 - 1 = 1; A_0 = 1 - 1.5/4 = 0.625
    rewards, values = tensor([[0.0, 1.0, 4.0]]), tensor([[1.0, 4.0, 2.0]])
    advantages, returns = gae(rewards, values, torch.tensor([[T, T, T]]), 0.5, 0.5)
    close(advantages, [[0.625, -1.5, 2.0]])
    close(returns, [[1.625, 2.5, 4.0]])


def double_loop(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, straight from the definition."""
    n = len(rewards)
    ahead = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * ahead[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_gae_equals_the_double_loop_whatever_the_padding(seed: int, gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 6, (4,), generator=generator).tolist()
    rewards, values = torch.randn(2, 4, 6, dtype=torch.float64, generator=generator)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    advantages, returns = gae(rewards.where(mask, POISON), values.where(mask, POISON), mask, gamma, lam)
    for i, n in enumerate(lengths):
        expected = double_loop(rewards[i, :n].tolist(), values[i, :n].tolist(), gamma, lam)
        close(advantages[i], expected + [0.0] * (6 - n), 1e-10)
        expected_returns = [a + v for a, v in zip(expected, values[i, :n].tolist(), strict=True)]
        close(returns[i], expected_returns + [0.0] * (6 - n), 1e-10)


def test_gae_carries_no_gradient_into_the_critic() -> None:
    values = tensor([[1.0, 2.0]]).requires_grad_()
    advantages, returns = gae(tensor([[0.0, 1.0]]), values, torch.tensor([[T, T]]), 1.0, 0.95)
    assert not advantages.requires_grad
    assert not returns.requires_grad


RATIOS = [[1.5, 0.5, 1.1], [1.5, 0.5, 1.0]]
ADVANTAGES = [[2.0, 2.0, 2.0], [-2.0, -2.0, 5.0]]


def policy_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    old = tensor([[-1.0, -2.0, -3.0], [-0.5, -1.5, -2.5]])
    mask = torch.tensor([[T, T, T], [T, T, F]])
    logprobs = (old + tensor(RATIOS).log()).where(mask, POISON).requires_grad_()
    return logprobs, old.where(mask, POISON), tensor(ADVANTAGES).where(mask, POISON), mask


def test_policy_loss_by_hand() -> None:
    # A = 2: max(-3, -2.4), max(-1, -1.6), max(-2.2, -2.2); A = -2: max(3, 2.4), max(1, 1.6)
    case = policy_case()
    loss, metrics = policy_loss(*case, PolicyLossOptions(0.2))
    close(loss.detach(), (-2.4 - 1.0 - 2.2 + 3.0 + 1.6) / 5)
    close(metrics["clipfrac"], 2 / 5)
    squares = [math.log(r) ** 2 / 2 for r in (1.5, 0.5, 1.1, 1.5, 0.5)]
    close(metrics["approx_kl"], sum(squares) / 5)
    close(metrics["ratio"], (1.5 + 0.5 + 1.1 + 1.5 + 0.5) / 5)
    assert not any(value.requires_grad for value in metrics.values())
    # gradient -A rho / 5 where the plain term is taken, 0 where the clipped one is
    expected = [[0.0, -1.0 / 5, -2.2 / 5], [3.0 / 5, 0.0, 0.0]]
    close(torch.autograd.grad(loss, case[0])[0], expected)
    finite = case[0].detach().nan_to_num(-2.0).requires_grad_()
    loss, _ = policy_loss(finite, case[1].nan_to_num(-2.0), *case[2:], PolicyLossOptions(0.2))
    close(torch.autograd.grad(loss, finite)[0], expected)


@pytest.mark.parametrize(
    ("options", "total", "clipped"),
    [
        (PolicyLossOptions(0.2, cliprange_high=0.4), -2.8 - 1.0 - 2.2 + 3.0 + 1.6, 2),
        (PolicyLossOptions(0.2, cliprange_high=0.05), -2.1 - 1.0 - 2.1 + 3.0 + 1.6, 3),
        (PolicyLossOptions(0.6), -3.0 - 1.0 - 2.2 + 3.0 + 1.0, 0),
        # -c A = 2.4 bounds the 3.0 and leaves the 1.6 and all of A > 0
        (PolicyLossOptions(0.2, dual_clip=1.2), -2.4 - 1.0 - 2.2 + 2.4 + 1.6, 2),
    ],
)
def test_policy_loss_options_by_hand(options: PolicyLossOptions, total: float, clipped: int) -> None:
    loss, metrics = policy_loss(*policy_case(), options)
    close(loss.detach(), total / 5)
    close(metrics["clipfrac"], clipped / 5)


def test_sequence_mean_and_denominators_by_hand() -> None:
    case = policy_case()
    options = PolicyLossOptions(0.2, reduction="sequence_mean")
    rows = (-2.4 - 1.0 - 2.2) / 3, (3.0 + 1.6) / 2
    loss, metrics = policy_loss(*case, options)
    close(loss.detach(), sum(rows) / 2)
    close(metrics["clipfrac"], 2 / 5)
    loss, metrics = policy_loss(*case, options, denominator=StepCounts(tokens=10, sequences=8))
    close(loss.detach(), sum(rows) / 8)
    close(metrics["clipfrac"], 2 / 10)
    fixed = PolicyLossOptions(0.2, reduction="fixed_length")
    close(policy_loss(*case, fixed)[0].detach(), -1.0 / (2 * 3))
    loss, metrics = policy_loss(*case, fixed, denominator=StepCounts(tokens=10, sequences=8, length=7))
    close(loss.detach(), -1.0 / (8 * 7))
    close(metrics["clipfrac"], 2 / 10)
    loss, metrics = policy_loss(*case, PolicyLossOptions(0.2), denominator=StepCounts(10, 8))
    close(loss.detach(), -1.0 / 10)
    close(metrics["ratio"], 5.1 / 10)
    loss, metrics = policy_loss(*case, PolicyLossOptions(0.2), denominator=20)
    close(loss.detach(), -1.0 / 20)
    close(metrics["approx_kl"] * 20, sum(math.log(r) ** 2 / 2 for r in (1.5, 0.5, 1.1, 1.5, 0.5)))
    with pytest.raises(ValueError, match="StepCounts"):
        policy_loss(*case, options, denominator=20)


@pytest.mark.parametrize("bad", [{"cliprange": 0.0}, {"cliprange": 1.0}, {"cliprange_high": 0.0}, {"dual_clip": 1.0}])
def test_policy_loss_options_are_checked(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        PolicyLossOptions(**bad)  # pyright: ignore[reportArgumentType]


def test_unchanged_policy_has_ratio_1_and_the_policy_gradient() -> None:
    old = torch.full((2, 2), -1.5, dtype=torch.float64)
    logprobs = old.clone().requires_grad_()
    mask = torch.ones(2, 2, dtype=torch.bool)
    advantages = tensor([[1.0, -2.0], [3.0, 0.5]])
    loss, metrics = policy_loss(logprobs, old, advantages, mask, PolicyLossOptions())
    close(metrics["ratio"], 1.0)
    close(metrics["approx_kl"], 0.0)
    close(metrics["clipfrac"], 0.0)
    loss.backward()
    assert logprobs.grad is not None
    close(logprobs.grad, (-advantages / 4).tolist())


def test_a_runaway_ratio_keeps_loss_and_gradient_finite() -> None:
    old = torch.tensor([[-200.0, -0.1]])
    logprobs = torch.tensor([[-0.1, -200.0]]).requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, _ = policy_loss(logprobs, old, torch.tensor([[1.0, -1.0]]), mask, PolicyLossOptions())
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor((-1.2 + 0.8) / 2))
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()


WEIGHTS = {
    ("token", "clamp"): [[0.5, 1.0, 2.0], [2.0, 0.6, 0.0]],
    ("token", "mask"): [[0.0, 1.0, 0.0], [2.0, 0.6, 0.0]],
    # products 0.4 * 1 * 8 = 3.2 and 2 * 0.6 = 1.2
    ("sequence", "clamp"): [[2.0, 2.0, 2.0], [1.2, 1.2, 0.0]],
    ("sequence", "mask"): [[0.0, 0.0, 0.0], [1.2, 1.2, 0.0]],
}


@pytest.mark.parametrize("form", WEIGHTS)
def test_importance_weights_by_hand(form: tuple[Any, Any]) -> None:
    mask = torch.tensor([[T, T, T], [T, T, F]])
    old = tensor([[-1.0, -2.0, -3.0], [-0.5, -1.5, POISON]]).requires_grad_()
    rollout = old.detach() - tensor([[0.4, 1.0, 8.0], [2.0, 0.6, 5.0]]).log()
    weights = importance_weights(old, rollout, mask, ImportanceOptions(*form, low=0.5, high=2.0))
    close(weights, WEIGHTS[form], 1e-12)
    assert not weights.requires_grad
    loss, metrics = policy_loss(*policy_case(), PolicyLossOptions(0.2), weights=weights)
    by_hand = [[-2.4, -1.0, -2.2], [3.0, 1.6, 0.0]]
    close(loss.detach(), float((tensor(WEIGHTS[form]) * tensor(by_hand)).sum()) / 5)
    close(metrics["clipfrac"], 2 / 5)


def test_importance_weights_stay_finite_and_their_bounds_are_checked() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    options = ImportanceOptions(high=1e9)
    close(importance_weights(tensor([[0.0]]), tensor([[-800.0]]), mask, options), [[math.exp(20)]])
    for low, high in [(-0.1, 2.0), (1.1, 2.0), (0.0, 0.9)]:
        with pytest.raises(ValueError, match="got"):
            ImportanceOptions(low=low, high=high)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_loss_has_the_estimate_as_value_and_the_gradient_of_the_kl(kind: Any) -> None:
    # d = log 2, -log 4: value k2 or k3, gradient d
    ref = tensor([[-1.0, -2.0, POISON]])
    logprobs = (ref + tensor([[math.log(2), -math.log(4), 0.0]])).requires_grad_()
    mask = torch.tensor([[T, T, F]])
    value = {
        "k2": (math.log(2) ** 2 + math.log(4) ** 2) / 2,
        "k3": (1 / 2 - 1 + math.log(2)) + (4 - 1 - math.log(4)),
    }[kind]
    loss = kl_loss(logprobs, ref, mask, kind)
    close(loss.detach(), value / 2)
    close(torch.autograd.grad(loss, logprobs)[0], [[math.log(2) / 2, -math.log(4) / 2, 0.0]])
    close(kl_loss(logprobs, ref, mask, kind, denominator=StepCounts(10, 4)).detach(), value / 10)
    close(
        kl_loss(logprobs, ref, mask, kind, denominator=StepCounts(10, 4), reduction="sequence_mean").detach(), value / 8
    )
    with pytest.raises(ValueError, match="k2 or k3"):
        kl_loss(logprobs, ref, mask, "k1")  # pyright: ignore[reportArgumentType]


def test_kl_loss_on_samples_has_the_gradient_of_the_exact_kl() -> None:
    """The expectation over samples is taken exactly: every token of a small vocabulary, weighted by its probability."""
    logits, ref = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits.requires_grad_()
    policy, ref = logits.log_softmax(0), ref.log_softmax(0)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - ref)).sum(), logits, retain_graph=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    probabilities = policy.exp().detach()
    for kind in ("k2", "k3"):
        losses = [kl_loss(policy[i].view(1, 1), ref[i].view(1, 1), mask, kind) for i in range(6)]
        expected = (probabilities * torch.stack(losses)).sum()
        (gradient,) = torch.autograd.grad(expected, logits, retain_graph=True)
        torch.testing.assert_close(gradient, exact, rtol=1e-10, atol=1e-12)


@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from(["token_mean", "sequence_mean", "fixed_length"]))
@settings(max_examples=30, deadline=None)
def test_micro_batches_add_up_to_the_step(seed: int, cut: int, reduction: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    logprobs, old, advantages, values = torch.randn(4, 6, 5, dtype=torch.float64, generator=generator)
    mask = torch.arange(5) < torch.randint(0, 6, (6, 1), generator=generator)
    mask[0, 0] = True
    order = torch.randperm(6, generator=generator)
    options = PolicyLossOptions(reduction=reduction)  # pyright: ignore[reportArgumentType]
    counts = StepCounts(int(mask.sum()), int(mask.any(1).sum()), length=5)

    def both(rows: Tensor, denominator: StepCounts | None) -> list[Tensor]:
        loss, metrics = policy_loss(
            logprobs[rows],
            old[rows],
            advantages[rows],
            mask[rows],
            options,
            denominator=denominator,
        )
        critic_loss, critic = value_loss(
            values[rows],
            old[rows],
            advantages[rows],
            mask[rows],
            cliprange_value=0.2,
            denominator=denominator,
            reduction=options.reduction,
        )
        return [loss, critic_loss, critic["clipfrac"], *metrics.values()]

    whole = torch.stack(both(torch.arange(6), None))
    parts = [torch.stack(both(rows, counts)) for rows in (order[:cut], order[cut:])]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-10, atol=1e-10)


def value_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = torch.tensor([[T, T, T], [T, F, F]])
    values = tensor([[1.0, 2.0, 0.1], [-3.0, 0.0, 0.0]]).where(mask, POISON).requires_grad_()
    old = tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).where(mask, POISON)
    returns = tensor([[1.0, -1.0, 0.5], [-2.0, 0.0, 0.0]]).where(mask, POISON)
    return values, old, returns, mask


def test_value_loss_by_hand() -> None:
    # clipped to +-0.2 of 0: 0.2, 0.2, 0.1, -0.2.
    # (V-G)^2 = 0, 9, 0.16, 1; (clip-G)^2 = 0.64, 1.44, 0.16, 3.24; max 0.64, 9, 0.16, 3.24
    case = value_case()
    loss, metrics = value_loss(*case, cliprange_value=0.2)
    close(loss.detach(), 0.5 * (0.64 + 9 + 0.16 + 3.24) / 4)
    close(metrics["clipfrac"], 2 / 4)
    (gradient,) = torch.autograd.grad(loss, case[0])
    close(gradient, [[0.0, 3 / 4, -0.4 / 4], [0.0, 0.0, 0.0]])


def test_value_loss_options_by_hand() -> None:
    case = value_case()
    loss, metrics = value_loss(*case, cliprange_value=None)
    close(loss.detach(), 0.5 * 10.16 / 4)
    close(metrics["clipfrac"], 0.0)
    loss, _ = value_loss(*case, cliprange_value=None, reduction="sequence_mean")
    close(loss.detach(), 0.5 * (9.16 / 3 + 1) / 2)
    loss, metrics = value_loss(*case, cliprange_value=0.2, denominator=8)
    close(loss.detach(), 0.5 * 13.04 / 8)
    close(metrics["clipfrac"], 2 / 8)
    with pytest.raises(ValueError, match="cliprange_value"):
        value_loss(*case, cliprange_value=0.0)


def test_explained_variance_by_hand() -> None:
    # returns 1, 2, 6: variance 14/3; residuals 1, 0, 2: variance 2/3
    mask = torch.tensor([T, T, T, F])
    returns = tensor([1.0, 2.0, 6.0, POISON])
    values = tensor([0.0, 2.0, 4.0, POISON])
    close(explained_variance(values, returns, mask), 1 - 2 / 14)
    close(explained_variance(returns, returns, mask), 1.0)
    close(explained_variance(torch.zeros_like(returns), returns, mask), 0.0)
    assert explained_variance(values, torch.ones_like(returns), mask).isnan()
