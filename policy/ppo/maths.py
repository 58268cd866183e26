"""The arithmetic of PPO: KL estimates, token rewards, advantages, importance weights, clipped losses.

Shapes: B sequences, R response positions, right-padded; `response_mask` [B,R] is True on the
sampled tokens, a prefix of each row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from policy.tensors import Reduction, masked_mean, masked_reduce, masked_var

KLKind = Literal["k1", "k2", "k3"]
LOG_RATIO_LIMIT = 20.0
K3_LIMIT = 10.0


def kl_estimate(
    logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"], kind: KLKind
) -> Float[Tensor, "*shape"]:
    """Per-token estimate of KL(policy || reference) in nats, with d = logprobs - ref_logprobs.

    k1 = d (unbiased, may be negative); k2 = d^2 / 2; k3 = exp(-d) - 1 + d (unbiased, never
    negative). For k3 alone d is clamped to +-20 before the exponential and the result to at most
    10, beyond which its gradient is 0. Source: Schulman, "Approximating KL divergence"; the
    clamps: verl `kl_penalty`.
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        d = d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        return (torch.expm1(-d) + d).clamp(max=K3_LIMIT)
    raise ValueError(f"kind must be one of {', '.join(get_args(KLKind))}, got {kind!r}")


def missing_eos_penalty(
    scores: Float[Tensor, " batch"], finished: Bool[Tensor, " batch"], penalty: float | None
) -> Float[Tensor, " batch"]:
    """Scores [B] minus `penalty` where the response did not end by itself; None changes nothing.

    Source: trl PPOTrainer `missing_eos_penalty`.
    """
    return scores if penalty is None else torch.where(finished, scores, scores - penalty)


def length_penalty(
    scores: Float[Tensor, " batch"], response_mask: Bool[Tensor, "batch response"], penalty: float
) -> Float[Tensor, " batch"]:
    """Scores [B] minus `penalty` for every token of the response, its EOS included."""
    return scores - penalty * response_mask.sum(-1)


