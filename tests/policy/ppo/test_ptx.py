"""The language-model loss in PPO: torch's cross-entropy on full logits, its demonstrations, its place in the step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from pipeline.tokens import EncodedExample
from policy.ppo.experience import Roles, make_experience
from policy.ppo.ptx import PtxLoss
from policy.ppo.stage import run
from policy.ppo.update import Learner, UpdateOptions, ppo_update
from policy.sft import sft_rows
from tests.policy.conftest import EOS, make_batch, make_roles
from tests.policy.ppo.test_stage import _reward_model, _stage
from tests.policy.ppo.test_update import PPO, gpt2_dirs
from tests.workplace import change_rows, make_workplace

EXAMPLES = [
    EncodedExample([1, 5, 6, 20, 21, EOS], 3),
    EncodedExample([1, 8, 22, EOS], 2),
    EncodedExample([1, 9, 10, 23, 24, 25, 26, 27, EOS], 1),  # a plain text behind its BOS
    EncodedExample([11, 28, 29, 30, EOS], 0),  # and one without
    EncodedExample([1, 15, 31], 2),  # cut: no EOS
]
COEF = 0.3


def ptx_of(size: int = len(EXAMPLES), seed: int = 0) -> PtxLoss:
    return PtxLoss(EXAMPLES, COEF, size, seed, 0)


def gradients(roles: Roles) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in roles.policy.parameters()]


def plain_loss(roles: Roles, examples: list[EncodedExample]) -> torch.Tensor:
    """torch's cross-entropy on full logits, row by row, with the labels of the SFT stage."""
    total, tokens = torch.zeros(()), 0
    for ids, labels in zip(*sft_rows(examples).values(), strict=True):
        logits = roles.policy(torch.tensor([ids])).logits[0, :-1]
        wanted = torch.tensor(labels[1:])
        total = total + cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
        tokens += int((wanted != -100).sum())
    return total / tokens


@pytest.mark.parametrize("max_tokens", [1, 14, 10_000])
def test_loss_and_gradient_are_those_of_cross_entropy_whatever_the_micro_batches(
    tmp_path: Path, max_tokens: int
) -> None:
    """In float64, and at temperature 1 although responses are sampled at 0.7."""
    policy_dir, reward_dir = gpt2_dirs(tmp_path)
    roles = make_roles(policy_dir, reward_dir, max_tokens=max_tokens, temperature=0.7)
    roles.policy.double()
    expected = plain_loss(roles, EXAMPLES)
    (COEF * expected).backward()
    wanted = [gradient.clone() for gradient in gradients(roles)]
    roles.policy.zero_grad()
    loss = ptx_of().backward(roles, 1)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0.0, check_dtype=False)
    for got, one in zip(gradients(roles), wanted, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-10, atol=1e-12)


def test_each_pass_uses_every_example_once_and_a_step_is_the_same_for_whoever_asks() -> None:
    def used(ptx: PtxLoss, step: int) -> list[int]:
        batch = ptx.batch(step)
        rows = zip(batch.input_ids, batch.attention_mask, strict=True)
        return [[example.ids for example in EXAMPLES].index(ids[mask].tolist()) for ids, mask in rows]

    steps = [used(ptx_of(size=2), step) for step in range(1, 6)]
    places = [row for step in steps for row in step]
    assert sorted(places[:5]) == sorted(places[5:]) == [0, 1, 2, 3, 4]
    assert places[:5] != places[5:]
    assert [used(ptx_of(size=2), step) for step in (4, 5)] == steps[3:]
    assert [used(ptx_of(size=2, seed=1), step) for step in range(1, 6)] != steps
    assert sorted(used(ptx_of(size=7), 1)[:5]) == [0, 1, 2, 3, 4]


