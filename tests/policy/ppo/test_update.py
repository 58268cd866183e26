"""The optimisation phase: true step counts, first ratio 1, invariance to micro-batches and padding, direction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from pipeline.recipe import PpoSection
from policy.ppo.experience import Experience, make_experience
from policy.ppo.rewards import ModelReward
from policy.ppo.roles import Roles
from policy.ppo.update import Learner, UpdateOptions, ppo_update
from policy.tensors import Reduction
from tests.policy.conftest import VOCABULARY, make_batch, make_roles

PPO = PpoSection(
    rollout_batch_size=6, num_ppo_epochs=2, num_minibatches=3, learning_rate=1e-3, critic_learning_rate=1e-3, updates=4
)


def _trained(roles: Roles, experience: Experience, ppo: PpoSection) -> tuple[dict[str, float], Learner]:
    learner = Learner.create(roles, ppo, seed=0)
    return ppo_update(roles, learner, experience, UpdateOptions(ppo, 8)), learner


def test_every_minibatch_is_one_optimiser_step(policy_dir: Path, reward_dir: Path) -> None:
    roles = make_roles(policy_dir, reward_dir, max_tokens=8)
    _, learner = _trained(roles, make_experience(roles, make_batch(), PPO, 0.1), PPO)
    for optimizer in (learner.policy_optimizer, learner.critic_optimizer):
        assert {int(state["step"]) for state in optimizer.state.values()} == {2 * 3}


def test_first_ratio_is_one_with_dropout_in_the_configuration(policy_dir: Path, reward_dir: Path) -> None:
    roles = make_roles(policy_dir, reward_dir)
    ppo = PPO.model_copy(update={"num_minibatches": 1})
    metrics, _ = _trained(roles, make_experience(roles, make_batch(), ppo, 0.1), ppo)
    assert metrics["val/ratio_first"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["policy/approxkl_first"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["policy/approxkl_avg"] > 1e-6
    assert metrics["val/ratio"] != pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("max_tokens", "padding"), [(1, (0, 0)), (16, (3, 2))])
def test_result_does_not_depend_on_micro_batches_or_padding(
    policy_dir: Path, reward_dir: Path, max_tokens: int, padding: tuple[int, int]
) -> None:
    whole = make_roles(policy_dir, reward_dir)
    expected, _ = _trained(whole, make_experience(whole, make_batch(), PPO, 0.1), PPO)
    split = make_roles(policy_dir, reward_dir, max_tokens=max_tokens)
    got, _ = _trained(split, make_experience(split, make_batch(*padding), PPO, 0.1), PPO)
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    for (name, a), b in zip(whole.policy.named_parameters(), split.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")
    for a, b in zip(whole.critic.parameters(), split.critic.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def gpt2_dirs(tmp_path: Path) -> tuple[Path, Path]:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4, pad_token_id=0
    )
    config.num_labels = 1
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "policy")
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    return tmp_path / "policy", tmp_path / "reward"


EVERY_TERM = PPO.model_copy(
    update={
        "num_minibatches": 1,
        "cliprange_high": 0.3,
        "dual_clip": 2.0,
        "entropy_coef": 0.05,
        "kl_loss_coef": 0.2,
        "importance_level": "sequence",
        "importance_high": 9.0,
    }
)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "fixed_length"])
@pytest.mark.parametrize(
    ("max_tokens", "padding", "order"),
    [
        (1, (0, 0), [0, 1, 2, 3, 4, 5]),
        (16, (3, 2), [0, 1, 2, 3, 4, 5]),
        (20, (0, 0), [4, 2, 5, 0, 1, 3]),
    ],
)
def test_result_in_float64_is_the_same_for_any_micro_batch_padding_and_order(
    tmp_path: Path, max_tokens: int, padding: tuple[int, int], order: list[int], reduction: str
) -> None:
    """All terms of both losses are on; the second epoch is off-policy. Llama's norms would compute in float32."""
    policy_dir, reward_dir = gpt2_dirs(tmp_path)
    ppo = EVERY_TERM.model_copy(update={"loss_reduction": reduction})

    def weights(max_tokens: int, padding: tuple[int, int], order: list[int]) -> list[torch.Tensor]:
        roles = make_roles(policy_dir, reward_dir)
        experience = make_experience(roles, make_batch(), ppo, 0.1)
        roles = replace(roles, max_tokens=max_tokens)
        roles.policy.double()
        roles.critic.double()
        padded = make_batch(*padding)
        wide = torch.nn.functional.pad
        tensors = {
            name: wide(value.double(), (0, padding[1]))[order] if value.ndim == 2 else value.double()[order]
            for name, value in vars(experience).items()
            if isinstance(value, torch.Tensor)
        }
        _trained(roles, replace(experience, batch=padded.select(order), passes=(), **tensors), ppo)
        return [p.detach() for p in (*roles.policy.parameters(), *roles.critic.parameters())]

    expected = weights(10_000, (0, 0), [0, 1, 2, 3, 4, 5])
    for got, one in zip(weights(max_tokens, padding, order), expected, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-10, atol=1e-10)


