"""Which critic PPO starts with (`ppo.critic`), and what it starts from."""

from __future__ import annotations

import copy
from collections.abc import Callable

from transformers import PreTrainedModel

from pipeline.adapters import add_adapter, copy_adapter
from pipeline.artifacts import Artifact
from pipeline.errors import UserError
from pipeline.recipe import TRAINED, ModelSection
from pipeline.stage import Stage
from pipeline.tokens import Encoder, load_tokenizer, tokenizer_sha256
from policy.critics import (
    PLAIN,
    Critic,
    ValueHead,
    load_value_model,
    load_value_model_of_policy,
    saved_affine,
    zero_head,
)
from policy.ppo.rewards import AdapterReward, ModelReward, Rewards
from reward_model.score import Normalisation, read_normalisation

ADAPTER = "critic"


def load_critic(stage: Stage, rewards: Rewards, encoder: Encoder, policy: Callable[[], PreTrainedModel]) -> Critic:
    """The critic that `ppo.critic` and `ppo.sharing` ask for, and a line that says what it starts from.

    From a reward model it predicts, to begin with, that model's term of the score: weight * (raw - mean) / std.
    `policy` loads the policy, on whose base the critic may stand.

    Errors:
        UserError: no critic can be made of the model, its tokenizer is not the policy's, or it cannot share a base.
    """
    ppo = stage.recipe.ppo
    if "critic" in stage.inputs:
        return _from_directory(stage, stage.inputs["critic"], encoder)
    if ppo.critic == "shared":
        stage.say("critic is a zero head on the policy's own trunk")
        return ValueHead(policy(), zero_head(policy()), PLAIN, None)
    starts = {
        name: source
        for name, source in rewards.sources.items()
        if isinstance(source, ModelReward) and source.retokenise is None
    }
    if ppo.critic == "policy" or not starts:
        stage.say("critic starts from the policy, its head zero")
        if ppo.sharing == "lora":
            return _fresh_adapter(stage, policy())
        return load_value_model_of_policy(stage.inputs["policy"].path, "float32")
    name, source = next(iter(starts.items()))
    kept = ppo.critic_head == "reward_model"
    stage.say(f"critic starts from the reward model, its head {'kept' if kept else 'zero'}")
    affine = Normalisation(source.normalisation.mean, source.normalisation.std / rewards.weights[name])
    if isinstance(source, AdapterReward):
        copy_adapter(source.model, ADAPTER, source.adapter)
        head = copy.deepcopy(source.head).requires_grad_(True) if kept else zero_head(source.model)
        return ValueHead(source.model, head, affine if kept else PLAIN, ADAPTER)
    if ppo.sharing == "lora":
        raise UserError(
            f"ppo.critic: reward_model under ppo.sharing: lora, but the reward model {source.path} is no adapter over "
            "the policy's base.",
            mend="Train it with rm.lora: true, or set ppo.critic to policy or shared, or ppo.sharing: lora_policy.",
        )
    return load_value_model(source.path, "float32", affine, ppo.critic_head)


def _fresh_adapter(stage: Stage, policy: PreTrainedModel) -> ValueHead:
    add_adapter(policy, ADAPTER, stage.recipe.model.lora, seed=stage.recipe.seed + 1)
    return ValueHead(policy, zero_head(policy), PLAIN, ADAPTER)


def _from_directory(stage: Stage, artifact: Artifact, encoder: Encoder) -> Critic:
    ppo = stage.recipe.ppo
    if ppo.sharing == "lora":
        raise UserError(
            f"ppo.critic: {artifact.path} is a model of its own, and ppo.sharing: lora wants the critic on the base.",
            mend="Set ppo.critic to reward_model, policy or shared, or ppo.sharing: lora_policy.",
        )
    _refuse_other_tokenizer(artifact, encoder, stage.recipe.model)
    affine = read_normalisation(artifact) if artifact.kind == TRAINED else saved_affine(artifact.path)
    stage.say(f"critic starts from {artifact.path}, its head {'kept' if ppo.critic_head == 'reward_model' else 'zero'}")
    return load_value_model(artifact.path, "float32", affine or PLAIN, ppo.critic_head)


def _refuse_other_tokenizer(artifact: Artifact, encoder: Encoder, model: ModelSection) -> None:
    if tokenizer_sha256(load_tokenizer(artifact.path, model)) != tokenizer_sha256(encoder.tokenizer):
        raise UserError(
            f"ppo.critic: {artifact.path} has another tokenizer than the policy; a critic reads the policy's tokens.",
            mend="Start it from a model with the policy's tokenizer, or set ppo.critic: policy.",
        )
