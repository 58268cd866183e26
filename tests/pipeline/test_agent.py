"""The agent starts ranks, passes signals on, tells of those that were killed, and leaves nobody behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.workplace import command_environment

RANK = """\
import json, os, signal, sys, time
from pathlib import Path
from pipeline.process import hear_requests, join_parent

rank, out = os.environ["RANK"], Path(sys.argv[1])
what = (out / f"do_{rank}").read_text().split() if (out / f"do_{rank}").exists() else ["end", "0"]
heard = []
if what[0] == "late":
    (out / f".ready_{rank}").write_text(str(os.getpid()))
    (out / f".ready_{rank}").rename(out / f"ready_{rank}")
    time.sleep(1.0)
lock = join_parent()
if what[0] == "deaf":
    (out / f"ready_{rank}").touch()
    time.sleep(1.0)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: heard.append(number))
hear_requests()
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
noted = {name: os.environ[name] for name in names} | {"pid": os.getpid(), "lock": lock}
(out / f".rank_{rank}.json").write_text(json.dumps(noted))
(out / f".rank_{rank}.json").rename(out / f"rank_{rank}.json")
if what[0] == "end":
    sys.exit(int(what[1]))
end = time.time() + float(what[1])
while time.time() < end and not heard:
    time.sleep(0.02)
(out / f"heard_{rank}").write_text(" ".join(map(str, heard)))
if what[0] == "stubborn":
    time.sleep(600)
sys.exit(int(what[2]) if len(what) > 2 else 0)
"""
SHORT = "import sys, pipeline.agent as agent; agent.ENOUGH_SECONDS = 0.5; agent.main()"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory with the module `one_rank` and the stage's own; whatever is left running in it is ended."""
    (tmp_path / "one_rank.py").write_text(RANK)
    (tmp_path / "ppo.partial").mkdir()
    yield tmp_path
    for note in (tmp_path / "ppo.partial").glob("rank_*.json"):
        try:
            os.kill(json.loads(note.read_text())["pid"], signal.SIGKILL)
        except ProcessLookupError:
            continue


def start(
    place: Path, processes: int = 2, *, words: tuple[str, ...] = ("-m", "pipeline.agent")
) -> subprocess.Popen[str]:
    environment = command_environment()
    environment["PYTHONPATH"] += os.pathsep + str(place)
    return subprocess.Popen(
        [sys.executable, *words, str(processes), "one_rank", "ppo.partial"],
        cwd=place,
        env={key: value for key, value in environment.items() if key != "OMP_NUM_THREADS"},
        stderr=subprocess.PIPE,
        text=True,
    )


def orders(place: Path, *texts: str) -> None:
    for rank, text in enumerate(texts):
        (place / "ppo.partial" / f"do_{rank}").write_text(text)


def notes(place: Path, processes: int = 2) -> list[dict[str, object]]:
    return [json.loads((place / "ppo.partial" / f"rank_{rank}.json").read_text()) for rank in range(processes)]


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def ranks_of(place: Path) -> list[psutil.Process]:
    """Both ranks, once they have their handlers."""
    out = place / "ppo.partial"
    wait_for(lambda: all((out / f"rank_{rank}.json").exists() for rank in (0, 1)))
    return [psutil.Process(int(str(note["pid"]))) for note in notes(place)]


def gone(processes: list[psutil.Process]) -> bool:
    return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes)


def heard(place: Path) -> list[str]:
    return [(place / "ppo.partial" / f"heard_{rank}").read_text() for rank in (0, 1)]


