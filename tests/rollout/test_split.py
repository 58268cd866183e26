"""Several processes, one rollout: nothing lost, nothing twice, and a failure on one is a failure on all."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.ranks import ALONE, Clock, Ranks
from rollout.batch import Completion
from rollout.engine import SamplingOptions
from rollout.server_client import RolloutServerError
from rollout.split import SharedEngine, SplitEngine, everywhere, joined, start

SAMPLING = SamplingOptions(4)
WEIGHTS = 5


class Echo:
    """An engine whose response to a prompt is its first token and seed.

    `calls` are the prompts it was given; it takes `pause` seconds for each call.
    """

    name = "echo"
    version = "1"

    def __init__(self, fails: Exception | None = None, after: int = WEIGHTS, pause: float = 0.0) -> None:
        self.policy_version = 0
        self.calls: list[list[int]] = []
        self.fails = fails
        self.after = after
        self.pause = pause

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingOptions, seeds: Sequence[int]
    ) -> list[Completion]:
        del sampling
        time.sleep(self.pause)
        if self.fails:
            raise self.fails
        self.calls.append([prompt[0] for prompt in prompts])
        return [
            Completion((prompt[0], seed), (-1.0, -2.0), True, self.policy_version)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]], *, version: int | None = None) -> None:
        for count, _ in enumerate(named):
            if self.fails and count == self.after:
                raise self.fails
        self.policy_version = self.policy_version + 1 if version is None else version

    def rest(self) -> None: ...

    def close(self) -> None:
        self.calls.append([])


@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_put_together_are_the_whole(size: int, world: int) -> None:
    shares = [Ranks(rank, world).share(range(size)) for rank in range(world)]
    assert joined(shares, size) == list(range(size))


def test_a_share_of_the_wrong_size_is_an_error() -> None:
    for parts in ([[0, 2], [1, 3]], [[0], [1]], [[0, 2, 4], [1]]):
        with pytest.raises(ValueError, match="argument 2"):
            joined(parts, 3)


def named(gather: Callable[[], None]) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights whose making is a collective."""
    for n in range(WEIGHTS):
        gather()
        yield str(n), torch.zeros(1)


def told(act: Callable[[], object]) -> list[str]:
    try:
        act()
    except (UserError, RuntimeError) as error:
        return [type(error).__name__, str(error)]
    return []


