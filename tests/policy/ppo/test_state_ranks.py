"""The training state of several processes, replicated and sharded, saved by one number of them and read by another."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from pipeline.errors import UserError
from pipeline.ranks import ALONE, Ranks
from pipeline.shards import read_metadata
from policy.ppo import state as state_module
from policy.ppo.state import Parts, PerRank, load_newest_state, save_state


class Number:
    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


class Policy(nn.Module):
    """Tied weights, rows that two and four ranks cannot share evenly, and one row that only rank 0 holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.body = nn.Linear(6, 5)
        self.up = nn.Linear(5, 6)
        self.one = nn.Linear(6, 1)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(1))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.up(torch.tanh(self.body(self.embed(ids)))) * self.scale
        return (self.head(hidden) * self.one(hidden)).square().sum()


class Run:
    """A policy and a critic with their optimisers; the policy is sharded where there are several ranks."""

    def __init__(self, seed: int, ranks: Ranks = ALONE) -> None:
        torch.manual_seed(seed)
        self.ranks, self.policy, self.critic = ranks, Policy(), nn.Linear(3, 2)
        if ranks.world > 1:
            fully_shard(self.policy.body)
            fully_shard(self.policy)
        self.optimizers = [AdamW(model.parameters(), lr=1e-2, fused=True) for model in (self.policy, self.critic)]
        self.count, self.own = Number(0), Number(0)

    @property
    def parts(self) -> Parts:
        return {
            "policy": self.policy,
            "critic": self.critic,
            "policy_optimizer": self.optimizers[0],
            "critic_optimizer": self.optimizers[1],
            "count": self.count,
            "own": PerRank(self.own),
        }

    def step(self) -> None:
        """Every rank on the same rows, so that the mean of the gradients is the gradient."""
        self.count.value += 1
        self.own.value = 10 * self.count.value + self.ranks.rank
        (self.policy(torch.tensor([1, 3, self.count.value])) + self.critic(torch.ones(3)).square().sum()).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def whole(self) -> dict[str, Tensor]:
        """Weights and moments, gathered from all ranks."""
        state = {
            **self.policy.state_dict(),
            **{f"critic.{key}": value for key, value in self.critic.named_parameters()},
        }
        for name, optimizer in zip(("p", "c"), self.optimizers, strict=True):
            for index, moments in optimizer.state_dict()["state"].items():
                state |= {f"{name}.{index}.{key}": value for key, value in moments.items()}
        return {k: v.full_tensor() if isinstance(v, DTensor) else v.detach().clone() for k, v in state.items()}

    def save(self, directory: Path) -> None:
        save_state(directory, self.count.value, self.parts, self.ranks)

    def load(self, directory: Path, say: Callable[[str], None]) -> int | None:
        return load_newest_state(directory, self.parts, self.ranks, say=say)


def nobody_speaks(line: str) -> None:
    raise AssertionError(line)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def drawn() -> tuple[float, float, float]:
    return float(torch.rand(1)), numpy.random.rand(), random.random()


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)


def as_rank(rank: int, world: int, work: Callable[[Ranks, Path], None], place: Path) -> None:
    torch.set_num_threads(1)
    store, timeout = f"file://{place}/store_{work.__name__}", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    work(Ranks(rank, world), place)
    dist.destroy_process_group()


def spawn(world: int, work: Callable[[Ranks, Path], None], place: Path) -> None:
    processes.spawn(as_rank, (world, work, place), nprocs=world)  # pyright: ignore[reportPrivateImportUsage]


def replicated(ranks: Ranks, place: Path) -> None:
    """Two ranks that hold the same, but for their generators."""
    count, own = Number(1), Number(ranks.rank)
    parts: Parts = {"count": count, "own": PerRank(own)}
    seed_all(100 + ranks.rank)
    save_state(place, 1, parts, ranks)
    after = drawn()
    every = ranks.gather(after)
    assert every[0] != every[1]
    seed_all(0)
    count.value = own.value = -1
    assert load_newest_state(place, parts, ranks, say=nobody_speaks) == 1
    assert (count.value, own.value) == (1, ranks.rank)
    assert drawn() == after

    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank == 1:
            patch.setattr(state_module, "_write", no_space)
        with pytest.raises((OSError, RuntimeError)) as error:
            save_state(place, 2, parts, ranks)
    assert str(error.value) == ("" if ranks.rank else "rank 1: OSError: ") + "[Errno 28] No space left on device"
    assert load_newest_state(place, parts, ranks, say=nobody_speaks) == 1

    save_state(place, 3, parts, ranks)
    if ranks.is_main:
        (place / "update_000003" / "rank_1.pt").write_bytes(b"cut off")
    said: list[str] = []
    ranks.barrier()
    assert load_newest_state(place, parts, ranks, say=said.append) == 1
    assert said == [f"{place.name}/update_000003/rank_1.pt does not have its sha256: going on from update 1"]

    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank == 1:
            patch.setattr(Path, "is_dir", lambda path: False)
        with pytest.raises(UserError, match=r"ranks \[1\] do not see it\. Set output_dir to a directory that all"):
            save_state(place, 4, parts, ranks)
    save_state(place, 5, parts, ranks)