def test_what_ranks_find_in_their_environment(place: Path) -> None:
    process = start(place, 3)
    assert process.communicate(timeout=60) == (None, "")
    assert process.returncode == 0
    found = notes(place, 3)
    assert [note["RANK"] for note in found] == [note["LOCAL_RANK"] for note in found] == ["0", "1", "2"]
    assert {(note["WORLD_SIZE"], note["LOCAL_WORLD_SIZE"], note["MASTER_ADDR"]) for note in found} == {
        ("3", "3", "127.0.0.1")
    }
    assert len({note["MASTER_PORT"] for note in found}) == 1
    assert {note["OMP_NUM_THREADS"] for note in found} == {str(max(1, (os.cpu_count() or 1) // 3))}


def test_the_exit_code_is_that_of_the_first_that_failed(place: Path) -> None:
    """Rank 0 ends later with another one; nobody was sent a signal."""
    orders(place, "wait 1.0 3", "end 2")
    process = start(place)
    assert process.communicate(timeout=60) == (None, "")
    assert process.returncode == 2
    assert (place / "ppo.partial" / "heard_0").read_text() == ""
    assert not (place / "ppo.partial" / "failures").exists()


def test_a_killed_rank_is_told_of(place: Path) -> None:
    orders(place, "wait 600", "wait 600")
    process = start(place)
    ranks = ranks_of(place)
    ranks[1].kill()
    told = place / "ppo.partial" / "failures" / "rank_00001.json"
    wait_for(told.exists)
    failure = json.loads(told.read_text())
    assert (failure["rank"], failure["code"]) == (1, 137)
    assert failure["text"].startswith("rank 1 of ppo was ended by signal 9; ppo.partial is kept. Run the same command")
    ranks[0].terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 137
    assert err == f"error: {failure['text']}\n"


def test_failures_of_an_earlier_start_are_forgotten(place: Path) -> None:
    (place / "ppo.partial" / "failures").mkdir()
    (place / "ppo.partial" / "failures" / "rank_00000.json").write_text("{}")
    assert start(place).wait(timeout=60) == 0
    assert not (place / "ppo.partial" / "failures").exists()


def test_ranks_that_do_not_end_are_killed(place: Path) -> None:
    orders(place, "stubborn 0", "wait 1.0 2")
    process = start(place, words=("-c", SHORT))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == "error: ranks 0 did not end after another failed: they are killed.\n"


@pytest.mark.parametrize(
    ("number", "received"),
    [
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGHUP, signal.SIGTERM),
        (signal.SIGUSR1, signal.SIGUSR1),
    ],
)
def test_signals_reach_every_rank_once(place: Path, number: signal.Signals, received: signal.Signals) -> None:
    orders(place, "wait 600 75", "wait 600 75")
    process = start(place)
    ranks_of(place)
    process.send_signal(number)
    assert process.communicate(timeout=60) == (None, "")
    assert process.returncode == 75
    assert heard(place) == [str(int(received))] * 2


def test_a_request_that_comes_while_ranks_import_is_kept(place: Path) -> None:
    orders(place, "deaf 600 75", "deaf 600 75")
    process = start(place)
    wait_for(lambda: all((place / "ppo.partial" / f"ready_{rank}").exists() for rank in (0, 1)))
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert heard(place) == [str(int(signal.SIGUSR1))] * 2


def test_ranks_that_an_interruption_meets_while_they_import_are_interrupted(place: Path) -> None:
    orders(place, "deaf 600", "deaf 600")
    process = start(place)
    wait_for(lambda: all((place / "ppo.partial" / f"ready_{rank}").exists() for rank in (0, 1)))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert err.startswith("error: ppo was interrupted. Run the same command again")
    assert err.count("\n") == 1


def test_ranks_die_with_a_killed_agent(place: Path) -> None:
    orders(place, "wait 600", "wait 600")
    process = start(place)
    ranks = ranks_of(place)
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: gone(ranks))


def test_ranks_whose_agent_was_killed_while_they_import_end(place: Path) -> None:
    """Its parent has not asked for its exit code, so that its number is still taken."""
    orders(place, "late 600", "late 600")
    process = start(place)
    out = place / "ppo.partial"
    wait_for(lambda: all((out / f"ready_{rank}").exists() for rank in (0, 1)))
    ranks = [psutil.Process(int((out / f"ready_{rank}").read_text())) for rank in (0, 1)]
    process.kill()
    wait_for(lambda: gone(ranks))
    process.communicate(timeout=60)
    assert list(out.glob("rank_*.json")) == []


def test_ranks_hold_the_lock_and_the_port_is_nobody_elses(place: Path) -> None:
    """Under `tristage` the lock is its own; here the test's, handed down as `run_child` does."""
    from pipeline.process import only_one, run_child

    orders(place, "end 0", "end 0")
    path = os.environ.get("PYTHONPATH", "")
    with only_one(place / "lock") as lock:
        words = [sys.executable, "-m", "pipeline.agent", "2", "one_rank", str(place / "ppo.partial")]
        search = os.pathsep.join([command_environment()["PYTHONPATH"], str(place), path])
        assert run_child(words, lock=lock, environment={"PYTHONPATH": search}).code == 0
    assert [note["lock"] for note in notes(place)] == [lock, lock]
