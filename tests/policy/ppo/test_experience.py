"""Experience: what the four models say of a rollout batch, and the check of the engine's weights."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from pipeline.errors import UserError
from pipeline.recipe import PpoSection, Recipe
from policy.ppo.experience import (
    check_engine,
    experience_metrics,
    make_experience,
    policy_logprobs,
    shape_scores,
    training_mode,
)
from rollout.batch import Completion, RolloutBatch
from rollout.engine import EngineOptions, SamplingOptions
from rollout.hf_engine import TransformersEngine
from tests.policy.conftest import EOS, PROMPTS, RESPONSES, make_batch, make_roles

PPO = PpoSection(score_clip=None, missing_eos_penalty=2.0)
FIELDS = ("old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns", "kl", "entropy")


def test_shaped_scores_follow_the_reward_model_read_at_the_last_token(policy_dir: Path, reward_dir: Path) -> None:
    roles = make_roles(policy_dir, reward_dir)
    experience = make_experience(roles, make_batch(), PPO, kl_coef=0.1)
    model = AutoModelForSequenceClassification.from_pretrained(reward_dir).eval()
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad():
            hidden = model.model(torch.tensor([prompt + response])).last_hidden_state[0, -1]
            raw = model.score(hidden).item()
        penalty = 0.0 if response[-1] == EOS else 2.0
        assert experience.scores[row].item() == pytest.approx((raw - 0.3) / 0.7, abs=1e-5)
        assert experience.source_scores["rm"][row] == experience.scores[row]
        assert experience.shaped_scores[row].item() == pytest.approx((raw - 0.3) / 0.7 - penalty, abs=1e-5)


def test_rewards_add_up_to_score_less_the_kl_penalty(policy_dir: Path, reward_dir: Path) -> None:
    roles = make_roles(policy_dir, reward_dir)
    with torch.no_grad():
        noise = torch.randn(40, 16, generator=torch.manual_seed(3))
        next(roles.policy.get_input_embeddings().parameters()).add_(0.1 * noise)
    experience = make_experience(roles, make_batch(), PPO, kl_coef=0.1)
    kl = (experience.old_logprobs - experience.ref_logprobs).sum(1)
    assert kl.abs().min() > 1e-3
    assert torch.allclose(experience.rewards.sum(1), experience.shaped_scores - 0.1 * kl, atol=1e-5)
    last = torch.tensor([len(r) - 1 for r in RESPONSES])
    rows = torch.arange(len(RESPONSES))
    without_score = experience.rewards.clone()
    without_score[rows, last] -= experience.shaped_scores
    assert torch.allclose(without_score, -0.1 * experience.kl, atol=1e-5)


def test_advantages_are_whitened_over_all_tokens_of_the_batch(policy_dir: Path, reward_dir: Path) -> None:
    experience = make_experience(make_roles(policy_dir, reward_dir), make_batch(), PPO, kl_coef=0.1)
    valid = experience.advantages[experience.batch.response_mask]
    assert valid.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert valid.var(unbiased=False).item() == pytest.approx(1.0, abs=1e-4)
    assert (experience.advantages[~experience.batch.response_mask] == 0).all()


@pytest.mark.parametrize(("max_tokens", "padding"), [(1, (0, 0)), (12, (0, 0)), (25, (4, 3)), (10_000, (2, 5))])
def test_micro_batches_and_padding_change_nothing(
    policy_dir: Path, reward_dir: Path, max_tokens: int, padding: tuple[int, int]
) -> None:
    expected = make_experience(make_roles(policy_dir, reward_dir), make_batch(), PPO, kl_coef=0.1)
    roles = make_roles(policy_dir, reward_dir, max_tokens=max_tokens)
    got = make_experience(roles, make_batch(*padding), PPO, kl_coef=0.1)
    width = expected.values.shape[1]
    for name in FIELDS:
        assert torch.allclose(vars(got)[name][:, :width], vars(expected)[name], atol=2e-5), name
        assert (vars(got)[name][:, width:] == 0).all(), name


def test_a_forward_is_no_wider_than_its_longest_row_and_keeps_to_the_token_budget(
    policy_dir: Path, reward_dir: Path
) -> None:
    """A long prompt with a short answer and a short prompt with a long answer need no more than either."""
    roles = make_roles(policy_dir, reward_dir, max_tokens=24)
    lengths = [(9, 3), (3, 9), (2, 4)]
    prompts = [list(range(3, 3 + size)) for size, _ in lengths]
    completions = [Completion((4,) * size, (-1.0,) * size, finished=False) for _, size in lengths]
    batch = RolloutBatch.from_completions(prompts, completions, pad_id=0)
    shapes: list[tuple[int, ...]] = []

    def note(module: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    with roles.policy.base_model.register_forward_pre_hook(note, with_kwargs=True):
        policy_logprobs(roles, roles.policy, batch)
    assert shapes == [(2, 12), (1, 6)]


def test_the_first_forward_is_kept_only_where_its_graphs_fit_into_the_token_budget(
    policy_dir: Path, reward_dir: Path
) -> None:
    """Six rows of 45 tokens in all; the policy's and the critic's graph stand beside each other."""
    ppo = PPO.model_copy(update={"num_minibatches": 1})
    lengths = make_batch().attention_mask.sum(1)
    padded = int(lengths.max()) * len(lengths)
    for max_tokens, kept in ((padded, False), (2 * padded - 1, False), (2 * padded, True)):
        roles = make_roles(policy_dir, reward_dir, max_tokens=max_tokens)
        assert bool(make_experience(roles, make_batch(), ppo, 0.1).passes) == kept
    assert not make_experience(roles, make_batch(), PPO.model_copy(update={"num_minibatches": 2}), 0.1).passes


def test_models_train_inside_training_mode_alone(policy_dir: Path, reward_dir: Path) -> None:
    roles = make_roles(policy_dir, reward_dir)
    with training_mode(roles):
        assert roles.policy.training
        assert roles.critic.training
    with training_mode(roles, on=False):
        assert not roles.policy.training
    assert not roles.policy.training
    assert not roles.critic.training


def test_scores_are_clipped_on_both_sides_before_the_penalties() -> None:
    ppo = PPO.model_copy(update={"score_clip": 1.5})
    scores = torch.tensor([4.0, -4.0, 0.5, 4.0, -4.0, 0.5])  # rows 1 and 4 have no EOS
    assert shape_scores(scores, make_batch(), ppo, None).tolist() == [1.5, -3.5, 0.5, 1.5, -3.5, 0.5]


def test_metrics_report_both_estimates_of_the_kl_and_the_weights(policy_dir: Path, reward_dir: Path) -> None:
    roles = make_roles(policy_dir, reward_dir)
    with torch.no_grad():
        roles.reference.lm_head.weight.mul_(0.7)
    ppo = PPO.model_copy(update={"importance_level": "token", "importance_high": 3.0})
    experience = make_experience(roles, make_batch(), ppo, kl_coef=0.1)
    metrics = experience_metrics(experience, 0.1)
    k1, k3, weights = [], [], []
    for row, response in enumerate(RESPONSES):
        gaps = [float(experience.old_logprobs[row, t] - experience.ref_logprobs[row, t]) for t in range(len(response))]
        k1.append(sum(gaps))
        k3.append(sum(math.exp(-gap) - 1 + gap for gap in gaps))
        weights += [min(3.0, math.exp(float(experience.old_logprobs[row, t]) + 1.0)) for t in range(len(response))]
    assert metrics["objective/kl"] == pytest.approx(sum(k1) / 6, rel=1e-5)
    error = (sum((kl - sum(k1) / 6) ** 2 for kl in k1) / 5 / 6) ** 0.5
    assert metrics["objective/kl_error"] == pytest.approx(error, rel=1e-4)
    assert metrics["objective/kl_k3"] == pytest.approx(sum(k3) / 6, rel=1e-5)
    assert metrics["rollout/importance_weight"] == pytest.approx(sum(weights) / len(weights), rel=1e-5)
    agreeing = make_experience(roles, make_batch(), ppo, kl_coef=0.1, logprob_tolerance=1e3)
    assert agreeing.weights is None
    assert experience_metrics(agreeing, 0.1)["rollout/importance_weight"] == 1.0


def _rollout(policy_dir: Path) -> RolloutBatch:
    options = EngineOptions(max_model_len=24, max_sequences=8, stop_token_ids=(EOS,))
    engine = TransformersEngine(policy_dir, options)
    completions = engine.generate(PROMPTS, SamplingOptions(12), list(range(len(PROMPTS))))
    engine.close()
    return RolloutBatch.from_completions(PROMPTS, completions, 0)


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.model_validate({"name": "x", "model": {"name_or_path": "m"}})


def test_engine_with_the_current_weights_passes(policy_dir: Path, reward_dir: Path, recipe: Recipe) -> None:
    experience = make_experience(make_roles(policy_dir, reward_dir), _rollout(policy_dir), PPO, kl_coef=0.1)
    gap, probability_gap = check_engine(experience, recipe, 1, "transformers")
    assert gap < 1e-4
    assert probability_gap < 1e-4


def test_stale_engine_weights_stop_the_run(policy_dir: Path, reward_dir: Path, recipe: Recipe) -> None:
    roles = make_roles(policy_dir, reward_dir)
    with torch.no_grad():
        roles.policy.model.layers[0].mlp.up_proj.weight += 0.05
    experience = make_experience(roles, _rollout(policy_dir), PPO, kl_coef=0.1)
    with pytest.raises(UserError, match=r"update 7: transformers's log-probabilities differ.*current weights"):
        check_engine(experience, recipe, 7, "transformers")


def test_nan_gap_stops_the_run_too(policy_dir: Path, reward_dir: Path, recipe: Recipe) -> None:
    experience = make_experience(make_roles(policy_dir, reward_dir), _rollout(policy_dir), PPO, kl_coef=0.1)
    broken = replace(experience, old_logprobs=experience.old_logprobs * float("nan"))
    with pytest.raises(UserError):
        check_engine(broken, recipe, 1, "transformers")
