"""From sampled responses to what PPO learns from: scores, per-token rewards, values and advantages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import UserError
from pipeline.recipe import PpoSection, Recipe
from pipeline.records import Prompt
from pipeline.sharding import through
from policy.models import response_hidden, response_scores, token_scores
from policy.ppo.controllers import RunningScale
from policy.ppo.maths import (
    ImportanceOptions,
    explained_variance,
    gae,
    importance_weights,
    kl_estimate,
    length_penalty,
    missing_eos_penalty,
    token_rewards,
)
from policy.ppo.roles import Roles
from policy.ppo.slices import Slice, most_padded_tokens, slices
from policy.tensors import TokenScores, masked_mean, masked_sum, masked_var, masked_whiten
from rollout.batch import RolloutBatch


@dataclass(frozen=True)
class Pass:
    """A forward over some rows of a batch: the policy's scores, and the critic's values as far as they are known.

    `counts`: see `Slice`.
    """

    rows: list[int]
    scores: TokenScores
    values: Tensor | None
    counts: bool = True


@dataclass(frozen=True)
class Experience:
    """One rollout batch with everything that the update needs; B sequences, R response tokens.

    Attributes:
        old_logprobs, ref_logprobs [B,R]: of the policy at rollout time (recomputed by the trainer) and the reference.
        values, returns, advantages [B,R]: returns = raw advantages + values; advantages are whitened over the batch.
        rewards, kl [B,R]: per token; rewards = -kl_coef * kl, plus the score at the last response token.
        entropy [B,R]: of the policy at rollout time, nats.
        scores [B]: weighted sum of the reward sources; shaped_scores [B]: scaled, clipped, less the penalties.
        source_scores: each source's scores [B] by its name, before the weight.
        weights [B,R]: importance weights of the engine's samples; None where engine and trainer agree.
        passes: the forwards behind old_logprobs and values with their graphs, for the first optimiser step; () where
            they are not kept.
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
    weights: Tensor | None = None
    passes: tuple[Pass, ...] = ()


def make_experience(
    roles: Roles,
    batch: RolloutBatch,
    ppo: PpoSection,
    kl_coef: float,
    prompts: Sequence[Prompt] = (),
    *,
    scale: RunningScale | None = None,
    logprob_tolerance: float = 0.0,
) -> Experience:
    """Scores `batch` with the four roles and computes advantages.

    `prompts` are the records of the batch's prompts, for reward functions and models with another tokenizer. `scale`
    is that of `ppo.score_scaling: running`. Importance weights are computed when `ppo.importance_level` asks for them
    and a log-probability of the engine is more than `logprob_tolerance` nats from the trainer's.

    Advantages are whitened once over the whole rollout batch (ppo-details: OpenAI, OpenRLHF), never per micro-batch.
    """
    batch = batch.to(roles.device)
    passes = forward_passes(roles, batch, reuse=ppo.num_minibatches == 1)
    old_logprobs, entropy, values = gather_passes(roles, passes, batch)
    ref_logprobs = reference_logprobs(roles, batch)
    combined, source_scores = roles.rewards.scores(batch, prompts)
    mask = batch.response_mask
    scores = shape_scores(combined, batch, ppo, scale)
    rewards, kl = token_rewards(scores, old_logprobs, ref_logprobs, mask, kl_coef, ppo.kl_estimator)
    if ppo.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
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
        weights=_weights(batch, old_logprobs, ppo, logprob_tolerance),
        passes=tuple(one for one in passes if one.scores.logprobs.requires_grad),
    )


def shape_scores(scores: Tensor, batch: RolloutBatch, ppo: PpoSection, scale: RunningScale | None) -> Tensor:
    """Scores [B], scaled and clipped, less the penalties for a missing EOS and for length."""
    if scale is not None:
        scores = scale.scale(scores)
    if ppo.score_clip is not None:
        scores = scores.clamp(-ppo.score_clip, ppo.score_clip)
    scores = missing_eos_penalty(scores, batch.finished, ppo.missing_eos_penalty)
    return length_penalty(scores, batch.response_mask, ppo.length_penalty)


def _weights(batch: RolloutBatch, old_logprobs: Tensor, ppo: PpoSection, tolerance: float) -> Tensor | None:
    if ppo.importance_level == "off" or engine_gap(batch, old_logprobs)[0] <= tolerance:
        return None
    options = ImportanceOptions(ppo.importance_level, ppo.importance_mode, ppo.importance_low, ppo.importance_high)
    return importance_weights(old_logprobs, batch.rollout_logprobs, batch.response_mask, options)