@torch.no_grad()
def token_rewards(
    scores: Float[Tensor, " batch"],
    logprobs: Float[Tensor, "batch response"],
    ref_logprobs: Float[Tensor, "batch response"],
    response_mask: Bool[Tensor, "batch response"],
    kl_coef: float,
    kind: KLKind = "k1",
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    """Rewards [B,R] = -kl_coef * kl, plus the score on the last response token; and kl [B,R].

    Both are zero outside the mask and carry no gradient. A row without a response token has no
    place for its score: its rewards are all zero. Source: Ziegler et al. 2019, eq. 2, with the
    score placed as in OpenRLHF `compute_reward`.
    """
    kl = torch.where(response_mask, kl_estimate(logprobs, ref_logprobs, kind), 0.0)
    rewards = -kl_coef * kl
    last = response_mask.long().cumsum(-1).argmax(-1, keepdim=True)
    placed = torch.where(response_mask.any(-1), scores, 0.0).to(rewards.dtype)
    return rewards.scatter_add(-1, last, placed.unsqueeze(-1)), kl


@torch.no_grad()
def gae(
    rewards: Float[Tensor, "batch response"],
    values: Float[Tensor, "batch response"],
    response_mask: Bool[Tensor, "batch response"],
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    """Generalised advantage estimates and returns, both [B,R], raw (not whitened).

    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; returns = A + V. The
    value after the last token of a row is 0, and so is everything outside the mask. Source:
    Schulman et al. 2016 (arXiv:1506.02438), eq. 16.
    """
    rewards = torch.where(response_mask, rewards, 0.0)
    values = torch.where(response_mask, values, 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = next_advantage
        next_value = values[:, t]
    return advantages, advantages + values


@dataclass(frozen=True)
class StepCounts:
    """How many response tokens, and sequences with at least one, a whole optimiser step holds.

    `length` is the number of tokens that a response may have, for the reduction `fixed_length`.
    """

    tokens: float
    sequences: float
    length: int = 1

    def divisor(self, reduction: Reduction) -> float:
        """What the sum of a loss is divided by under `reduction`; see `masked_reduce`."""
        return {
            "token_mean": self.tokens,
            "sequence_mean": self.sequences,
            "fixed_length": self.sequences * self.length,
        }[reduction]


def _denominators(denominator: float | StepCounts | None, reduction: Reduction) -> tuple[float | None, float | None]:
    """The divisors of the loss and of the metrics."""
    if denominator is None:
        return None, None
    if isinstance(denominator, StepCounts):
        return denominator.divisor(reduction), denominator.tokens
    if reduction != "token_mean":
        raise ValueError(f"{reduction} needs a StepCounts: one number cannot divide both loss and metrics")
    return denominator, denominator


@dataclass(frozen=True)
class PolicyLossOptions:
    """Settings of `policy_loss`.

    The ratio is clipped to [1 - cliprange, 1 + cliprange_high]; `cliprange_high` None means
    `cliprange`. `dual_clip` c > 1 bounds the loss of a negative advantage by -c A. `reduction`:
    see `masked_reduce`.
    """

    cliprange: float = 0.2
    cliprange_high: float | None = None
    dual_clip: float | None = None
    reduction: Reduction = "token_mean"

    def __post_init__(self) -> None:
        if not 0 < self.cliprange < 1:
            raise ValueError(f"cliprange must lie in (0, 1), got {self.cliprange}")
        if self.cliprange_high is not None and not self.cliprange_high > 0:
            raise ValueError(f"cliprange_high must be > 0, got {self.cliprange_high}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be > 1, got {self.dual_clip}")


def policy_loss(
    logprobs: Float[Tensor, "batch response"],
    old_logprobs: Float[Tensor, "batch response"],
    advantages: Float[Tensor, "batch response"],
    response_mask: Bool[Tensor, "batch response"],
    options: PolicyLossOptions,
    *,
    weights: Float[Tensor, "batch response"] | None = None,
    denominator: float | StepCounts | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The clipped surrogate loss, a scalar, and its metrics.

    rho = exp(logprobs - old_logprobs); per token max(-A rho, -A clip(rho, 1 - low, 1 + high)),
    and with dual clip c the smaller of that and -c A where A < 0; reduced by
    `options.reduction`. The log-ratio is clamped to +-20 before the exponential. `weights`, of
    `importance_weights`, multiply the token losses.

    Metrics are detached token means over the mask: `clipfrac` (tokens whose clipped term is the
    larger), `approx_kl` = mean(0.5 (logprobs - old_logprobs)^2) in nats, `ratio` = mean(rho).

    `denominator` is the count of the whole optimiser step: then loss and metrics of its
    micro-batches add up to those of the step. A number counts tokens (token_mean only);
    sequence_mean needs a `StepCounts`, its metrics being token means all the same. None: the
    counts of this batch. Sources: Schulman et al. 2017 (arXiv:1707.06347), eq. 7; dual clip: Ye
    et al. 2020 (arXiv:1912.09729), eq. 5; unequal ranges: DAPO (arXiv:2503.14476), eq. 10.
    """
    per_loss, per_metric = _denominators(denominator, options.reduction)
    high = options.cliprange if options.cliprange_high is None else options.cliprange_high
    log_ratio = torch.where(response_mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - options.cliprange, 1 + high)
    losses = torch.maximum(plain, clipped)
    if options.dual_clip is not None:
        bounded = torch.minimum(losses, -options.dual_clip * advantages)
        losses = torch.where(advantages < 0, bounded, losses)
    if weights is not None:
        losses = losses * weights
    with torch.no_grad():
        metrics = {
            "clipfrac": masked_mean((clipped > plain).to(losses.dtype), response_mask, per_metric),
            "approx_kl": masked_mean(0.5 * log_ratio.square(), response_mask, per_metric),
            "ratio": masked_mean(ratio, response_mask, per_metric),
        }
    return masked_reduce(losses, response_mask, options.reduction, per_loss), metrics


@dataclass(frozen=True)
class ImportanceOptions:
    """Settings of `importance_weights`: one weight per token, or their product per sequence.

    `clamp` cuts the weights to [low, high]; `mask` sets those outside to 0.
    """

    level: Literal["token", "sequence"] = "token"
    mode: Literal["clamp", "mask"] = "clamp"
    low: float = 0.0
    high: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= 1 <= self.high:
            raise ValueError(f"importance weights need 0 <= low <= 1 <= high, got {self.low} and {self.high}")


@torch.no_grad()
def importance_weights(
    old_logprobs: Float[Tensor, "batch response"],
    rollout_logprobs: Float[Tensor, "batch response"],
    response_mask: Bool[Tensor, "batch response"],
    options: ImportanceOptions,
) -> Float[Tensor, "batch response"]:
    """Weights [B,R] of samples that another engine drew: exp(old_logprobs - rollout_logprobs), bounded.

    At level `sequence` every token of a row has the weight exp(sum over its tokens). The sum is
    clamped to +-20 before the exponential; 0 outside the mask, no gradient. Sources: truncated
    importance sampling, Ionides 2008; between engine and trainer, OpenRLHF `PolicyLoss`
    (`vllm_is_truncated_threshold`) and verl `rollout_is`; masking: IcePop.
    """
    log_weights = torch.where(response_mask, old_logprobs - rollout_logprobs, 0.0)
    if options.level == "sequence":
        log_weights = log_weights.sum(-1, keepdim=True).expand_as(log_weights)
    weights = log_weights.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if options.mode == "clamp":
        weights = weights.clamp(options.low, options.high)
    else:
        weights = torch.where((weights >= options.low) & (weights <= options.high), weights, 0.0)
    return torch.where(response_mask, weights, 0.0)


def kl_loss(
    logprobs: Float[Tensor, "batch response"],
    ref_logprobs: Float[Tensor, "batch response"],
    response_mask: Bool[Tensor, "batch response"],
    kind: Literal["k2", "k3"],
    *,
    denominator: float | StepCounts | None = None,
    reduction: Reduction = "token_mean",
) -> Float[Tensor, ""]:
    """KL(policy || reference) as a term of the loss, a scalar in nats.

    Its value is `kl_estimate` of the kind, its gradient that of k2 for both: on samples of the
    policy E[d grad logprobs] is the gradient of the KL, while k1's is 0 and k3's another one's.
    `reduction` and `denominator` as in `policy_loss`. Source: Schulman, "Approximating KL
    divergence"; verl `kl_penalty` ("k3+", straight-through).
    """
    if kind not in ("k2", "k3"):
        raise ValueError(f"kind must be k2 or k3, got {kind!r}")
    per_loss, _ = _denominators(denominator, reduction)
    logprobs = torch.where(response_mask, logprobs, ref_logprobs)
    estimate = kl_estimate(logprobs, ref_logprobs, "k2")
    if kind == "k3":
        estimate = estimate + (kl_estimate(logprobs, ref_logprobs, "k3") - estimate).detach()
    return masked_reduce(estimate, response_mask, reduction, per_loss)


def value_loss(
    values: Float[Tensor, "batch response"],
    old_values: Float[Tensor, "batch response"],
    returns: Float[Tensor, "batch response"],
    response_mask: Bool[Tensor, "batch response"],
    *,
    cliprange_value: float | None,
    denominator: float | StepCounts | None = None,
    reduction: Reduction = "token_mean",
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The clipped squared error of the critic, a scalar, and its metrics.

    Per token 0.5 max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2) with G the return; without
    the second term when `cliprange_value` c is None. `clipfrac` is the token mean of "the clipped
    term is the larger". `reduction` and `denominator` as in `policy_loss`. Source:
    openai/lm-human-preferences `train_policy.py` (loss); trl `PPOTrainer`.
    """
    if cliprange_value is not None and not cliprange_value > 0:
        raise ValueError(f"cliprange_value must be > 0 or None, got {cliprange_value}")
    per_loss, per_metric = _denominators(denominator, reduction)
    values = torch.where(response_mask, values, 0.0)
    plain = (values - returns).square()
    if cliprange_value is None:
        losses, was_clipped = plain, torch.zeros_like(plain)
    else:
        near_old = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
        clipped = (near_old - returns).square()
        losses, was_clipped = torch.maximum(plain, clipped), (clipped > plain).to(plain.dtype)
    with torch.no_grad():
        metrics = {"clipfrac": masked_mean(was_clipped, response_mask, per_metric)}
    return masked_reduce(0.5 * losses, response_mask, reduction, per_loss), metrics


def explained_variance(
    values: Float[Tensor, "*shape"], returns: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """1 - Var(returns - values) / Var(returns) over the mask, a scalar.

    1 is a perfect critic, 0 one that knows no more than the mean, below 0 one that is worse. NaN
    when the returns do not vary.
    """
    variance = masked_var(returns, mask)
    unexplained = masked_var(returns - values, mask)
    return torch.where(variance > 0, 1 - unexplained / variance, math.nan)
