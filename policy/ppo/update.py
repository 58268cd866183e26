"""The optimisation phase of PPO: epochs, minibatches, token-budget micro-batches, one optimiser step per minibatch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from pipeline.recipe import PpoSection
from policy.models import response_scores
from policy.ppo.experience import Experience, Roles, micro_batches, unsound_rows
from policy.ppo.maths import PolicyLossOptions, policy_loss, value_loss

MUST_BE_FINITE = ("loss/policy_avg", "loss/value_avg", "policy/grad_norm", "val/grad_norm")


@dataclass
class Learner:
    """Optimisers and schedules of policy and critic, and the generator that shuffles minibatches.

    Attributes:
        skipped_steps: steps of the run that were not taken because a loss or gradient was not finite.
        skipped_rows: rows of the rollout batch that did it, for each skipped step of the current update.
    """

    policy_optimizer: AdamW
    critic_optimizer: AdamW
    policy_schedule: LambdaLR
    critic_schedule: LambdaLR
    generator: torch.Generator
    skipped_steps: int = 0
    skipped_rows: list[list[int]] = field(default_factory=list)

    @classmethod
    def create(cls, roles: Roles, ppo: PpoSection, seed: int) -> Learner:
        """Fresh optimisers; Adam's epsilon is 1e-5 by default, as in openai/lm-human-preferences."""

        def optimizer(model: nn.Module, learning_rate: float) -> AdamW:
            parameters = [p for p in model.parameters() if p.requires_grad]
            return AdamW(parameters, lr=learning_rate, eps=ppo.adam_epsilon, weight_decay=ppo.weight_decay, fused=True)

        def factor(update: int) -> float:
            return 1.0 - update / ppo.updates if ppo.lr_schedule == "linear" else 1.0

        policy = optimizer(roles.policy, ppo.learning_rate)
        critic = optimizer(roles.critic, ppo.critic_learning_rate)
        return cls(
            policy, critic, LambdaLR(policy, factor), LambdaLR(critic, factor), torch.Generator().manual_seed(seed)
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs."""
        return {
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "policy_schedule": self.policy_schedule.state_dict(),
            "critic_schedule": self.critic_schedule.state_dict(),
            "generator": self.generator.get_state(),
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict()`."""
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.policy_schedule.load_state_dict(state["policy_schedule"])
        self.critic_schedule.load_state_dict(state["critic_schedule"])
        self.generator.set_state(state["generator"])
        self.skipped_steps = state["skipped_steps"]


def ppo_update(roles: Roles, learner: Learner, experience: Experience, ppo: PpoSection) -> dict[str, float]:
    """num_ppo_epochs passes of num_minibatches optimiser steps each; returns means over the steps.

    Denominators are token counts of the whole optimiser step, so that the split into micro-batches never shows in
    the result. `val/ratio_first` is the mean ratio of the first minibatch, which must be 1, and
    `policy/approxkl_first` its approximate KL, which must be 0.
    """
    totals: dict[str, float] = defaultdict(float)
    first: dict[str, float] = {}
    learner.skipped_rows = []
    size = ppo.rollout_batch_size // ppo.num_minibatches
    steps = ppo.num_ppo_epochs * ppo.num_minibatches
    roles.policy.train()
    roles.critic.train()
    for _ in range(ppo.num_ppo_epochs):
        order = torch.randperm(experience.scores.shape[0], generator=learner.generator)
        for rows in order.split(size):
            step = _optimiser_step(roles, learner, experience, rows.tolist(), ppo)
            first = first or step
            for key, value in step.items():
                totals[key] += value / steps
    learner.policy_schedule.step()
    learner.critic_schedule.step()
    roles.policy.eval()
    roles.critic.eval()
    return {**totals, "val/ratio_first": first["val/ratio"], "policy/approxkl_first": first["policy/approxkl_avg"]}


def _optimiser_step(
    roles: Roles, learner: Learner, experience: Experience, rows: list[int], ppo: PpoSection
) -> dict[str, float]:
    """One step of both optimisers over the sequences `rows`; of neither where a loss or gradient is not finite."""
    metrics: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=roles.device))
    minibatch = experience.batch.select(rows)
    denominator = float(minibatch.response_mask.sum())
    learner.policy_optimizer.zero_grad(set_to_none=True)
    learner.critic_optimizer.zero_grad(set_to_none=True)
    for slice_ in micro_batches(minibatch, roles.max_tokens):
        chosen = [rows[i] for i in slice_]
        for key, value in _micro_batch(roles, experience, chosen, ppo, denominator).items():
            metrics[key] = metrics[key] + value
    norms = {
        "policy/grad_norm": nn.utils.clip_grad_norm_(roles.policy.parameters(), ppo.max_grad_norm),
        "val/grad_norm": nn.utils.clip_grad_norm_(roles.critic.parameters(), ppo.max_grad_norm),
    }
    step = {key: float(value) for key, value in {**metrics, **norms}.items()}
    if all(math.isfinite(step[key]) for key in MUST_BE_FINITE):
        learner.critic_optimizer.step()
        learner.policy_optimizer.step()
    else:
        learner.skipped_steps += 1
        learner.skipped_rows.append(unsound_rows(roles, experience, rows))
    return step


def _micro_batch(
    roles: Roles, experience: Experience, rows: list[int], ppo: PpoSection, denominator: float
) -> dict[str, Tensor]:
    """Forward and backward of policy and critic; returns this slice's share of the step's metrics."""
    part = experience.batch.select(rows)
    width = part.response_ids.shape[1]
    mask = part.response_mask
    with roles.autocast():
        logprobs = response_scores(roles.policy, part, roles.temperature, with_entropy=False).logprobs
    loss, policy_metrics = policy_loss(
        logprobs,
        experience.old_logprobs[rows, :width],
        experience.advantages[rows, :width],
        mask,
        PolicyLossOptions(cliprange=ppo.cliprange),
        denominator=denominator,
    )
    loss.backward()
    with roles.autocast():
        values = roles.critic(part)
    critic_loss, value_metrics = value_loss(
        values,
        experience.values[rows, :width],
        experience.returns[rows, :width],
        mask,
        cliprange_value=ppo.cliprange_value,
        denominator=denominator,
    )
    critic_loss.backward()
    return {
        "loss/policy_avg": loss.detach(),
        "loss/value_avg": critic_loss.detach(),
        "policy/approxkl_avg": policy_metrics["approx_kl"],
        "policy/clipfrac_avg": policy_metrics["clipfrac"],
        "val/ratio": policy_metrics["ratio"],
        "val/clipfrac_avg": value_metrics["clipfrac"],
    }
