"""From sampled responses to what PPO learns from: scores, per-token rewards, values and advantages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import UserError
from pipeline.recipe import PpoSection, Recipe
from pipeline.records import Prompt
from policy.models import ValueModel, response_scores
from policy.ppo.maths import gae, missing_eos_penalty, normalise_scores, token_rewards
from policy.ppo.rewards import Rewards
from policy.tensors import masked_whiten
from reward_model.score import token_batches
from rollout.batch import RolloutBatch


@dataclass(frozen=True)
class Roles:
    """The four roles of PPO, on one device.

    Attributes:
        policy: trained; reference: its frozen start; critic: trained; rewards: frozen models and functions.
    """

    policy: PreTrainedModel
    reference: PreTrainedModel
    critic: ValueModel
    rewards: Rewards
    temperature: float
    max_tokens: int
    autocast: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)

    @property
    def device(self) -> torch.device:
        """Where all models live."""
        return self.policy.device


@dataclass(frozen=True)
class Experience:
    """One rollout batch with everything that the update needs; B sequences, R response tokens.

    Attributes:
        old_logprobs, ref_logprobs [B,R]: of the policy at rollout time (recomputed by the trainer) and the reference.
        values, returns, advantages [B,R]: returns = raw advantages + values; advantages are whitened over the batch.
        rewards, kl [B,R]: per token; rewards = -kl_coef * kl, plus the score at the last response token.
        entropy [B,R]: of the policy at rollout time, nats.
        scores [B]: weighted sum of the reward sources; shaped_scores [B]: clipped, less the missing-EOS penalty.
        source_scores: each source's scores [B] by its name, before the weight.
    """

    batch: RolloutBatch
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    kl: Tensor
    entropy: Tensor
    scores: Tensor
    shaped_scores: Tensor
    source_scores: Mapping[str, Tensor]


def make_experience(
    roles: Roles, batch: RolloutBatch, ppo: PpoSection, kl_coef: float, prompts: Sequence[Prompt] = ()
) -> Experience:
    """Scores `batch` with the four roles and computes advantages; no gradients.

    `prompts` are the records of the batch's prompts, for reward functions and models with another tokenizer.

    Advantages are whitened once over the whole rollout batch (ppo-details: OpenAI, OpenRLHF), never per micro-batch.
    """
    batch = batch.to(roles.device)
    old_logprobs, entropy = policy_logprobs(roles, roles.policy, batch)
    ref_logprobs, _ = policy_logprobs(roles, roles.reference, batch, with_entropy=False)
    values = critic_values(roles, batch)
    combined, source_scores = roles.rewards.scores(batch, prompts)
    scores = normalise_scores(combined, 0.0, 1.0, ppo.score_clip)
    scores = missing_eos_penalty(scores, batch.finished, ppo.missing_eos_penalty)
    mask = batch.response_mask
    rewards, kl = token_rewards(scores, old_logprobs, ref_logprobs, mask, kl_coef)
    advantages, returns = gae(rewards, values, mask, ppo.gamma, ppo.lam)
    return Experience(
        batch=batch,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        rewards=rewards,
        advantages=masked_whiten(advantages, mask),
        returns=returns,
        kl=kl,
        entropy=entropy,
        scores=combined,
        shaped_scores=scores,
        source_scores=source_scores,
    )


@torch.no_grad()
def policy_logprobs(
    roles: Roles, model: PreTrainedModel, batch: RolloutBatch, *, with_entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [B,R] of the responses, forwarded in length-sorted token-budget slices."""
    logprobs = torch.zeros(batch.response_mask.shape, dtype=torch.float32, device=roles.device)
    entropy = torch.zeros_like(logprobs)
    for rows in micro_batches(batch, roles.max_tokens):
        part = batch.select(rows)
        with roles.autocast():
            scores = response_scores(model, part, roles.temperature, with_entropy=with_entropy)
        width = part.response_ids.shape[1]
        logprobs[rows, :width] = scores.logprobs.float()
        entropy[rows, :width] = scores.entropy.float()
    return logprobs, entropy


@torch.no_grad()
def critic_values(roles: Roles, batch: RolloutBatch) -> Tensor:
    """Values [B,R] of the states before each response token."""
    values = torch.zeros(batch.response_mask.shape, dtype=torch.float32, device=roles.device)
    for rows in micro_batches(batch, roles.max_tokens):
        part = batch.select(rows)
        with roles.autocast():
            values[rows, : part.response_ids.shape[1]] = roles.critic(part).float()
    return values


def micro_batches(batch: RolloutBatch, max_tokens: int) -> list[list[int]]:
    """Row indices in slices of similar length with at most `max_tokens` padded tokens each."""
    lengths = (batch.prompt_mask.sum(1) + batch.response_mask.sum(1)).tolist()
    return list(token_batches(lengths, max_tokens))


def engine_gap(batch: RolloutBatch, old_logprobs: Tensor) -> tuple[float, float]:
    """Largest |log-prob difference| and mean |probability difference| between rollout engine and trainer."""
    mask = batch.response_mask
    engine, trainer = batch.rollout_logprobs[mask], old_logprobs[mask]
    return (engine - trainer).abs().max().item(), (engine.exp() - trainer.exp()).abs().mean().item()


def check_engine(experience: Experience, recipe: Recipe, update: int, engine: str) -> tuple[float, float]:
    """Stops the run when the engine does not sample from the trainer's current weights.

    Stale or half-loaded weights show as a gap of 0.05 and more; float32 engines agree to 1e-5. In bfloat16 the gap
    (1e-2 is usual) is only returned, to be logged.
    """
    gap, probability_gap = engine_gap(experience.batch, experience.old_logprobs)
    if recipe.model.dtype == "float32" and not gap < recipe.rollout.logprob_tolerance:
        raise UserError(
            f"update {update}: {engine}'s log-probabilities differ from the trainer's by {gap:.2g} nats "
            f"(rollout.logprob_tolerance is {recipe.rollout.logprob_tolerance:g}): the engine does not hold the "
            "policy's current weights or computes another model.",
            mend="Set rollout.engine: transformers to go on from the last saved state, and report the model's name.",
        )
    return gap, probability_gap