def test_a_step_adds_the_loss_before_it_clips_and_counts_it(policy_dir: Path, reward_dir: Path) -> None:
    """Without advantages the policy's gradient is that of the language-model loss."""
    roles = make_roles(policy_dir, reward_dir)
    ppo = PPO.model_copy(update={"num_ppo_epochs": 1, "num_minibatches": 1, "max_grad_norm": 1e-3})
    experience = make_experience(roles, make_batch(), ppo, 0.0)
    still = replace(experience, advantages=torch.zeros_like(experience.advantages))
    (COEF * plain_loss(roles, EXAMPLES)).backward()
    norm = torch.cat([gradient.flatten() for gradient in gradients(roles)]).norm().item()
    expected = plain_loss(roles, EXAMPLES).item()
    learner = Learner.create(roles, ppo, 0)
    metrics = ppo_update(roles, learner, still, UpdateOptions(ppo, 8, ptx=ptx_of()))
    assert metrics["loss/ptx_avg"] == pytest.approx(expected, rel=1e-5)
    assert metrics["policy/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["loss/policy_avg"] == pytest.approx(0.0, abs=1e-7)
    assert torch.cat([gradient.flatten() for gradient in gradients(roles)]).norm() == pytest.approx(1e-3, rel=1e-3)
    assert learner.ptx_steps == 1
    assert metrics["policy/trained_tokens"] == 38 + sum(len(example.ids) for example in EXAMPLES)
    assert plain_loss(roles, EXAMPLES).item() < expected


def test_critic_warm_up_and_steps_left_out_use_no_demonstrations(policy_dir: Path, reward_dir: Path) -> None:
    roles = make_roles(policy_dir, reward_dir)
    experience = make_experience(roles, make_batch(), PPO, 0.0)
    learner = Learner.create(roles, PPO, 0)
    warm = ppo_update(roles, learner, experience, UpdateOptions(PPO, 8, train_policy=False, ptx=ptx_of()))
    assert "loss/ptx_avg" not in warm
    assert warm["policy/trained_tokens"] == 2 * 38
    assert learner.ptx_steps == 0
    early = PPO.model_copy(update={"target_kl": 1e-12, "num_minibatches": 1})
    ppo_update(roles, learner, experience, UpdateOptions(early, 8, ptx=ptx_of()))
    assert learner.ptx_steps == 1


def test_the_stage_learns_from_the_training_demonstrations_alone(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    change_rows(place.path / "sft.jsonl", {n: {"split": "eval" if n < 20 else "train"} for n in range(48)})
    reward_model = _reward_model(place)
    data = {"sft": str(place.path / "sft.jsonl")}
    stage = _stage(place, reward_model, data, updates=2, ptx_coef=0.5)
    run(stage)
    assert "ptx: 0.5 x the loss on 28 demonstrations, 4 per optimiser step" in (stage.out / "log.txt").read_text()
    rows = [json.loads(line) for line in (stage.out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss/ptx_avg"] for row in rows if "objective/kl" in row]
    assert len(losses) == 2
    assert all(0.0 < loss < 10.0 for loss in losses)
    plain = _stage(make_workplace(tmp_path / "plain"), reward_model, data, updates=1)
    run(plain)
    assert "loss/ptx_avg" not in (plain.out / "metrics.jsonl").read_text()


def test_demonstrations_that_are_not_finite_skip_the_step_and_name_no_response(tmp_path: Path) -> None:
    """GPT-2 learns its positions: those past every response are NaN, and the one demonstration reaches them."""
    roles = make_roles(*gpt2_dirs(tmp_path))
    with torch.no_grad():
        roles.policy.get_parameter("transformer.wpe.weight")[12:] = torch.nan
    long = EncodedExample(list(range(3, 20)), 2)
    options = UpdateOptions(PPO, 8, ptx=PtxLoss([long], COEF, 1, 0, 0))
    learner = Learner.create(roles, PPO, seed=0)
    ppo_update(roles, learner, make_experience(roles, make_batch(), PPO, 0.1), options)
    assert (learner.skipped_steps, learner.skipped_rows) == (6, [[]] * 6)
