"""One update by two processes equals the same update by one, in weights and metrics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.distributed.device_mesh import init_device_mesh

from pipeline.ranks import Ranks
from pipeline.recipe import PpoSection
from pipeline.sharding import shard, whole
from pipeline.tokens import EncodedExample
from policy.critics import ValueModel
from policy.ppo.experience import make_experience
from policy.ppo.ptx import PtxLoss
from policy.ppo.rewards import ModelReward, Rewards
from policy.ppo.roles import Roles
from policy.ppo.update import Learner, UpdateOptions, ppo_update
from tests.policy.conftest import make_batch, make_roles

PPO = PpoSection(
    rollout_batch_size=6,
    num_ppo_epochs=2,
    num_minibatches=6,
    learning_rate=1e-3,
    critic_learning_rate=1e-3,
    updates=4,
    entropy_coef=0.05,
    kl_loss_coef=0.2,
    loss_reduction="sequence_mean",
)
EXAMPLES = [EncodedExample([1, 5, 6, 20, 2], 3), EncodedExample([1, 7, 21, 22, 2], 2), EncodedExample([1, 8, 2], 2)]


SHARDED = ("policy", "critic", "reference", "rewards")


def one_update(
    policy_dir: Path, reward_dir: Path, ranks: Ranks, ppo: PpoSection, sharded: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    roles = roles_on(ranks, make_roles(policy_dir, reward_dir, max_tokens=24), sharded)
    experience = make_experience(roles, make_batch(), ppo, 0.1)
    learner = Learner.create(roles, ppo, seed=0)
    ptx = PtxLoss(EXAMPLES, coef=0.3, size=3, seed=0, pad_id=0)
    metrics = ppo_update(roles, learner, experience, UpdateOptions(ppo, 8, ptx=ptx))
    assert isinstance(roles.critic, ValueModel)
    weights = [
        w.detach().flatten() for m in (roles.policy, roles.critic.model) for _, w in whole(m.state_dict().items())
    ]
    return {
        "weights": torch.cat(weights),
        "advantages": experience.advantages,
        "scores": experience.source_scores["rm"],
        "metrics": torch.tensor([metrics[key] for key in sorted(metrics)]),
    }


def roles_on(ranks: Ranks, roles: Roles, sharded: tuple[str, ...]) -> Roles:
    assert isinstance(roles.critic, ValueModel)
    source = roles.rewards.sources["rm"]
    assert isinstance(source, ModelReward)
    models = {
        "policy": roles.policy,
        "critic": roles.critic.model,
        "reference": roles.reference,
        "rewards": source.model,
    }
    for name in sharded:
        shard(models[name], init_device_mesh("cpu", (ranks.world,)), "float32")
    rewards = Rewards({"rm": replace(source, ranks=ranks)}, {"rm": 1.0}, ranks)
    return replace(roles, ranks=ranks, rewards=rewards, sharded=bool(sharded))


def as_rank(
    rank: int,
    world: int,
    store: str,
    directories: tuple[Path, Path],
    ppo: PpoSection,
    sharded: tuple[str, ...],
    out: Path,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.save(one_update(*directories, Ranks(rank, world, rank, world), ppo, sharded), out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("sharded", [(), SHARDED, ("critic", "rewards")])
@pytest.mark.parametrize("minibatches", [1, 6])
def test_two_ranks_do_what_one_does(
    policy_dir: Path, reward_dir: Path, tmp_path: Path, minibatches: int, sharded: tuple[str, ...]
) -> None:
    """With six minibatches one rank has no row in any step, only its part of the demonstrations."""
    ppo = PPO.model_copy(update={"num_minibatches": minibatches})
    expected = one_update(policy_dir, reward_dir, Ranks(), ppo, ())
    arguments = (2, str(tmp_path / "store"), (policy_dir, reward_dir), ppo, sharded, tmp_path)
    processes.spawn(as_rank, arguments, nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    for rank in (0, 1):
        got = torch.load(tmp_path / f"{rank}.pt")
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_every_row_belongs_to_one_rank() -> None:
    shares = [Ranks(rank, 3).share(range(8)) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]
