"""Tiny random models and a hand-made rollout batch for the policy tests."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from policy.critics import load_value_model
from policy.models import disable_dropout, load_policy
from policy.ppo.rewards import ModelReward, Rewards
from policy.ppo.roles import Roles
from reward_model.score import Normalisation, load_reward_model
from rollout.batch import Completion, RolloutBatch

VOCABULARY = 40
EOS = 2
PROMPTS = [[1, 5, 6, 7], [1, 8], [1, 9, 10], [1, 11, 12, 13, 14], [1, 15], [1, 16, 17]]
RESPONSES = [[20, 21, EOS], [22, 23, 24, 25], [EOS], [26, 27, 28, 29, EOS], [30, 31], [32, 33, 34, EOS]]


def tiny_config(**changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "initializer_range": 0.4,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**{**settings, **changes})


@pytest.fixture
def policy_dir(tmp_path: Path) -> Path:
    """A policy whose configuration asks for attention dropout, which the project must turn off."""
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(attention_dropout=0.5)).save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def reward_dir(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    LlamaForSequenceClassification(tiny_config(num_labels=1)).save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


def make_roles(policy_dir: Path, reward_dir: Path, *, max_tokens: int = 10_000, temperature: float = 1.0) -> Roles:
    policy, reference = load_policy(policy_dir, "float32"), load_policy(policy_dir, "float32")
    disable_dropout(policy)
    disable_dropout(reference)
    normalisation = Normalisation(mean=0.3, std=0.7)
    return Roles(
        policy=policy.eval(),
        reference=reference.eval().requires_grad_(False),
        critic=load_value_model(reward_dir, "float32", normalisation, "reward_model").eval(),
        rewards=Rewards({"rm": make_source(reward_dir, normalisation, max_tokens)}, {"rm": 1.0}),
        temperature=temperature,
        max_tokens=max_tokens,
    )


def no_policy() -> LlamaForCausalLM:
    raise AssertionError("the policy is loaded for nothing")


def make_source(reward_dir: Path, normalisation: Normalisation, max_tokens: int = 10_000) -> ModelReward:
    model = load_reward_model(reward_dir, torch.float32, "cpu")
    return ModelReward(str(reward_dir), model, normalisation, max_tokens, nullcontext)


def make_batch(extra_prompt_padding: int = 0, extra_response_padding: int = 0) -> RolloutBatch:
    completions = [Completion(tuple(ids), tuple(-1.0 for _ in ids), finished=ids[-1] == EOS) for ids in RESPONSES]
    batch = RolloutBatch.from_completions(PROMPTS, completions, 0)
    rows = len(PROMPTS)
    left = torch.zeros(rows, extra_prompt_padding, dtype=torch.long)
    right = torch.zeros(rows, extra_response_padding, dtype=torch.long)
    return RolloutBatch(
        prompt_ids=torch.cat([left, batch.prompt_ids], 1),
        prompt_mask=torch.cat([left.bool(), batch.prompt_mask], 1),
        response_ids=torch.cat([batch.response_ids, right], 1),
        response_mask=torch.cat([batch.response_mask, right.bool()], 1),
        rollout_logprobs=torch.cat([batch.rollout_logprobs, right.float()], 1),
        finished=batch.finished,
    )