def forward_passes(roles: Roles, batch: RolloutBatch, *, reuse: bool = False) -> tuple[Pass, ...]:
    """Policy and critic over `batch` in length-sorted micro-batches.

    With `reuse` the first optimiser step sees the whole batch. Where the graphs of all micro-batches, the policy's and
    the critic's, also fit into the token budget together, they are kept for it: the policy has not moved when that
    step is taken, so its forward would only repeat this one.
    """
    graphs = 1 if roles.critic.on_policy else 2
    keep = reuse and graphs * most_padded_tokens(batch, roles.max_tokens, roles.ranks) <= roles.max_tokens
    own = slices(batch, roles.max_tokens, roles.ranks, in_step=roles.sharded)
    with torch.set_grad_enabled(keep), training_mode(roles, keep):
        passes = [forward_policy(roles, batch, slice_, with_entropy=True) for slice_ in own]
        return tuple(
            one if one.values is not None else replace(one, values=critic_values(roles, batch.select(one.rows)))
            for one in passes
        )


def forward_policy(roles: Roles, batch: RolloutBatch, slice_: Slice, *, with_entropy: bool) -> Pass:
    """The policy over one micro-batch; with values where the critic is a head on the same trunk."""
    part = batch.select(slice_.rows)

    def forward() -> tuple[TokenScores, Tensor | None]:
        hidden = response_hidden(roles.policy, part)
        scores = token_scores(roles.policy, hidden, part, roles.temperature, with_entropy=with_entropy)
        return scores, roles.critic.values(hidden, part) if roles.critic.on_policy else None

    with roles.autocast():
        scores, values = through(roles.policy, roles.policy, forward)
    return Pass(slice_.rows, scores, values, slice_.counts)


def critic_values(roles: Roles, part: RolloutBatch) -> Tensor:
    """Values [B,R] of the states before each response token of a micro-batch."""
    with roles.autocast():
        return roles.critic(part)


def gather_passes(roles: Roles, passes: Sequence[Pass], batch: RolloutBatch) -> tuple[Tensor, Tensor, Tensor]:
    """old_logprobs, entropy and values [B,R] of the whole batch, all ranks', float32, without their graphs."""
    shape, device = batch.response_mask.shape, batch.response_mask.device
    logprobs, entropy, values = (torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(3))
    for one in (each for each in passes if each.counts):
        for whole, part in ((logprobs, one.scores.logprobs), (entropy, one.scores.entropy), (values, one.values)):
            if part is not None:
                whole[one.rows, : part.shape[1]] = part.detach().float()
    roles.ranks.sum_((logprobs, entropy, values))
    return logprobs, entropy, values


@contextmanager
def training_mode(roles: Roles, on: bool = True) -> Iterator[None]:
    """Policy and critic in training mode inside, which gradient checkpointing asks for; dropout is off in both."""
    before = roles.policy.training, roles.critic.training
    roles.policy.train(on)
    roles.critic.train(on)
    try:
        yield
    finally:
        roles.policy.train(before[0])
        roles.critic.train(before[1])


