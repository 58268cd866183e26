"""Processes as one: what each gets from the others, how they join, and what is refused."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn

from pipeline.errors import UserError
from pipeline.ranks import ALONE, Ranks, join
from pipeline.recipe_launch import LaunchSection

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TRISTAGE_WORLD_SIZE")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher has left words in the environment."""
    for key in PLACE:
        monkeypatch.delenv(key, raising=False)


def as_rank(rank: int, port: int, seconds: float, work: Callable[[Ranks], Any], out: Path) -> None:
    torch.set_num_threads(1)
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update({**own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TRISTAGE_WORLD_SIZE": "2"})
    ranks = join(LaunchSection(processes=2, timeout_seconds=seconds))
    torch.save(work(ranks), out / f"{rank}.pt")
    dist.destroy_process_group()


def on_two(work: Callable[[Ranks], Any], out: Path, *, seconds: float = 60.0) -> list[Any]:
    """What `work` returns on either of two ranks that join in processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(as_rank, (port, seconds, work, out), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def everything(ranks: Ranks) -> dict[str, Any]:
    """Every collective once, with values that tell the ranks apart."""
    own = ranks.rank + 1
    sums = [torch.full((2,), float(own)), torch.tensor([10.0 * own])]
    ranks.sum_(sums)
    layer = nn.Linear(1, 1)
    layer.weight.grad = torch.full((1, 1), 3.0) if ranks.rank == 0 else None
    ranks.sum_gradients(layer.parameters())
    return {
        "who": (ranks.rank, ranks.world, ranks.local, ranks.per_machine, ranks.is_main),
        "gather": ranks.gather({"from": own}),
        "broadcast": ranks.broadcast(f"said by {ranks.rank}"),
        "any": [ranks.any(ranks.rank == 1), ranks.any(False)],
        "sums": [tensor.tolist() for tensor in sums],
        "gradients": [parameter.grad.tolist() for parameter in layer.parameters() if parameter.grad is not None],
        "share": ranks.share(range(5)),
        "late": late(ranks),
    }


def late(ranks: Ranks) -> tuple[float, float]:
    """Seconds in a barrier that rank 1 comes to late, and seconds waited by then."""
    ranks.barrier()
    before = ranks.waited.seconds
    if ranks.rank == 1:
        time.sleep(1.0)
    start = time.perf_counter()
    ranks.barrier()
    return time.perf_counter() - start, ranks.waited.seconds - before


def test_what_two_ranks_get_from_one_another(tmp_path: Path) -> None:
    found = on_two(everything, tmp_path)
    assert [each.pop("who") for each in found] == [(0, 2, 0, 2, True), (1, 2, 1, 2, False)]
    assert [each.pop("share") for each in found] == [[0, 2, 4], [1, 3]]
    (inside, waited), (inside_late, waited_late) = (each.pop("late") for each in found)
    assert waited == pytest.approx(inside, abs=0.05)
    assert waited_late == pytest.approx(inside_late, abs=0.05)
    assert waited > 0.8 > waited_late
    expected = {
        "gather": [{"from": 1}, {"from": 2}],
        "broadcast": "said by 0",
        "any": [True, False],
        "sums": [[3.0, 3.0], [30.0]],
        "gradients": [[[3.0]], [0.0]],
    }
    assert found == [expected, expected]


def in_vain(ranks: Ranks) -> str:
    """What a collective raises that the other rank does not come to."""
    ranks.barrier()
    if ranks.rank == 1:
        time.sleep(12.0)
        return ""
    try:
        ranks.barrier()
    except RuntimeError as error:
        return str(error)
    return "nothing"


@pytest.mark.slow
def test_a_collective_raises_after_the_time_out(tmp_path: Path) -> None:
    assert "Timed out" in on_two(in_vain, tmp_path, seconds=8.0)[0]


def test_one_process_is_everything_by_itself() -> None:
    tensor = torch.tensor([2.0])
    layer = nn.Linear(1, 1)
    ALONE.sum_([tensor])
    ALONE.sum_gradients(layer.parameters())
    ALONE.barrier()
    assert tensor.item() == 2.0
    assert layer.weight.grad is None
    assert (ALONE.gather(1), ALONE.broadcast("x"), ALONE.any(True), ALONE.any(False)) == ([1], "x", True, False)
    assert ALONE.share([4, 5]) == [4, 5]
    assert ALONE.waited.seconds == 0.0


def test_without_a_launcher_one_joins_nobody() -> None:
    assert join(LaunchSection()) is ALONE


@pytest.mark.parametrize(
    ("environment", "processes", "message"),
    [
        ({}, 2, "2 processes were asked for, and the launcher started this one among 1"),
        ({"TRISTAGE_WORLD_SIZE": "4"}, 1, "4 processes were asked for"),
        ({"TRISTAGE_WORLD_SIZE": "1", "WORLD_SIZE": "2"}, 1, "1 processes were asked for.* among 2"),
        ({"WORLD_SIZE": "2"}, 4, "4 processes were asked for.* among 2"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, 1, "WORLD_SIZE is 2, and LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR"),
    ],
)
def test_another_number_of_processes_is_refused(
    environment: dict[str, str], processes: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=message):
        join(LaunchSection(processes=processes))