def test_every_term_of_the_loss_moves_the_policy(policy_dir: Path, reward_dir: Path) -> None:
    """One step in float64 with each term taken away: the weights differ."""

    def after(**changes: object) -> torch.Tensor:
        roles = make_roles(policy_dir, reward_dir)
        with torch.no_grad():
            roles.reference.lm_head.weight.mul_(0.7)
        ppo = EVERY_TERM.model_copy(update=changes)
        _trained(roles, make_experience(roles, make_batch(), ppo, 0.1), ppo)
        return torch.cat([p.detach().flatten() for p in roles.policy.parameters()])

    whole = after()
    for key, off in {
        "entropy_coef": 0.0,
        "kl_loss_coef": 0.0,
        "importance_level": "off",
        "loss_reduction": "fixed_length",
        "cliprange_high": 0.001,
        "whiten_rewards": True,
        "length_penalty": 0.7,
        "kl_estimator": "k3",
    }.items():
        assert (after(**{key: off}) - whole).abs().max() > 1e-7, key


def test_entropy_bonus_raises_entropy_and_kl_loss_lowers_the_kl(policy_dir: Path, reward_dir: Path) -> None:
    def after(**changes: object) -> Experience:
        roles = make_roles(policy_dir, reward_dir)
        with torch.no_grad():
            roles.reference.lm_head.weight.mul_(0.7)
        ppo = PPO.model_copy(update=changes)
        experience = make_experience(roles, make_batch(), ppo, 0.0)
        _trained(roles, replace(experience, advantages=torch.zeros_like(experience.advantages)), ppo)
        return make_experience(roles, make_batch(), ppo, 0.0)

    mask = make_batch().response_mask
    plain = after()
    assert after(entropy_coef=1.0).entropy[mask].mean() > plain.entropy[mask].mean() + 1e-3
    assert after(kl_loss_coef=1.0).kl[mask].square().mean() < plain.kl[mask].square().mean() - 1e-3


def test_warm_up_trains_the_critic_alone(policy_dir: Path, reward_dir: Path) -> None:
    roles = make_roles(policy_dir, reward_dir)
    before = [p.detach().clone() for p in roles.policy.parameters()]
    critic = [p.detach().clone() for p in roles.critic.parameters()]
    experience = make_experience(roles, make_batch(), PPO, 0.1)
    ppo_update(roles, Learner.create(roles, PPO, 0), experience, UpdateOptions(PPO, 8, train_policy=False))
    assert all(torch.equal(a, b) for a, b in zip(before, roles.policy.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(critic, roles.critic.parameters(), strict=True))


def test_target_kl_ends_an_update_before_the_step_that_exceeds_it(policy_dir: Path, reward_dir: Path) -> None:
    roles = make_roles(policy_dir, reward_dir)
    experience = make_experience(roles, make_batch(), PPO, 0.1)
    ppo = PPO.model_copy(update={"target_kl": 1e-12, "num_minibatches": 1})
    metrics, learner = _trained(roles, experience, ppo)
    assert metrics["policy/steps"] == 1
    assert metrics["policy/trained_tokens"] == 2 * 38, "the pass that goes too far has been made"
    assert {int(state["step"]) for state in learner.policy_optimizer.state.values()} == {1}
    again = make_roles(policy_dir, reward_dir)
    far, _ = _trained(again, experience, PPO.model_copy(update={"target_kl": 1e3}))
    assert far["policy/steps"] == 6
    assert far["policy/trained_tokens"] == 2 * 38


def test_target_kl_is_a_bound_on_the_approximate_kl_itself(policy_dir: Path, reward_dir: Path) -> None:
    ppo = PPO.model_copy(update={"num_minibatches": 1, "num_ppo_epochs": 2, "updates": 9})

    def steps(**changes: float) -> dict[str, float]:
        roles = make_roles(policy_dir, reward_dir)
        return _trained(roles, make_experience(roles, make_batch(), PPO, 0.1), ppo.model_copy(update=changes))[0]

    second = 2 * steps()["policy/approxkl_avg"]  # that of the first step is 0
    assert second > 1e-6
    assert steps(target_kl=0.9 * second)["policy/steps"] == 1
    assert steps(target_kl=1.1 * second)["policy/steps"] == 2


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "fixed_length"])
def test_the_clipped_value_loss_of_a_step_by_hand(policy_dir: Path, reward_dir: Path, reduction: Reduction) -> None:
    """All six sequences in one step, 8 tokens at most; the critic has moved since the values of the experience."""
    roles = make_roles(policy_dir, reward_dir, max_tokens=12)
    ppo = PPO.model_copy(
        update={"num_minibatches": 1, "num_ppo_epochs": 1, "cliprange_value": 0.1, "loss_reduction": reduction}
    )
    experience = replace(make_experience(roles, make_batch(), ppo, 0.1), passes=())
    with torch.no_grad():
        roles.critic.head.weight.mul_(1.5)
        values = roles.critic(make_batch())
    old, returns, mask = experience.values, experience.returns, experience.batch.response_mask
    clipped = old + (values - old).clamp(-0.1, 0.1)
    losses = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) * mask
    assert not torch.allclose(clipped, values, atol=1e-2)
    expected = {
        "token_mean": losses.sum() / mask.sum(),
        "sequence_mean": (losses.sum(1) / mask.sum(1)).mean(),
        "fixed_length": losses.sum() / (6 * 8),
    }[reduction]
    metrics, _ = _trained(roles, experience, ppo)
    assert metrics["loss/value_avg"] == pytest.approx(float(expected), rel=1e-5)


