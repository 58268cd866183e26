"""The arithmetic of PPO: KL estimates, token rewards, advantages, clipped losses, KL controllers.

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


def normalise_scores(
    scores: Float[Tensor, " batch"], mean: float, std: float, clip: float | None = None
) -> Float[Tensor, " batch"]:
    """(scores - mean) / std, then clamped to +-clip unless `clip` is None; shape [B].

    `mean` and `std` are the reward model's, measured once. Raises ValueError when `std` or `clip`
    is not a positive number.
    """
    if not (std > 0 and math.isfinite(std) and math.isfinite(mean)):
        raise ValueError(f"scores need a finite mean and a std > 0, got mean {mean}, std {std}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be > 0, got {clip}")
    normalised = (scores - mean) / std
    return normalised if clip is None else normalised.clamp(-clip, clip)


def missing_eos_penalty(
    scores: Float[Tensor, " batch"], finished: Bool[Tensor, " batch"], penalty: float | None
) -> Float[Tensor, " batch"]:
    """Scores [B] minus `penalty` where the response did not end by itself; None changes nothing.

    Source: trl PPOTrainer `missing_eos_penalty`.
    """
    return scores if penalty is None else torch.where(finished, scores, scores - penalty)


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
    """How many response tokens, and sequences with at least one, a whole optimiser step holds."""

    tokens: float
    sequences: float


def _denominators(denominator: float | StepCounts | None, reduction: Reduction) -> tuple[float | None, float | None]:
    """The divisors of the loss and of the metrics."""
    if denominator is None:
        return None, None
    if isinstance(denominator, StepCounts):
        by_token = reduction == "token_mean"
        return (denominator.tokens if by_token else denominator.sequences), denominator.tokens
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
    denominator: float | StepCounts | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The clipped surrogate loss, a scalar, and its metrics.

    rho = exp(logprobs - old_logprobs); per token max(-A rho, -A clip(rho, 1 - low, 1 + high)),
    and with dual clip c the smaller of that and -c A where A < 0; reduced by
    `options.reduction`. The log-ratio is clamped to +-20 before the exponential.

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
    with torch.no_grad():
        metrics = {
            "clipfrac": masked_mean((clipped > plain).to(losses.dtype), response_mask, per_metric),
            "approx_kl": masked_mean(0.5 * log_ratio.square(), response_mask, per_metric),
            "ratio": masked_mean(ratio, response_mask, per_metric),
        }
    return masked_reduce(losses, response_mask, options.reduction, per_loss), metrics


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


class FixedKLController:
    """A KL coefficient that never changes."""

    def __init__(self, kl_coef: float) -> None:
        _check_kl_coef(kl_coef)
        self._kl_coef = kl_coef

    @property
    def kl_coef(self) -> float:
        """The weight of the KL penalty in the token rewards."""
        return self._kl_coef

    def update(self, kl_per_sequence: float, n_sequences: int) -> None:
        """Takes what `AdaptiveKLController.update` takes and keeps the coefficient."""

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"kl_coef": self._kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes back what `state_dict` gave."""
        _check_kl_coef(state["kl_coef"])
        self._kl_coef = state["kl_coef"]


class AdaptiveKLController(FixedKLController):
    """A KL coefficient that holds the KL per sequence near a target.

    kl_coef *= 1 + clip(KL / target - 1, -0.2, 0.2) * n_sequences / horizon. `target` is in nats
    per sequence (the sum over its tokens, mean over sequences), `horizon` in sequences. Source:
    Ziegler et al. 2019, section 2.2; openai/lm-human-preferences `AdaptiveKLController`.
    """

    def __init__(self, kl_coef: float, target: float, horizon: float) -> None:
        super().__init__(kl_coef)
        if not (target > 0 and horizon > 0):
            raise ValueError(f"target and horizon must be > 0, got {target} and {horizon}")
        self.target = target
        self.horizon = horizon

    def update(self, kl_per_sequence: float, n_sequences: int) -> None:
        """Moves the coefficient after `n_sequences` with mean KL `kl_per_sequence` (nats).

        Raises ValueError when the KL is not finite.
        """
        if not math.isfinite(kl_per_sequence):
            raise ValueError(f"the KL per sequence is {kl_per_sequence}")
        error = max(-0.2, min(0.2, kl_per_sequence / self.target - 1))
        self._kl_coef *= 1 + error * n_sequences / self.horizon


def _check_kl_coef(kl_coef: float) -> None:
    if not (kl_coef >= 0 and math.isfinite(kl_coef)):
        raise ValueError(f"kl_coef must be a finite number >= 0, got {kl_coef}")