def no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_two_ranks_save_and_load_together_and_fail_together(tmp_path: Path) -> None:
    spawn(2, replicated, tmp_path)
    (tmp_path / "store_replicated").unlink(missing_ok=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["update_000001", "update_000005"]
    seal = json.loads((tmp_path / "update_000005" / "checkpoint.json").read_text())
    assert seal["world"] == 2
    assert sorted(seal["files"]) == ["rank_0.pt", "rank_1.pt", "replicated.pt"]


def sharded(ranks: Ranks, place: Path) -> None:
    run = Run(0, ranks)
    run.save(place / "zero")
    assert Run(1, ranks).load(place / "zero", nobody_speaks) == 0
    assert not run.optimizers[0].state
    run.step()
    run.save(place / "two")
    after_one = run.whole()
    torch.save(after_one, place / f"after_one_{ranks.rank}.pt")
    run.step()

    other = Run(1, ranks)
    assert other.load(place / "two", nobody_speaks) == 1
    assert (other.count.value, other.own.value) == (1, 10 + ranks.rank)
    assert_same(other.whole(), after_one)
    other.step()
    assert_same(other.whole(), run.whole())
    torch.save(run.whole(), place / f"after_two_{ranks.rank}.pt")

    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank == 1:
            patch.setattr(FileSystemWriter, "write_data", no_space)
        with pytest.raises(RuntimeError, match=r"rank 1: OSError: \[Errno 28\] No space left on device"):
            run.save(place / "two")
    assert Run(1, ranks).load(place / "two", nobody_speaks) == 1

    said: list[str] = []
    from_one = Run(1, ranks)
    assert from_one.load(place / "one", said.append) == 1
    assert said == [
        "saved by 1 process, resumed by 2: results agree with an undisturbed run to about 1e-5, not bit for bit"
    ]
    assert_same(from_one.whole(), torch.load(place / "one.pt"))
    moments = from_one.optimizers[0].state_dict()["state"][1]["exp_avg"]
    assert isinstance(moments, DTensor)
    assert moments.to_local().untyped_storage().nbytes() == moments.to_local().nbytes
    from_one.step()
    assert_same(from_one.whole(), torch.load(place / "one_after_two.pt"), 1e-5)


def test_sharded_state_comes_back_and_is_resharded(tmp_path: Path) -> None:
    """Saved by 2: read by 2 bit for bit, by 1; saved by 1: read by 2. Steps go on alike."""
    alone = Run(0)
    alone.step()
    alone.save(tmp_path / "one")
    torch.save(alone.whole(), tmp_path / "one.pt")
    alone.step()
    torch.save(alone.whole(), tmp_path / "one_after_two.pt")
    spawn(2, sharded, tmp_path)

    folder = tmp_path / "two" / "update_000001"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    shards = ["shards/.metadata", "shards/__0_0.distcp", "shards/__1_0.distcp"]
    assert files == ["checkpoint.json", "rank_0.pt", "rank_1.pt", "replicated.pt", *shards]
    saved = torch.load(folder / "replicated.pt")
    assert all(tensor.is_meta for key, tensor in saved["parts"]["policy"].items() if key != "scale")
    names = set(read_metadata(folder / "shards").state_dict_metadata)
    assert {"policy/embed.weight", "policy/one.weight", "policy_optimizer/state/0/exp_avg"} < names
    assert "policy/head.weight" not in names
    assert not {name for name in names if name.startswith("critic")}

    said: list[str] = []
    run = Run(1)
    assert run.load(tmp_path / "two", said.append) == 1
    assert said == [
        "saved by 2 processes, resumed by 1: results agree with an undisturbed run to about 1e-5, not bit for bit"
    ]
    assert_same(run.whole(), torch.load(tmp_path / "after_one_0.pt"))
    assert run.own.value == 10
    run.step()
    assert_same(run.whole(), torch.load(tmp_path / "after_two_0.pt"), 1e-5)
    damaged_shards_are_seen(tmp_path, files)


@pytest.mark.slow
def test_four_ranks_go_on_from_two(tmp_path: Path) -> None:
    spawn(2, two, tmp_path)
    spawn(4, four, tmp_path)


def two(ranks: Ranks, place: Path) -> None:
    run = Run(0, ranks)
    run.step()
    run.save(place / "two")
    torch.save(run.whole(), place / f"one_step_{ranks.rank}.pt")
    run.step()
    torch.save(run.whole(), place / f"two_steps_{ranks.rank}.pt")


def damaged_shards_are_seen(place: Path, files: list[str]) -> None:
    for name in files:
        for kept in (None, 0.9):
            shutil.rmtree(place / "copy", ignore_errors=True)
            shutil.copytree(place / "two", place / "copy")
            file = place / "copy" / "update_000001" / name
            content = file.read_bytes()
            file.unlink() if kept is None else file.write_bytes(content[: int(len(content) * kept)])
            with pytest.raises(UserError, match=f"copy/update_000001/{name} "):
                Run(1).load(place / "copy", nobody_speaks)


def four(ranks: Ranks, place: Path) -> None:
    run = Run(1, ranks)
    assert run.load(place / "two", lambda line: None) == 1
    assert_same(run.whole(), torch.load(place / "one_step_0.pt"))
    assert run.own.value == (10 + ranks.rank if ranks.rank < 2 else 0)
    every = ranks.gather(drawn())
    assert every[2] == every[3] == every[0]
    run.step()
    assert_same(run.whole(), torch.load(place / "two_steps_0.pt"), 1e-5)