def test_log_probs_move_with_the_advantages_and_values_towards_returns(policy_dir: Path, reward_dir: Path) -> None:
    roles = make_roles(policy_dir, reward_dir)
    experience = make_experience(roles, make_batch(), PPO, 0.0)
    mask = experience.batch.response_mask
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]).unsqueeze(1)
    chosen = replace(experience, advantages=sign * mask)
    _trained(roles, chosen, PPO)
    after = make_experience(roles, make_batch(), PPO, 0.0)
    moved = ((after.old_logprobs - experience.old_logprobs) * mask).sum(1) * sign.squeeze(1)
    assert (moved > 0).all()
    error = ((experience.values - experience.returns)[mask] ** 2).mean()
    assert ((after.values - experience.returns)[mask] ** 2).mean() < error


def _forget(embedding: torch.nn.Module, token: int) -> None:
    """Makes every sequence that holds `token` come out as NaN."""
    with torch.no_grad():
        next(embedding.parameters())[token] = torch.nan


def test_a_minibatch_that_is_not_finite_moves_nothing_and_its_row_is_named(policy_dir: Path, reward_dir: Path) -> None:
    """The critic cannot read token 30, which row 4 alone holds: one of three minibatches, in both epochs."""
    roles = make_roles(policy_dir, reward_dir, max_tokens=8)
    experience = make_experience(roles, make_batch(), PPO, 0.1)
    _forget(roles.critic.trunk.get_input_embeddings(), 30)
    metrics, learner = _trained(roles, experience, PPO)
    assert (learner.skipped_steps, learner.skipped_rows) == (2, [[4], [4]])
    for optimizer in (learner.policy_optimizer, learner.critic_optimizer):
        assert {int(state["step"]) for state in optimizer.state.values()} == {4}
    assert all(parameter.isfinite().all() for parameter in roles.policy.parameters())
    assert metrics["loss/value_avg"] != metrics["loss/value_avg"]  # NaN: the row of metrics shows it
    ppo_update(roles, learner, experience, UpdateOptions(PPO, 8))
    assert (learner.skipped_steps, learner.skipped_rows) == (4, [[4], [4]])


def test_a_score_that_is_not_finite_spoils_every_minibatch_and_its_row_is_named(
    policy_dir: Path, reward_dir: Path
) -> None:
    roles = make_roles(policy_dir, reward_dir)
    source = roles.rewards.sources["rm"]
    assert isinstance(source, ModelReward)
    _forget(source.model.get_input_embeddings(), 26)
    before = [parameter.clone() for parameter in [*roles.policy.parameters(), *roles.critic.parameters()]]
    _, learner = _trained(roles, make_experience(roles, make_batch(), PPO, 0.1), PPO)
    assert (learner.skipped_steps, learner.skipped_rows) == (6, [[3]] * 6)
    after = [*roles.policy.parameters(), *roles.critic.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_gradient_that_overflows_under_a_finite_loss_names_its_minibatch(policy_dir: Path, reward_dir: Path) -> None:
    """Returns of 1e18: their squares are finite in float32, the squares of the gradients are not."""
    roles = make_roles(policy_dir, reward_dir)
    ppo = PPO.model_copy(update={"num_minibatches": 1, "num_ppo_epochs": 1, "cliprange_value": None})
    experience = make_experience(roles, make_batch(), ppo, 0.1)
    huge = replace(experience, passes=(), returns=experience.returns + 1e18 * experience.batch.response_mask)
    with torch.no_grad():
        roles.critic.head.weight.mul_(1e3)
    metrics, learner = _trained(roles, huge, ppo)
    assert metrics["loss/value_avg"] < 1e38
    assert metrics["val/grad_norm"] == float("inf")
    assert (learner.skipped_steps, learner.skipped_rows) == (1, [[0, 1, 2, 3, 4, 5]])


def test_learning_rate_decays_linearly_to_zero(policy_dir: Path, reward_dir: Path) -> None:
    roles = make_roles(policy_dir, reward_dir)
    learner = Learner.create(roles, PPO, seed=0)
    rates = []
    for _ in range(4):
        rates.append(learner.policy_schedule.get_last_lr()[0])
        learner.policy_optimizer.step()
        learner.policy_schedule.step()
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
