"""The optimisation phase of PPO: epochs, minibatches, token-budget micro-batches, one optimiser step per minibatch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from pipeline.recipe import PpoSection
from pipeline.sharding import whole_norm
from policy.ppo.experience import (
    Experience,
    Pass,
    critic_values,
    forward_policy,
    training_mode,
    unsound_rows,
)
from policy.ppo.maths import PolicyLossOptions, StepCounts, kl_loss, policy_loss, value_loss
from policy.ppo.ptx import PtxLoss
from policy.ppo.roles import Roles
from policy.ppo.slices import Slice, slices
from policy.tensors import masked_reduce

SUMMED = (
    "loss/policy_avg",
    "loss/value_avg",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "val/ratio",
    "val/clipfrac_avg",
)
"""What the micro-batches of a step, on all ranks, add up to."""
PPO_LOSSES = ("loss/policy_avg", "loss/value_avg")
MUST_BE_FINITE = (*PPO_LOSSES, "policy/grad_norm", "val/grad_norm")


@dataclass
class Learner:
    """Optimisers and schedules of policy and critic, and the generator that shuffles minibatches.

    Attributes:
        skipped_steps: steps of the run that were not taken because a loss or gradient was not finite.
        ptx_steps: steps of the run with the language-model loss, which decide its next demonstrations.
        skipped_rows: rows of the rollout batch that did it, for each skipped step of the current update; none where
            the demonstrations of `ppo.ptx_coef` did.
    """

    policy_optimizer: AdamW
    critic_optimizer: AdamW
    policy_schedule: LambdaLR
    critic_schedule: LambdaLR
    generator: torch.Generator
    skipped_steps: int = 0
    ptx_steps: int = 0
    skipped_rows: list[list[int]] = field(default_factory=list)

    @classmethod
    def create(cls, roles: Roles, ppo: PpoSection, seed: int) -> Learner:
        """Fresh optimisers; Adam's epsilon is 1e-5 by default, as in openai/lm-human-preferences."""

        def optimizer(parameters: list[nn.Parameter], learning_rate: float) -> AdamW:
            return AdamW(parameters, lr=learning_rate, eps=ppo.adam_epsilon, weight_decay=ppo.weight_decay, fused=True)

        def schedule(of: AdamW, updates: int) -> LambdaLR:
            linear = ppo.lr_schedule == "linear"
            return LambdaLR(of, lambda update: 1.0 - update / updates if linear else 1.0)

        policy = optimizer(roles.trainable(), ppo.learning_rate)
        critic = optimizer(roles.critic.trainable(), ppo.critic_learning_rate)
        return cls(
            policy,
            critic,
            schedule(policy, ppo.updates - ppo.critic_warmup_updates),
            schedule(critic, ppo.updates),
            torch.Generator().manual_seed(seed),
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs beside the optimisers, which are parts of their own."""
        return {
            "policy_schedule": self.policy_schedule.state_dict(),
            "critic_schedule": self.critic_schedule.state_dict(),
            "generator": self.generator.get_state(),
            "skipped_steps": self.skipped_steps,
            "ptx_steps": self.ptx_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict()`."""
        self.policy_schedule.load_state_dict(state["policy_schedule"])
        self.critic_schedule.load_state_dict(state["critic_schedule"])
        self.generator.set_state(state["generator"])
        self.skipped_steps = state["skipped_steps"]
        self.ptx_steps = state["ptx_steps"]


@dataclass(frozen=True)
class UpdateOptions:
    """What one update needs to know beside the experience.

    Attributes:
        max_response_tokens: the length that `fixed_length` divides by.
        train_policy: False while the critic warms up.
        ptx: the language-model loss on demonstrations; None without it.
    """

    ppo: PpoSection
    max_response_tokens: int
    train_policy: bool = True
    ptx: PtxLoss | None = None


def ppo_update(roles: Roles, learner: Learner, experience: Experience, options: UpdateOptions) -> dict[str, float]:
    """num_ppo_epochs passes of num_minibatches optimiser steps each; returns means over the steps taken.

    Denominators are counts of the whole optimiser step, so that the split into micro-batches never shows in the
    result. The first step whose approximate KL exceeds `ppo.target_kl`, and all after it, are left out
    (`policy/steps` counts those before it). `val/ratio_first` is the mean ratio of the first minibatch, which must
    be 1, and `policy/approxkl_first` its approximate KL, which must be 0. `policy/trained_tokens` counts what went
    through the policy forward and backward: prompts, responses and the demonstrations of `ppo.ptx_coef`, without
    padding, in every step, the one past `target_kl` and skipped ones included.
    """
    ppo = options.ppo
    learner.skipped_rows = []
    taken: list[dict[str, float]] = []
    lengths, tokens = experience.batch.attention_mask.sum(1), 0
    size = ppo.rollout_batch_size // ppo.num_minibatches
    with training_mode(roles):
        for rows in _minibatches(experience.scores.shape[0], size, ppo.num_ppo_epochs, learner.generator):
            step = _optimiser_step(roles, learner, experience, rows, options)
            tokens += int(lengths[rows].sum())
            if step is None:
                break
            if "loss/ptx_avg" in step and options.ptx is not None:
                tokens += options.ptx.tokens(learner.ptx_steps)
            taken.append(step)
            experience = replace(experience, passes=())
    if options.train_policy:
        learner.policy_schedule.step()
    learner.critic_schedule.step()
    means = {key: sum(step[key] for step in taken) / len(taken) for key in taken[0]}
    return {
        **means,
        "val/ratio_first": taken[0]["val/ratio"],
        "policy/approxkl_first": taken[0]["policy/approxkl_avg"],
        "policy/steps": float(len(taken)),
        "policy/trained_tokens": float(tokens),
    }


def _minibatches(rows: int, size: int, epochs: int, generator: torch.Generator) -> Iterator[list[int]]:
    for _ in range(epochs):
        for chosen in torch.randperm(rows, generator=generator).split(size):
            yield chosen.tolist()


def _optimiser_step(
    roles: Roles, learner: Learner, experience: Experience, rows: list[int], options: UpdateOptions
) -> dict[str, float] | None:
    """One step of both optimisers over the sequences `rows`; None, and no step, past `target_kl`.

    Where a loss or gradient is not finite neither optimiser moves, and the learner notes the rows.
    """
    ppo = options.ppo
    metrics = {key: torch.zeros((), device=roles.device) for key in SUMMED}
    minibatch = experience.batch.select(rows)
    counts = StepCounts(
        tokens=float(minibatch.response_mask.sum()),
        sequences=float(minibatch.response_mask.any(1).sum()),
        length=options.max_response_tokens,
    )
    learner.policy_optimizer.zero_grad(set_to_none=True)
    learner.critic_optimizer.zero_grad(set_to_none=True)
    for one in experience.passes or _passes(roles, experience, rows, ppo):
        for key, value in _backward(roles, experience, one, ppo, counts).items():
            metrics[key] = metrics[key] + value
    roles.ranks.sum_(metrics.values())
    if ppo.target_kl is not None and metrics["policy/approxkl_avg"] > ppo.target_kl:
        return None
    if options.ptx is not None and options.train_policy:
        learner.ptx_steps += 1
        metrics["loss/ptx_avg"] = options.ptx.backward(roles, learner.ptx_steps)
    roles.ranks.sum_gradients([*roles.trainable(), *roles.critic.trainable()])
    norms = {
        "policy/grad_norm": whole_norm(nn.utils.clip_grad_norm_(roles.trainable(), ppo.max_grad_norm)),
        "val/grad_norm": whole_norm(nn.utils.clip_grad_norm_(roles.critic.trainable(), ppo.max_grad_norm)),
    }
    step = {key: float(value) for key, value in {**metrics, **norms}.items()}
    if not all(math.isfinite(step[key]) for key in MUST_BE_FINITE):
        learner.skipped_steps += 1
        only_ptx = not math.isfinite(step.get("loss/ptx_avg", 0.0)) and all(math.isfinite(step[k]) for k in PPO_LOSSES)
        learner.skipped_rows.append([] if only_ptx else unsound_rows(roles, experience, rows))
        return step
    learner.critic_optimizer.step()
    if options.train_policy:
        learner.policy_optimizer.step()
    return step


def _passes(roles: Roles, experience: Experience, rows: list[int], ppo: PpoSection) -> Iterator[Pass]:
    """Fresh forwards of the policy over the sequences `rows`, one micro-batch at a time.

    A critic that shares nothing with it follows after the policy's backward, so that one graph is alive at a time.
    """
    minibatch = experience.batch.select(rows)
    for chosen, counts in slices(minibatch, roles.max_tokens, roles.ranks, in_step=roles.sharded):
        slice_ = Slice([rows[i] for i in chosen], counts)
        yield forward_policy(roles, experience.batch, slice_, with_entropy=ppo.entropy_coef > 0)


def _backward(
    roles: Roles, experience: Experience, one: Pass, ppo: PpoSection, counts: StepCounts
) -> dict[str, Tensor]:
    """Losses and backward of policy and critic; returns this slice's share of the step's metrics."""
    loss, policy_metrics = _policy_loss(experience, one, ppo, counts)
    loss = loss * float(one.counts)
    if not roles.critic.on_policy:
        loss.backward()
    with roles.critic.acting():
        values = critic_values(roles, experience.batch.select(one.rows)) if one.values is None else one.values
        critic_loss, value_metrics = value_loss(
            values,
            experience.values[one.rows, : values.shape[1]],
            experience.returns[one.rows, : values.shape[1]],
            experience.batch.response_mask[one.rows, : values.shape[1]],
            cliprange_value=ppo.cliprange_value,
            denominator=counts,
            reduction=ppo.loss_reduction,
        )
        critic_loss = critic_loss * float(one.counts)
        (loss + ppo.value_coef * critic_loss if roles.critic.on_policy else critic_loss).backward()
    if not one.counts:
        return {}
    return {
        "loss/policy_avg": loss.detach(),
        "loss/value_avg": critic_loss.detach(),
        "policy/approxkl_avg": policy_metrics["approx_kl"],
        "policy/clipfrac_avg": policy_metrics["clipfrac"],
        "val/ratio": policy_metrics["ratio"],
        "val/clipfrac_avg": value_metrics["clipfrac"],
    }


def _policy_loss(
    experience: Experience, one: Pass, ppo: PpoSection, counts: StepCounts
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate + kl_loss_coef * KL to the reference - entropy_coef * entropy, and its metrics."""
    rows, scores = one.rows, one.scores
    width = scores.logprobs.shape[1]
    mask = experience.batch.response_mask[rows, :width]
    loss, metrics = policy_loss(
        scores.logprobs,
        experience.old_logprobs[rows, :width],
        experience.advantages[rows, :width],
        mask,
        PolicyLossOptions(ppo.cliprange, ppo.cliprange_high, ppo.dual_clip, ppo.loss_reduction),
        weights=None if experience.weights is None else experience.weights[rows, :width],
        denominator=counts,
    )
    if ppo.entropy_coef:
        divisor = counts.divisor(ppo.loss_reduction)
        loss = loss - ppo.entropy_coef * masked_reduce(scores.entropy, mask, ppo.loss_reduction, divisor)
    if ppo.kl_loss_coef:
        loss = loss + ppo.kl_loss_coef * kl_loss(
            scores.logprobs,
            experience.ref_logprobs[rows, :width],
            mask,
            ppo.kl_loss_estimator,
            denominator=counts,
            reduction=ppo.loss_reduction,
        )
    return loss, metrics
