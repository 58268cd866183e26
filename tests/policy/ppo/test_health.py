"""Verdicts: each is provoked by a run that has the fault, its edges by rows of metrics made up for them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from pipeline.recipe import PpoSection
from policy.models import load_policy
from policy.ppo.experience import engine_gap, experience_metrics, make_experience
from policy.ppo.health import WINDOW, Health, Verdict
from policy.ppo.rewards import ModelReward, Rewards
from policy.ppo.roles import Roles
from policy.ppo.update import Learner, UpdateOptions, ppo_update
from reward_model.score import Normalisation, right_pad
from rollout.batch import RolloutBatch
from rollout.engine import EngineOptions, SamplingOptions
from rollout.hf_engine import TransformersEngine
from tests.policy.conftest import EOS, PROMPTS, VOCABULARY, make_roles, tiny_config
from tests.test_architecture import recipe_keys

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
SOUND = {
    "lr/policy": 3e-3,
    "objective/kl": 2.0,
    "objective/kl_error": 0.2,
    "objective/scores": 0.5,
    "policy/approxkl_first": 0.0,
    "policy/clipfrac_avg": 0.1,
    "policy/entropy_avg": 2.0,
    "policy/skipped_steps": 0.0,
    "response/eos_rate": 0.9,
    "response/length": 10.0,
    "rollout/mean_probability_gap": 0.0,
    "rollout/staleness": 0.0,
    "val/explained_variance": 0.5,
    "val/ratio_first": 1.0,
    "val/returns_std": 1.0,
}


def _train(
    policy_dir: Path,
    roles: Roles,
    updates: int,
    *,
    ppo: PpoSection = PPO,
    kl_coef: float = 0.05,
    push: bool = True,
    longest: int = LONGEST,
) -> Health:
    """The loop of the stage on real rollouts of at most `longest` tokens; returns the health after its end.

    `push` sends the weights to the engine.
    """
    options = EngineOptions(max_model_len=32, max_sequences=SIZE, stop_token_ids=(EOS,))
    engine = TransformersEngine(policy_dir, options)
    learner, health = Learner.create(roles, ppo, seed=0), Health(ppo)
    prompts = (PROMPTS * SIZE)[:SIZE]
    for update in range(1, updates + 1):
        seeds = range(update * SIZE, update * SIZE + SIZE)
        completions = engine.generate(prompts, SamplingOptions(longest), list(seeds))
        batch = RolloutBatch.from_completions(prompts, completions, 0)
        experience = make_experience(roles, batch, ppo, kl_coef)
        row = {
            **experience_metrics(experience, kl_coef),
            **ppo_update(roles, learner, experience, UpdateOptions(ppo, 8)),
            "rollout/mean_probability_gap": engine_gap(batch, experience.old_logprobs)[1],
            "rollout/staleness": 0.0,
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


def _policy_of_answers(directory: Path, ends: list[int]) -> Path:
    """A policy fine-tuned on answers of one to four random tokens and `ends`."""
    torch.manual_seed(7)
    model = LlamaForCausalLM(tiny_config())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        torch.manual_seed(step)
        rows = [[*PROMPTS[i % 6], *torch.randint(3, VOCABULARY, (1 + i % 4,)).tolist(), *ends] for i in range(24)]
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
        roles.critic.head.weight.mul_(-2.0)
    ppo = PPO.model_copy(update={"critic_learning_rate": 1e-9, "lam": 1.0})
    health = _train(policy_dir, roles, 15, ppo=ppo)
    assert [v.update for v in health.verdicts if v.name == "explained_variance"] == [15]


def test_a_reward_for_length_shows_as_length_hacking(tmp_path: Path) -> None:
    policy_dir = _policy_of_answers(tmp_path / "policy", ends=[EOS])
    roles = make_roles(policy_dir, _reward_model_of_length(tmp_path / "long", 1.0))
    assert _names(_train(policy_dir, roles, 12, kl_coef=0.0)) == {"length_hacking"}


def test_demonstrations_without_eos_end_in_truncated_responses(tmp_path: Path, reward_dir: Path) -> None:
    policy_dir = _policy_of_answers(tmp_path / "policy", ends=[])
    ppo = PPO.model_copy(update={"learning_rate": 1e-5})
    health = _train(policy_dir, make_roles(policy_dir, reward_dir), 3, ppo=ppo, longest=1)
    assert "all_truncated" in _names(health)
    assert "all_empty" not in _names(health)


def test_a_reward_for_brevity_ends_in_empty_responses_and_no_entropy(policy_dir: Path, tmp_path: Path) -> None:
    roles = make_roles(policy_dir, _reward_model_of_length(tmp_path / "short", -1.0))
    health = _train(policy_dir, roles, 24, kl_coef=0.0)
    assert {"all_empty", "entropy_collapse"} <= _names(health)
    assert "all_truncated" not in _names(health)


def test_scores_without_scale_are_out_of_reach_for_a_clipped_critic(policy_dir: Path, roles: Roles) -> None:
    source = roles.rewards.sources["rm"]
    assert isinstance(source, ModelReward)
    scaled_up = replace(source, normalisation=Normalisation(mean=0.0, std=0.01))
    unscaled = replace(roles, rewards=Rewards({"rm": scaled_up}, {"rm": 1.0}))
    ppo = PPO.model_copy(update={"score_clip": None})
    health = _train(policy_dir, unscaled, 3, ppo=ppo)
    assert "value_clip" in _names(health)
    unclipped = _train(policy_dir, unscaled, 3, ppo=ppo.model_copy(update={"cliprange_value": None}))
    assert "value_clip" not in _names(unclipped)


def _said(rows: Sequence[Mapping[str, float]], ppo: PpoSection = PPO) -> list[tuple[str, int]]:
    """Name and update of each verdict on the rows, which are those of a sound run but for what they hold."""
    health = Health(ppo)
    for update, row in enumerate(rows, 1):
        health.check(update, {**SOUND, **row})
    return [(verdict.name, verdict.update) for verdict in health.verdicts]


FIRST: list[Mapping[str, float]] = [{}] * 3
EDGES = {
    "first_ratio above": (3, [{}, {}, {"val/ratio_first": 1.011}], [{"val/ratio_first": 1.009}]),
    "first_ratio below": (1, [{"val/ratio_first": 0.989}], [{"val/ratio_first": 0.991}]),
    "first_ratio of opposite changes": (1, [{"policy/approxkl_first": 1.1e-3}], [{"policy/approxkl_first": 0.9e-3}]),
    "engine_gap": (1, [{"rollout/mean_probability_gap": 0.0101}], [{"rollout/mean_probability_gap": 0.0099}]),
    "negative_kl": (1, [{"objective/kl": -1.01}], [{"objective/kl": -0.99}]),
    "negative_kl of rounding": (
        1,
        [{"objective/kl": -0.011, "objective/kl_error": 0.0}],
        [{"objective/kl": -0.009, "objective/kl_error": 0.0}],
    ),
    "exploding_kl": (3, [{"objective/kl": kl} for kl in (18.0, 20.0, 22.3)], [{"objective/kl": 19.9}] * 3),
    "clipfrac_high": (3, [{"policy/clipfrac_avg": 0.31}] * 3, [{"policy/clipfrac_avg": 0.31}] * 2),
    "clipfrac_low": (
        10,
        [{"policy/clipfrac_avg": 9e-4}] * 10,
        [{"policy/clipfrac_avg": 9e-4}] * 9 + [{}] + [{"policy/clipfrac_avg": 9e-4}] * 9,
    ),
    "explained_variance": (
        15,
        [{}] * 10 + [{"val/explained_variance": -0.01}] * 5,
        [{"val/explained_variance": -9.0}] * 14 + [{}] + [{"val/explained_variance": -9.0}] * 4,
    ),
    "all_truncated": (3, [{"response/eos_rate": 0.01}] * 3, [{"response/eos_rate": 0.0}] * 2 + [{}]),
    "all_empty": (
        3,
        [{"response/length": 1.1, "objective/kl": 1.0}] * 3,
        [{"response/length": 1.2, "objective/kl": 1.0}] * 3,
    ),
    "all_empty of cut responses": (
        3,
        [{"response/length": 1.0, "response/eos_rate": 0.5, "objective/kl": 1.0}] * 3,
        [{"response/length": 1.0, "response/eos_rate": 0.49, "objective/kl": 1.0}] * 3,
    ),
    "entropy_collapse": (
        6,
        [*FIRST, *[{"policy/entropy_avg": 0.49}] * 3],
        [*FIRST, *[{"policy/entropy_avg": 0.51}] * 3],
    ),
    "length_hacking": (
        6,
        [*FIRST, *[{"response/length": 20.1, "objective/scores": 0.6}] * 3],
        [*FIRST, *[{"response/length": 20.1, "objective/scores": 0.4}] * 3],
    ),
    "length_hacking under twice": (
        6,
        [*FIRST, *[{"response/length": 20.1, "objective/scores": 0.6}] * 3],
        [*FIRST, *[{"response/length": 19.9, "objective/scores": 0.6}] * 3],
    ),
    "value_clip": (3, [{"val/returns_std": 7.1}] * 3, [{"val/returns_std": 7.0}] * 3),
}


@pytest.mark.parametrize("case", EDGES)
def test_a_verdict_begins_at_its_threshold(case: str) -> None:
    update, faulty, sound = EDGES[case]
    assert _said([*faulty, *[faulty[-1]] * 2]) == [(case.partition(" ")[0], update)]
    assert _said(sound) == []


def test_a_kl_target_sets_what_explodes() -> None:
    ppo = PPO.model_copy(update={"kl_target_per_sequence": 4.0})
    assert _said([{"objective/kl": 11.9}] * 3, ppo) == []
    assert _said([{"objective/kl": 12.1}], ppo) == [("exploding_kl", 1)]


def test_no_clipping_is_right_where_no_step_is_off_policy_or_the_schedule_ends() -> None:
    still = [{"policy/clipfrac_avg": 0.0}] * 10
    assert _said(still, PPO.model_copy(update={"num_ppo_epochs": 1, "num_minibatches": 1})) == []
    assert _said([{"policy/clipfrac_avg": 0.0, "lr/policy": 1.4e-3}] * 10) == []


def test_the_end_tells_whether_anything_was_learnt() -> None:
    for kl, names in ((0.009, ["identical"]), (0.011, [])):
        health = Health(PPO)
        for update in (1, 2):
            health.check(update, {**SOUND, "objective/kl": kl})
        assert [verdict.name for verdict in health.finish(2)] == names


def test_a_verdict_says_numbers_and_recipe_keys() -> None:
    health = Health(PPO)
    (verdict,) = health.check(4, {**SOUND, "rollout/mean_probability_gap": 0.02})
    assert isinstance(verdict, Verdict)
    assert str(verdict).startswith(
        "health, update 4: engine_gap: the token probabilities of rollout engine and trainer"
    )
    assert "0.02" in verdict.cause
    assert "rollout.engine" in verdict.mend


def test_a_gap_of_responses_that_older_weights_sampled_on_purpose_is_no_fault() -> None:
    assert Health(PPO).check(4, {**SOUND, "rollout/mean_probability_gap": 0.02, "rollout/staleness": 1.0}) == []


def test_every_mend_names_keys_that_the_recipe_has() -> None:
    keys = {*recipe_keys(), "eval/score_length_spearman"}
    for update, faulty, _ in EDGES.values():
        health = Health(PPO)
        for number, row in enumerate(faulty, 1):
            health.check(number, {**SOUND, **row})
        (verdict,) = health.verdicts
        named = set(re.findall(r"\b(?:ppo|data|rollout|model|rm|eval)[./][a-z_]+[a-z]", verdict.mend))
        assert named, verdict
        assert named <= keys, update


def test_too_many_skipped_steps_stop_the_run_every_time() -> None:
    ppo = PPO.model_copy(update={"max_skipped_steps": 2})
    health = Health(ppo)
    assert health.check(1, {**SOUND, "policy/skipped_steps": 2.0}) == []
    for update in (2, 3):
        (verdict,) = health.check(update, {**SOUND, "policy/skipped_steps": 3.0})
        assert (verdict.name, verdict.severity) == ("skipped_steps", "stop")
        assert "3 optimiser steps" in verdict.cause


@pytest.mark.parametrize("cut", range(1, 16))
def test_a_restored_health_says_what_the_whole_run_says(cut: int, tmp_path: Path) -> None:
    """The fault of each row falls on either side of the cut; the state takes the way through torch.save."""
    rows = [
        {
            "val/explained_variance": -1.0,
            "policy/entropy_avg": 4.0 / n,
            "response/length": 2.0 * n,
            "objective/scores": n,
        }
        for n in range(1, 17)
    ]
    whole, before, after = Health(PPO), Health(PPO), Health(PPO)
    for update, row in enumerate(rows, 1):
        whole.check(update, {**SOUND, **row})
        if update <= cut:
            before.check(update, {**SOUND, **row})
    torch.save(before.state_dict(), tmp_path / "state.pt")
    after.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for update, row in enumerate(rows[cut:], cut + 1):
        after.check(update, {**SOUND, **row})
    assert after.verdicts == whole.verdicts
    assert after.state_dict() == whole.state_dict()
    assert len(whole.verdicts) == 3
