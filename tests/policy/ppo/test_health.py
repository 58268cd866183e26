"""Verdicts: each is provoked by a run that has the fault, its edges by rows of metrics made up for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from pipeline.recipe import PpoSection
from policy.models import load_policy
from policy.ppo.experience import Roles, engine_gap, experience_metrics, make_experience
from policy.ppo.health import WINDOW, Health, Verdict
from policy.ppo.update import Learner, ppo_update
from reward_model.score import Normalisation, right_pad
from rollout.batch import RolloutBatch
from rollout.engine import EngineOptions, SamplingOptions
from rollout.hf_engine import TransformersEngine
from tests.policy.conftest import EOS, PROMPTS, VOCABULARY, make_roles, tiny_config

LONGEST = 12
SIZE = 48
PPO = PpoSection(
    rollout_batch_size=SIZE,
    num_ppo_epochs=2,
    num_minibatches=2,
    learning_rate=3e-3,
    critic_learning_rate=3e-3,
    lr_schedule="constant",
    missing_eos_penalty=0.0,
    cliprange_value=0.5,
)
Change = Callable[[Roles], Roles]


def _train(
    policy_dir: Path,
    roles: Roles,
    updates: int,
    *,
    ppo: PpoSection = PPO,
    kl_coef: float = 0.05,
    push: bool = True,
) -> Health:
    """The loop of the stage on real rollouts; returns the health after its end. `push` sends weights to the engine."""
    options = EngineOptions(max_model_len=32, max_sequences=SIZE, stop_token_ids=(EOS,))
    engine = TransformersEngine(policy_dir, options)
    learner, health = Learner.create(roles, ppo, seed=0), Health(ppo)
    prompts = (PROMPTS * SIZE)[:SIZE]
    for update in range(1, updates + 1):
        seeds = range(update * SIZE, update * SIZE + SIZE)
        completions = engine.generate(prompts, SamplingOptions(LONGEST), list(seeds))
        batch = RolloutBatch.from_completions(prompts, completions, 0)
        experience = make_experience(roles, batch, ppo, kl_coef)
        row = {
            **experience_metrics(experience, kl_coef),
            **ppo_update(roles, learner, experience, ppo),
            "rollout/mean_probability_gap": engine_gap(batch, experience.old_logprobs)[1],
            "lr/policy": ppo.learning_rate,
            "policy/skipped_steps": float(learner.skipped_steps),
        }
        if push:
            engine.load_weights(roles.policy.state_dict().items())
        health.check(update, row)
    engine.close()
    health.finish(updates)
    return health


def _names(health: Health) -> set[str]:
    return {verdict.name for verdict in health.verdicts}


def _policy_of_short_answers(directory: Path) -> Path:
    """A policy fine-tuned to answer with one to four random tokens and EOS."""
    torch.manual_seed(7)
    model = LlamaForCausalLM(tiny_config())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        torch.manual_seed(step)
        rows = [[*PROMPTS[i % 6], *torch.randint(3, VOCABULARY, (1 + i % 4,)).tolist(), EOS] for i in range(24)]
        ids, mask = right_pad(rows)
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        optimizer.step()
    model.save_pretrained(directory)
    return directory


def _reward_model_of_length(directory: Path, sign: float) -> Path:
    """A reward model fitted to `sign` x response length on random responses, of which short ones end with EOS."""
    torch.manual_seed(5)
    model = LlamaForSequenceClassification(tiny_config(num_labels=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(6)

    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    for _ in range(150):
        lengths = draw(1, LONGEST + 1, 64)
        responses = [draw(3, VOCABULARY, n) if n == LONGEST else [*draw(3, VOCABULARY, n - 1), EOS] for n in lengths]
        prompts = [PROMPTS[i] for i in draw(0, len(PROMPTS), 64)]
        ids, mask = right_pad([p + r for p, r in zip(prompts, responses, strict=True)])
        scores = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
        target = sign * (torch.tensor(lengths) - LONGEST / 2) / 3
        optimizer.zero_grad()
        (scores - target).square().mean().backward()
        optimizer.step()
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def roles(policy_dir: Path, reward_dir: Path) -> Roles:
    return make_roles(policy_dir, reward_dir)


def test_a_sound_run_has_no_verdict(policy_dir: Path, roles: Roles) -> None:
    assert _train(policy_dir, roles, 14).verdicts == []


def test_dropout_in_training_shows_in_the_first_ratio(policy_dir: Path, roles: Roles) -> None:
    with_dropout = replace(roles, policy=load_policy(policy_dir, "float32").eval())
    health = _train(policy_dir, with_dropout, 1)
    assert [(v.name, v.update, v.severity) for v in health.verdicts if v.name != "identical"] == [
        ("first_ratio", 1, "warning")
    ]


def test_weights_that_never_reach_the_engine_show_as_gap_and_negative_kl(policy_dir: Path, roles: Roles) -> None:
    health = _train(policy_dir, roles, 8, kl_coef=0.0, push=False)
    assert {"engine_gap", "negative_kl"} <= _names(health)


def test_a_huge_learning_rate_shows_as_clipping_and_exploding_kl(policy_dir: Path, roles: Roles) -> None:
    ppo = PPO.model_copy(update={"learning_rate": 0.05, "num_ppo_epochs": 4})
    assert {"clipfrac_high", "exploding_kl"} <= _names(_train(policy_dir, roles, 6, ppo=ppo, kl_coef=0.0))


def test_a_tiny_learning_rate_shows_as_no_clipping_and_the_policy_of_the_start(policy_dir: Path, roles: Roles) -> None:
    ppo = PPO.model_copy(update={"learning_rate": 1e-7})
    health = _train(policy_dir, roles, WINDOW, ppo=ppo)
    assert [(verdict.name, verdict.update) for verdict in health.verdicts] == [
        ("clipfrac_low", WINDOW),
        ("identical", WINDOW),
    ]


def test_a_critic_that_never_learns_explains_less_than_nothing(policy_dir: Path, roles: Roles) -> None:
    with torch.no_grad():
        roles.critic.model.score.weight.mul_(-2.0)
    ppo = PPO.model_copy(update={"critic_learning_rate": 1e-9, "lam": 1.0})
    health = _train(policy_dir, roles, 15, ppo=ppo)
    assert [v.update for v in health.verdicts if v.name == "explained_variance"] == [15]


def test_a_reward_for_length_shows_as_length_hacking_and_truncation(tmp_path: Path) -> None:
    policy_dir = _policy_of_short_answers(tmp_path / "policy")
    roles = make_roles(policy_dir, _reward_model_of_length(tmp_path / "long", 1.0))
    health = _train(policy_dir, roles, 30, kl_coef=0.0)
    assert {"length_hacking", "all_truncated"} <= _names(health)


def test_a_reward_for_brevity_ends_in_empty_responses_and_no_entropy(policy_dir: Path, tmp_path: Path) -> None:
    roles = make_roles(policy_dir, _reward_model_of_length(tmp_path / "short", -1.0))
    health = _train(policy_dir, roles, 30, kl_coef=0.0)
    assert {"all_empty", "entropy_collapse"} <= _names(health)
    assert "all_truncated" not in _names(health)


def test_scores_without_scale_are_out_of_reach_for_a_clipped_critic(policy_dir: Path, roles: Roles) -> None:
    unscaled = replace(roles, normalisation=Normalisation(mean=0.0, std=0.01))
    ppo = PPO.model_copy(update={"score_clip": None})
    health = _train(policy_dir, unscaled, 3, ppo=ppo)
    assert "value_clip" in _names(health)
    unclipped = _train(policy_dir, unscaled, 3, ppo=ppo.model_copy(update={"cliprange_value": None}))
    assert "value_clip" not in _names(unclipped)