@torch.no_grad()
def policy_logprobs(
    roles: Roles, model: PreTrainedModel, batch: RolloutBatch, *, with_entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [B,R] of the responses, forwarded in length-sorted token-budget slices."""
    logprobs = torch.zeros(batch.response_mask.shape, dtype=torch.float32, device=roles.device)
    entropy = torch.zeros_like(logprobs)
    for rows, counts in slices(batch, roles.max_tokens, roles.ranks, in_step=roles.sharded):
        part = batch.select(rows)
        with roles.autocast():
            scores = response_scores(model, part, roles.temperature, with_entropy=with_entropy)
        if not counts:
            continue
        width = part.response_ids.shape[1]
        logprobs[rows, :width] = scores.logprobs.float()
        entropy[rows, :width] = scores.entropy.float()
    roles.ranks.sum_((logprobs, entropy))
    return logprobs, entropy


def reference_logprobs(roles: Roles, batch: RolloutBatch) -> Tensor:
    """Log-probabilities [B,R] of the responses under the reference."""
    with roles.acting_as_reference():
        return policy_logprobs(roles, roles.reference, batch, with_entropy=False)[0]


def experience_metrics(experience: Experience, kl_coef: float) -> dict[str, float]:
    """What an update's experience says, under the names of trl's PPOTrainer; all means are masked.

    `objective/kl_error` is the standard error of `objective/kl`, NaN for a single sequence; `objective/kl_k3` the same
    divergence by the estimate that is never negative. `rollout/importance_weight` is 1 where no weights are used.
    """
    mask = experience.batch.response_mask
    rows = mask.shape[0]
    kl_sums = experience.kl.sum(1)
    kl, scores = kl_sums.mean().item(), experience.shaped_scores.mean().item()
    old, ref = experience.old_logprobs, experience.ref_logprobs
    weights = torch.ones_like(old) if experience.weights is None else experience.weights
    return {
        "objective/scores": scores,
        "objective/raw_scores": experience.scores.mean().item(),
        **{f"objective/scores/{name}": each.mean().item() for name, each in experience.source_scores.items()},
        "objective/kl": kl,
        "objective/kl_k3": masked_sum(kl_estimate(old, ref, "k3"), mask).item() / rows,
        "objective/kl_error": ((kl_sums - kl).square().sum() / (rows * (rows - 1))).sqrt().item(),
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": scores - kl_coef * kl,
        "objective/entropy": float(-(experience.old_logprobs * mask).sum(1).mean()),
        "objective/kl_coef": kl_coef,
        "policy/entropy_avg": masked_mean(experience.entropy, mask).item(),
        "val/explained_variance": explained_variance(experience.values, experience.returns, mask).item(),
        "val/returns_std": masked_var(experience.returns, mask).sqrt().item(),
        "rollout/importance_weight": masked_mean(weights, mask).item(),
        "response/length": mask.sum(1).float().mean().item(),
        "response/eos_rate": experience.batch.finished.float().mean().item(),
    }


def unsound_rows(roles: Roles, experience: Experience, rows: list[int]) -> list[int]:
    """The rows behind a loss or gradient that is not finite over the minibatch `rows`, as far as they can be told.

    A row of the whole rollout batch whose score, value or log-probability is not finite spoils every advantage
    through whitening. Otherwise rows of the minibatch that the current policy or critic cannot evaluate; otherwise,
    where only a gradient overflowed, all of `rows`.
    """
    told = (experience.old_logprobs, experience.ref_logprobs, experience.values, experience.scores.unsqueeze(1))
    sound = torch.stack([tensor.isfinite().all(1) for tensor in told]).all(0)
    if sound.all():
        part = experience.batch.select(rows)
        logprobs, _, values = gather_passes(roles, forward_passes(roles, part), part)
        sound[rows] = (logprobs + values).isfinite().all(1)
    return (~sound).nonzero().flatten().tolist() or sorted(rows)


def engine_gap(batch: RolloutBatch, old_logprobs: Tensor) -> tuple[float, float]:
    """Largest |log-prob difference| and mean |probability difference| between rollout engine and trainer."""
    mask = batch.response_mask
    engine, trainer = batch.rollout_logprobs[mask], old_logprobs[mask]
    return (engine - trainer).abs().max().item(), (engine.exp() - trainer.exp()).abs().mean().item()


def check_engine(experience: Experience, recipe: Recipe, update: int, engine: str) -> tuple[float, float]:
    """Stops the run when the engine does not sample from the trainer's current weights.

    Stale or half-loaded weights show as a gap of 0.05 and more; float32 engines agree to 1e-5. In bfloat16 the gap
    (1e-2 is usual) is only returned, to be logged, and so is that of responses which older weights sampled.
    """
    gap, probability_gap = engine_gap(experience.batch, experience.old_logprobs)
    current = recipe.rollout.async_steps == 0 or bool((experience.batch.policy_versions == update - 1).all())
    if current and recipe.model.dtype == "float32" and not gap < recipe.rollout.logprob_tolerance:
        raise UserError(
            f"update {update}: {engine}'s log-probabilities differ from the trainer's by {gap:.2g} nats "
            f"(rollout.logprob_tolerance is {recipe.rollout.logprob_tolerance:g}): the engine does not hold the "
            "policy's current weights or computes another model.",
            mend="Set rollout.engine: transformers to go on from the last saved state, and report the model's name.",
        )
    return gap, probability_gap
