"""The section of PPO: models, rewards, the update, penalties, what is saved when."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.recipe_base import Count, Integer, NonNegative, Number, Positive, Section


class RewardSource(Section):
    """One term of PPO's score: a reward model, or a Python function of your own."""

    model: str | None = None
    """Directory of a reward model with its normalisation; `rm` is that of `ppo.reward_model`."""
    function: str | None = None
    """`module:function`, importable from the working directory, called with lists of prompts, responses and columns."""
    kwargs: dict[str, Any] = {}
    """Further arguments of the function."""
    weight: Number = 1.0
    """Factor of the source's scores, which are a model's normalised ones and a function's as they are."""

    @model_validator(mode="after")
    def _is_one_thing(self) -> RewardSource:
        if (self.model is None) == (self.function is None):
            raise ValueError("give exactly one of `model` and `function`")
        if self.kwargs and self.function is None:
            raise ValueError("`kwargs` are arguments of a `function`, and this is a model")
        if self.weight == 0.0:
            raise ValueError("a weight of 0 turns the source off; remove it instead")
        return self


TRAINED = "rm"
"""What `ppo.rewards` calls the reward model of `ppo.reward_model`."""
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class PpoSection(Section):
    """Proximal policy optimisation against a score, with a KL penalty to the reference."""

    policy: str | None = None
    """Checkpoint of the initial policy, which is also the frozen reference; default: the SFT stage's artifact."""
    reward_model: str | None = None
    """Reward model directory; default: the RM stage's artifact."""
    rewards: Annotated[dict[SourceName, RewardSource], Field(min_length=1)] = {TRAINED: RewardSource(model=TRAINED)}
    """Sources of the score by name: it is the sum of weight * source."""
    sharing: Literal["full", "lora_policy", "lora"] = "full"
    """`full`: policy, reference, critic and reward model are models of their own; `lora_policy`: the policy is an
    adapter over the reference; `lora`: so are the critic and every reward model trained with `rm.lora`."""
    shard: tuple[Literal["policy", "critic", "reference", "rewards"], ...] = (
        "policy",
        "critic",
        "reference",
        "rewards",
    )
    """Models that lie in parts on the ranks where launch.accelerate asks for FSDP 2; of the others each has a copy."""
    critic: str = "reward_model"
    """Its start: `reward_model`, the first one with the policy's tokenizer, or the policy where there is none;
    `policy`, with a zero head; `shared`, a zero head on the policy's own trunk, so that one forward serves both;
    or the directory of a sequence classifier with one output."""
    value_coef: NonNegative = 0.1
    """Weight of the critic's loss in the policy's, where they share a trunk (`critic: shared`)."""
    updates: Count = 100
    """Rollout batches sampled and learnt from."""
    rollout_batch_size: Count = 64
    """Sequences sampled per update."""
    num_ppo_epochs: Count = 4
    """Passes over each rollout batch."""
    num_minibatches: Count = 1
    """Optimiser steps per pass: each minibatch is one step of rollout_batch_size / num_minibatches sequences."""
    max_tokens_per_micro_batch: Count = 16384
    """Padded tokens in one forward; bounds memory, never changes the result."""
    gradient_checkpointing: bool = False
    """Keep a layer's input only and compute the layer again in the backward pass: less memory, a third more time."""
    learning_rate: Positive = 3e-6
    critic_learning_rate: Positive = 1e-5
    lr_schedule: Literal["linear", "constant"] = "linear"
    """`linear` decays to zero over all updates."""
    adam_epsilon: Positive = 1e-5
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    cliprange: Annotated[Number, Field(gt=0.0, lt=1.0)] = 0.2
    cliprange_high: Positive | None = None
    """Upper clip of the ratio where it differs from the lower one (DAPO); null means `cliprange`."""
    dual_clip: Annotated[Number, Field(gt=1.0)] | None = None
    """Bound on the loss of a negative advantage, in multiples of it; null turns it off."""
    loss_reduction: Literal["token_mean", "sequence_mean", "fixed_length"] = "token_mean"
    """What the losses are averaged over; `fixed_length` divides by sequences x data.max_response_tokens."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus in the policy's loss."""
    ptx_coef: NonNegative = 0.0
    """Weight of the language-model loss on `data.sft` in the policy's loss (PPO-ptx); 0 turns it off."""
    target_kl: Positive | None = None
    """Mean 0.5 (log-ratio)^2 per token, in nats, above which the rest of an update is left out; null: never."""
    critic_warmup_updates: Annotated[Integer, Field(ge=0)] = 0
    """First updates in which only the critic is trained."""
    cliprange_value: Positive | None = 0.2
    """Clip of the value function's change; null turns it off."""
    gamma: Annotated[Number, Field(gt=0.0, le=1.0)] = 1.0
    lam: Annotated[Number, Field(ge=0.0, le=1.0)] = 0.95
    kl_coef: NonNegative = 0.05
    """Weight of the per-token KL penalty in the rewards; with a target, its initial value."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimate of the KL in the rewards; k1 is the unbiased one."""
    kl_loss_coef: NonNegative = 0.0
    """Weight of the KL to the reference as a term of the policy's loss."""
    kl_loss_estimator: Literal["k2", "k3"] = "k3"
    """Value of that term; its gradient is k2's for both, which is the KL's."""
    kl_target_per_sequence: Positive | None = None
    """Nats per sequence that the adaptive controller steers to; null keeps `kl_coef` fixed."""
    kl_horizon: Positive = 10000.0
    """Sequences over which the adaptive controller moves `kl_coef`."""
    score_clip: Positive | None = 10.0
    """Normalised scores are clipped to plus or minus this; null turns it off."""
    missing_eos_penalty: NonNegative = 1.0
    """Subtracted from the normalised score of a response that was cut off before its EOS."""
    length_penalty: NonNegative = 0.0
    """Subtracted from the normalised score for every token of the response."""
    score_scaling: Literal["none", "running"] = "none"
    """`running` divides the scores by the standard deviation of all scores so far."""
    whiten_rewards: bool = False
    """Scale the token rewards of a batch to variance 1, their mean unmoved."""
    importance_level: Literal["off", "token", "sequence"] = "off"
    """Weigh the policy's loss by trainer / engine probability where the two differ (rollout.logprob_tolerance)."""
    importance_mode: Literal["clamp", "mask"] = "clamp"
    """Weights out of bounds are cut to them, or set to 0."""
    importance_low: Annotated[Number, Field(ge=0.0, le=1.0)] = 0.0
    importance_high: Annotated[Number, Field(ge=1.0)] = 2.0
    critic_head: Literal["reward_model", "zero"] = "reward_model"
    """Initial value head: that of the model which the critic starts from, or zeros."""
    eval_every: Count = 20
    """Updates between held-out evaluations."""
    save_every: Count = 20
    """Updates between saves of the whole training state."""
    keep_states: Count = 2
    """Saved states that are kept."""
    max_skipped_steps: Annotated[Integer, Field(ge=0)] = 3
    """Optimiser steps of the run that may be skipped for a loss or gradient that is not finite, before it stops."""
    force: bool = False
    """Starts although the reward model does not pass the gate: accuracy, normalisation, chat template."""

    @model_validator(mode="after")
    def _minibatches_divide(self) -> PpoSection:
        if self.rollout_batch_size % self.num_minibatches:
            raise ValueError(
                f"rollout_batch_size ({self.rollout_batch_size}) is not a multiple of "
                f"num_minibatches ({self.num_minibatches}); make it one, so that every optimiser step "
                "sees the same number of sequences"
            )
        return self

    @model_validator(mode="after")
    def _policy_is_trained(self) -> PpoSection:
        if self.critic_warmup_updates >= self.updates:
            raise ValueError(
                f"critic_warmup_updates ({self.critic_warmup_updates}) leaves none of the {self.updates} updates for "
                "the policy; lower it"
            )
        return self

    @property
    def with_trained_model(self) -> bool:
        """Whether the RM stage's model is a source of the score."""
        return any(source.model == TRAINED for source in self.rewards.values())

    @model_validator(mode="after")
    def _reads_the_reward_model(self) -> PpoSection:
        if self.reward_model is not None and not self.with_trained_model:
            raise ValueError(f"`reward_model` is set, but no entry of `rewards` is `model: {TRAINED}`")
        return self
