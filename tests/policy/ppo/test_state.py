"""Saving and restoring the whole training state."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import torch

from pipeline.recipe import PpoSection
from pipeline.tokens import EncodedExample
from policy.ppo.controllers import AdaptiveKLController
from policy.ppo.experience import make_experience
from policy.ppo.order import pass_indices
from policy.ppo.ptx import PtxLoss
from policy.ppo.roles import Roles
from policy.ppo.state import Stateful, load_newest_state, save_state
from policy.ppo.update import Learner, UpdateOptions, ppo_update
from tests.policy.conftest import EOS, make_batch, make_roles

PPO = PpoSection(rollout_batch_size=6, num_ppo_epochs=2, num_minibatches=2, learning_rate=1e-3, updates=4)


def parts_of(roles: Roles, learner: Learner, controller: AdaptiveKLController) -> dict[str, Stateful]:
    return {"policy": roles.policy, "critic": roles.critic, "learner": learner, "kl_controller": controller}


def test_two_updates_equal_one_update_saved_restored_and_one_more(
    policy_dir: Path, reward_dir: Path, tmp_path: Path
) -> None:
    examples = [EncodedExample([1, 20 + row, 30, EOS], 2) for row in range(9)]
    ptx = PtxLoss(examples, 0.5, 2, 0, 0)

    def one_more(roles: Roles, learner: Learner, controller: AdaptiveKLController) -> dict[str, float]:
        experience = make_experience(roles, make_batch(), PPO, controller.kl_coef)
        metrics = ppo_update(roles, learner, experience, UpdateOptions(PPO, 8, ptx=ptx))
        controller.update(9.0, 6)
        return metrics

    roles = make_roles(policy_dir, reward_dir)
    learner, controller = Learner.create(roles, PPO, 0), AdaptiveKLController(0.1, 6.0, 100.0)
    one_more(roles, learner, controller)
    learner.skipped_steps = 2
    save_state(tmp_path / "state", 1, parts_of(roles, learner, controller))
    drawn = (torch.rand(1), numpy.random.rand(), random.random())
    expected = one_more(roles, learner, controller)

    fresh = make_roles(policy_dir, reward_dir)
    other, other_controller = Learner.create(fresh, PPO, 5), AdaptiveKLController(0.3, 6.0, 100.0)
    assert load_newest_state(tmp_path / "state", parts_of(fresh, other, other_controller)) == 1
    assert (torch.rand(1), numpy.random.rand(), random.random()) == drawn
    assert one_more(fresh, other, other_controller) == expected
    assert other.skipped_steps == 2
    assert other.ptx_steps == learner.ptx_steps == 8
    assert other_controller.kl_coef == controller.kl_coef
    for a, b in zip(roles.policy.parameters(), fresh.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_newest_of_the_last_two_states_is_used_and_half_written_ones_are_not(
    policy_dir: Path, reward_dir: Path, tmp_path: Path
) -> None:
    roles = make_roles(policy_dir, reward_dir)
    learner, controller = Learner.create(roles, PPO, 0), AdaptiveKLController(0.1, 6.0, 100.0)
    parts = parts_of(roles, learner, controller)
    assert load_newest_state(tmp_path / "state", parts) is None
    for update in (5, 10, 15):
        save_state(tmp_path / "state", update, parts)
    (tmp_path / "state" / ".update_000020.tmp").write_bytes(b"cut off")
    names = sorted(file.name for file in (tmp_path / "state").glob("update_*"))
    assert names == ["update_000010.pt", "update_000015.pt"]
    assert load_newest_state(tmp_path / "state", parts) == 15


def test_each_pass_uses_every_prompt_once_in_a_fresh_order() -> None:
    first = [i for update in (1, 2, 3) for i in pass_indices(12, 4, update, seed=0)]
    second = [i for update in (4, 5, 6) for i in pass_indices(12, 4, update, seed=0)]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert pass_indices(12, 4, 2, seed=0) == first[4:8]
    assert pass_indices(12, 4, 2, seed=1) != first[4:8]
    uneven = [i for update in range(1, 6) for i in pass_indices(10, 4, update, seed=0)]
    assert sorted(uneven) == sorted([*range(10), *range(10)])