def split(ranks: Ranks) -> dict[str, object]:
    """What SplitEngine does on one of several ranks."""
    report: dict[str, object] = {}
    engine = SplitEngine(Echo(), ranks)
    for size in (0, 1, 2, 7):
        prompts, seeds = [[10 + n, 1] for n in range(size)], [100 + n for n in range(size)]
        found = engine.generate(prompts, SAMPLING, seeds)
        report[f"responses {size}"] = [completion.token_ids for completion in found]
    report["calls"] = list(engine.engine.calls)  # pyright: ignore[reportAttributeAccessIssue]
    engine.load_weights(named(ranks.barrier), version=8)
    report["version"] = [engine.policy_version, engine.generate([[1]], SAMPLING, [0])[0].policy_version]
    last = ranks.world - 1
    for name, error in (("user", UserError("no room.", mend="Make some.")), ("own", KeyError("q"))):
        failing = SplitEngine(Echo(error if ranks.rank == last else None), ranks)
        report[f"{name} generate"] = told(lambda e=failing: e.generate([[1]] * 9, SAMPLING, range(9)))
        failing = SplitEngine(Echo(error if ranks.rank == last else None, after=1), ranks)
        report[f"{name} load"] = told(lambda e=failing: e.load_weights(named(ranks.barrier)))
    report["seeds"] = told(lambda: engine.generate([[1]], SAMPLING, []))
    slow = SplitEngine(Echo(pause=0.5 * ranks.rank), ranks)
    slow.generate([[1]] * ranks.world, SAMPLING, range(ranks.world))
    report["seconds"] = slow.seconds
    report["opened"] = told(lambda: everywhere(ranks, lambda: 1 // (ranks.rank - last)))
    return report


def shared(ranks: Ranks) -> dict[str, object]:
    """What SharedEngine does on one of several ranks."""
    report: dict[str, object] = {}
    inner = Echo() if ranks.is_main else None
    engine = SharedEngine(inner, ranks)
    report["facts"] = [engine.name, engine.version, engine.policy_version]
    engine.load_weights(named(ranks.barrier), version=8)
    engine.load_weights(named(ranks.barrier))
    wait = start(engine, [[1], [2], [3]], SAMPLING, [7, 8, 9])
    ranks.barrier()  # other collectives go on meanwhile
    report["early"] = told(lambda: engine.load_weights(named(ranks.barrier)))
    found = wait()
    report["responses"] = [completion.token_ids for completion in found]
    report["versions"] = [engine.policy_version, *(completion.policy_version for completion in found)]
    report["calls"] = list(inner.calls) if inner else None
    failing = SharedEngine(Echo(RolloutServerError("gone.", mend="Start it."), 1) if ranks.is_main else None, ranks)
    report["generate"] = told(lambda: failing.generate([[1]], SAMPLING, [0]))
    report["load"] = told(lambda: failing.load_weights(named(ranks.barrier)))
    report["failed version"] = failing.policy_version
    engine.close()
    return report


def as_rank(rank: int, world: int, store: str, act: Callable[[Ranks], dict[str, object]], out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    (out / f"{rank}.json").write_text(json.dumps(act(Ranks(rank, world))))
    dist.destroy_process_group()


def reports(world: int, act: Callable[[Ranks], dict[str, object]], out: Path) -> list[dict[str, object]]:
    processes.spawn(as_rank, (world, str(out / "store"), act, out), nprocs=world)  # pyright: ignore[reportPrivateImportUsage]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_prompts_and_all_get_all(tmp_path: Path, world: int) -> None:
    found = reports(world, split, tmp_path)
    last = world - 1
    for rank, report in enumerate(found):
        for size in (0, 1, 2, 7):
            assert report[f"responses {size}"] == [[10 + n, 100 + n] for n in range(size)]
        shares = [[10 + n for n in range(rank, size, world)] for size in (1, 2, 7)]
        assert report["calls"] == [share for share in shares if share]
        assert report["version"] == [8, 8]
        for name in ("user generate", "user load"):
            assert report[name] == ["UserError", f"rank {last}: no room. Make some."]
        for name in ("own generate", "own load"):
            assert report[name] == ["RuntimeError", f"rank {last}: KeyError: 'q'"]
        assert report["seeds"] == ["RuntimeError", "rank 0: ValueError: 1 prompts need as many seeds, not 0"]
        assert report["seconds"] == pytest.approx(0.5 * rank, abs=0.25)  # waiting for the last left out
        assert report["opened"] == [
            "RuntimeError", f"rank {last}: ZeroDivisionError: integer division or modulo by zero"
        ]  # fmt: skip


def test_the_first_rank_asks_the_server_for_all(tmp_path: Path) -> None:
    for rank, report in enumerate(reports(2, shared, tmp_path)):
        assert report["facts"] == ["echo", "1", 0]
        assert report["early"] == ["RuntimeError", "the responses that were started must be waited for first"]
        assert report["responses"] == [[1, 7], [2, 8], [3, 9]]
        assert report["versions"] == [9, 9, 9, 9]
        assert report["calls"] == ([[1, 2, 3]] if rank == 0 else None)
        for name in ("generate", "load"):
            assert report[name] == ["RolloutServerError", "rank 0: gone. Start it."]
        assert report["failed version"] == 0


def test_alone_errors_pass_as_they_are_and_a_start_runs_beside_the_trainer() -> None:
    error = KeyError("q")
    for wrapped in (SplitEngine(Echo(error), ALONE), SharedEngine(Echo(error), ALONE)):
        with pytest.raises(KeyError) as failure:
            wrapped.generate([[1]], SAMPLING, [0])
        assert failure.value is error
    engine = SharedEngine(Echo(pause=0.5), ALONE)
    started = time.perf_counter()
    wait = start(engine, [[1]], SAMPLING, [5])
    assert time.perf_counter() - started < 0.4
    assert wait()[0].token_ids == (1, 5)
    assert engine.seconds == pytest.approx(0.5, abs=0.25)
    assert start(Echo(), [[1]], SAMPLING, [5])()[0].token_ids == (1, 5)


def test_time_with_a_server_counts_as_waiting_and_computing_meanwhile_does_not() -> None:
    """Otherwise the rank that asks the server would be called a straggler in every update."""
    ranks = Ranks(waited=Clock())
    engine = SharedEngine(Echo(pause=0.5), ranks)

    def slowly() -> None:
        time.sleep(0.1)

    wait = engine.start([[1]], SAMPLING, [5])
    time.sleep(0.3)
    wait()
    assert ranks.waited.seconds == pytest.approx(0.2, abs=0.15)
    before = ranks.waited.seconds
    engine.load_weights(named(slowly))
    assert 0.1 * WEIGHTS <= ranks.waited.seconds - before < 0.1 * WEIGHTS + 0.3
