"""The training state of a PPO whose roles are sharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pipeline.ranks import ALONE, Ranks
from policy.ppo.experience import make_experience
from policy.ppo.roles import Roles
from policy.ppo.state import Parts, load_newest_state, save_state
from policy.ppo.update import Learner, UpdateOptions, ppo_update
from tests.policy.conftest import make_batch, make_roles
from tests.policy.ppo.test_state_ranks import assert_same, nobody_speaks, spawn
from tests.policy.ppo.test_two_ranks import PPO, SHARDED, roles_on


class Ppo:
    """The policy and critic of PPO, all roles sharded where there are several ranks."""

    def __init__(self, place: Path, ranks: Ranks, seed: int) -> None:
        sharded = SHARDED if ranks.world > 1 else ()
        self.roles: Roles = roles_on(ranks, make_roles(place / "policy", place / "reward", max_tokens=24), sharded)
        self.learner = Learner.create(self.roles, PPO, seed)

    @property
    def parts(self) -> Parts:
        learner = self.learner
        optimizers = {"policy_optimizer": learner.policy_optimizer, "critic_optimizer": learner.critic_optimizer}
        return {**self.roles.parts, "learner": learner, **optimizers}

    def update(self) -> dict[str, float]:
        experience = make_experience(self.roles, make_batch(), PPO, 0.1)
        return ppo_update(self.roles, self.learner, experience, UpdateOptions(PPO, 8))

    def weights(self) -> dict[str, Tensor]:
        state = {
            **self.roles.policy.state_dict(),
            **{f"critic.{k}": v for k, v in self.roles.critic.state_dict().items()},
        }
        return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}


def ppo(ranks: Ranks, place: Path) -> None:
    run = Ppo(place, ranks, 0)
    run.update()
    save_state(place / "state", 1, run.parts, ranks)
    expected = run.update()
    other = Ppo(place, ranks, 5)
    assert load_newest_state(place / "state", other.parts, ranks, say=nobody_speaks) == 1
    assert other.update() == expected
    assert_same(other.weights(), run.weights())
    torch.save(run.weights(), place / f"ppo_{ranks.rank}.pt")


@pytest.mark.slow
def test_sharded_ppo_goes_on_bit_for_bit_and_alone_to_rounding(
    policy_dir: Path, reward_dir: Path, tmp_path: Path
) -> None:
    spawn(2, ppo, tmp_path)
    alone = Ppo(tmp_path, ALONE, 5)
    said: list[str] = []
    assert load_newest_state(tmp_path / "state", alone.parts, say=said.append) == 1
    assert len(said) == 1
    alone.update()
    assert_same(alone.weights(), torch.load(tmp_path / "ppo_0.pt"), 1e-5)
