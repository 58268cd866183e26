"""Two ranks of PPO, one of which raises, hangs, is killed or slow: all end with one message, and the run goes on."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.test_kill import ended, family, logged, wait_until, without_time
from tests.workplace import Workplace, command_environment

TWO = ("ppo", "recipe.yaml", "--launch.processes", "2", "--tracking.progress", "false")
PATIENCE_SECONDS = 400
TROUBLE = """\
import ctypes, os, time
from pathlib import Path

calls = 0

def reward(prompts, responses, columns):
    \"\"\"Does what the file trouble_<rank> says, from the call on that it names. Update n makes call n + 1.\"\"\"
    global calls
    calls += 1
    order = Path(f"trouble_{os.environ.get('RANK', '0')}")
    if order.exists():
        what, call = order.read_text().split()
        if calls >= int(call):
            trouble(what)
    return [len(response) / 10 for response in responses]

class Bug(BaseException):
    pass

def trouble(what):
    if what == "raise":
        raise ValueError("no score today")
    if what == "bug":
        raise Bug("nobody expects it")
    if what == "sleep":
        time.sleep(600)
    if what == "stuck":  # in a call that signals do not end
        libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        libc.pthread_mutex_lock(lock)
        libc.pthread_mutex_lock(lock)
    if what == "slow":
        time.sleep(0.5)
"""


def with_trouble(source: Workplace, target: Path) -> Workplace:
    """A copy of the workplace without PPO, whose recipe rewards by `TROUBLE` too."""
    shutil.copytree(source.path, target)
    place = Workplace(target)
    shutil.rmtree(place.run / "ppo")
    (target / "trouble.py").write_text(TROUBLE)
    rewards = "ppo:\n  rewards:\n    rm:\n      model: rm\n    mine:\n      function: trouble:reward\n"
    recipe = (target / "recipe.yaml").read_text()
    assert "\nppo:\n" in recipe
    (target / "recipe.yaml").write_text(recipe.replace("ppo:\n", rewards))
    return place


@pytest.fixture
def place(finished_run: Workplace, tmp_path: Path) -> Iterator[Workplace]:
    """A workplace for PPO with trouble; whatever a failing test leaves running ends with it."""
    before = set(psutil.Process().children(recursive=True))
    yield with_trouble(finished_run, tmp_path / "work")
    for process in set(psutil.Process().children(recursive=True)) - before:
        process.kill()


@pytest.fixture(scope="module")
def undisturbed(finished_run: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """PPO on two ranks that nothing befell. Only to be read."""
    done = with_trouble(finished_run, tmp_path_factory.mktemp("undisturbed") / "work")
    run_to_the_end(done)
    return done


def run_to_the_end(place: Workplace, *words: str) -> str:
    done = place.tristage(*TWO, *words)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def rank_of(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process of a rank of the running command."""
    return next(one for one in family(process) if one.environ().get("RANK") == str(rank))


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr of a command whose stage runs; all that it started is gone with it."""
    started = family(process)
    assert len(started) == 3
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert ended(started)
    return process.returncode, err


def one_paragraph(err: str) -> str:
    """The only line of stderr."""
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    return err


def rank_log(place: Workplace) -> str:
    return (place.run / "ppo.partial" / "logs" / "rank_00001.txt").read_text()


def test_what_raises_on_one_rank_ends_both_with_its_words(place: Workplace) -> None:
    (place.path / "trouble_1").write_text("raise 4")
    process = place.start(*TWO)
    wait_until(lambda: logged(place, 2), process)
    start = time.monotonic()
    code, err = end_of(process)
    assert code == 2
    assert "reward function mine: prompts.jsonl:" in one_paragraph(err)
    assert "ValueError: no score today. Make it return" in err
    assert time.monotonic() - start < 60
    assert "ValueError: no score today" in rank_log(place)
    (place.path / "trouble_1").unlink()
    assert "resumed after update 2 of 7" in run_to_the_end(place)


@pytest.mark.slow
def test_a_bug_on_one_rank_shows_one_traceback(place: Workplace) -> None:
    (place.path / "trouble_1").write_text("bug 3")
    process = place.start(*TWO)
    wait_until(lambda: logged(place, 1), process)
    code, err = end_of(process)
    assert code == 1
    assert err.count("Traceback") == 1
    assert err.endswith("trouble.Bug: nobody expects it\n")
    assert "error:" not in err


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sleep", "stuck"])
def test_a_rank_that_hangs_ends_both_within_the_time_out(place: Workplace, how: str) -> None:
    (place.path / "trouble_1").write_text(f"{how} 3")
    process = place.start(*TWO, "--launch.timeout_seconds", "6")
    wait_until(lambda: logged(place, 1), process)
    start = time.monotonic()
    code, err = end_of(process)
    assert code == 1
    assert time.monotonic() - start < 6 + 3 + 16 + 30
    first, _, rest = err.partition("\n")
    assert "rank 0 waited for the others longer than launch.timeout_seconds (6) allows: one of them hangs" in first
    assert "Run the same command again: it resumes" in first
    assert rest.startswith("rank 1 is ended: rank 0 failed 15 s ago. It stood here:")
    assert re.search(r'trouble.py", line \d+ in trouble', rest)
    assert "error:" not in rest


@pytest.mark.slow
def test_a_killed_rank_ends_the_other_and_the_command_resumes(place: Workplace, undisturbed: Workplace) -> None:
    for rank, updates, resumed in ((1, 3, 2), (0, 5, 4)):
        process = place.start(*TWO)
        wait_until(lambda n=updates: logged(place, n), process)
        rank_of(process, rank).kill()
        code, err = end_of(process)
        assert code == 128 + signal.SIGKILL
        expected = f"error: rank {rank} of ppo was ended by signal 9; runs/tiny/ppo.partial is kept. Run the same"
        assert one_paragraph(err).startswith(expected)
        assert (
            f"rank {rank} of ppo was ended by signal 9"
            in (place.run / "ppo.partial" / "failures" / f"rank_{rank:05d}.json").read_text()
        )
        newest = max((place.run / "ppo.partial" / "state").glob("update_*"))
        assert newest.name == f"update_{resumed:06d}"
    assert "resumed after update 4 of 7" in run_to_the_end(place)
    assert_same_ppo_on_two_ranks(place, undisturbed)


def assert_same_ppo_on_two_ranks(place: Workplace, expected: Workplace) -> None:
    """Bit for bit, but for what the second rank's log says of its time."""
    assert without_time(place.rows("ppo")) == without_time(expected.rows("ppo"))
    ours, theirs = (p.manifest("ppo") for p in (place, expected))
    for manifest in (ours, theirs):
        del manifest["files"]["logs/rank_00001.txt"]
    assert ours["files"].keys() == theirs["files"].keys()
    timed = {"log.txt", "metrics.jsonl"}
    assert {k: v for k, v in ours["files"].items() if k not in timed} == {
        k: v for k, v in theirs["files"].items() if k not in timed
    }
    assert {path.name for path in place.run.iterdir() if not path.name.startswith(".")} == {"sft", "rm", "ppo"}


@pytest.mark.slow
def test_what_all_ranks_refuse_is_said_once(place: Workplace) -> None:
    """The gate looks at the reward model when the ranks have met; one without its normalisation is refused."""
    manifest = place.run / "rm" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["normalisation"]
    manifest.write_text(json.dumps(content))
    done = place.tristage(*TWO)
    assert done.returncode == 2
    assert "normalisation" in one_paragraph(done.stderr)


@pytest.mark.slow
def test_a_launcher_that_starts_one_process_for_two_is_refused(place: Workplace, undisturbed: Workplace) -> None:
    prepared = run_to_the_end(place, "--prepare")
    words = "torchrun --nnodes 1 --nproc-per-node 2 -m policy.ppo.stage runs/tiny/ppo.partial"
    assert f"ppo: prepared; start it: {words}" in prepared
    alone = accelerate(place, "--cpu", "--num_processes", "2")
    assert alone.returncode != 0
    refusal = [line for line in alone.stderr.splitlines() if line.startswith("error: ")]
    assert len(refusal) == 1
    assert "2 processes were asked for, and the launcher started this one among 1" in refusal[0]
    assert not (place.run / "ppo").exists()
    both = accelerate(place, "--multi_gpu", "--num_processes", "2")
    assert both.returncode == 0, both.stderr[-3000:]
    assert_same_ppo_on_two_ranks(place, undisturbed)


def accelerate(place: Workplace, *words: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch WORDS` of the stage in the prepared directory."""
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    return subprocess.run(
        [*launcher, *words, "--num_machines", "1", "-m", "policy.ppo.stage", "runs/tiny/ppo.partial"],
        cwd=place.path,
        env=command_environment() | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


@pytest.mark.slow
def test_a_straggler_is_named(place: Workplace) -> None:
    (place.path / "trouble_1").write_text("slow 1")
    out = run_to_the_end(place, "--ppo.updates", "3")
    lines = [line for line in out.splitlines() if "slower than the median" in line]
    assert lines
    assert all(line.partition(": ")[2].startswith("rank 1 is ") for line in lines)
    rows = [row for row in place.rows("ppo") if "time/ranks/busy_seconds_max" in row]
    assert len(rows) == 3
    assert all(row["time/ranks/busy_seconds_max"] > 0.5 > row["time/ranks/busy_seconds_min"] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_to_the_command_leave_nothing_behind(place: Workplace, number: signal.Signals) -> None:
    process = place.start(*TWO)
    wait_until(lambda: logged(place, 1), process)
    started = family(process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert ended(started)
    if number == signal.SIGKILL:
        assert (process.returncode, err) == (-signal.SIGKILL, "")
    else:
        assert process.returncode == 128 + number
        assert one_paragraph(err).startswith("error: ppo was interrupted. Run the same command again: it resumes")


@pytest.mark.slow
@pytest.mark.parametrize("while_importing", [False, True])
def test_ranks_that_are_told_to_save_save_and_go(
    place: Workplace, undisturbed: Workplace, while_importing: bool
) -> None:
    """Told while they import, they save after the first update."""
    process = place.start(*TWO)
    if while_importing:
        wait_until(lambda: len(family(process)) == 3, process)
    else:
        wait_until(lambda: logged(place, 1), process)
    process.send_signal(signal.SIGUSR1)
    code, err = end_of(process)
    assert (code, err) == (75, "")
    partial = place.run / "ppo.partial"
    marker = json.loads((partial / "requeue.json").read_text())
    assert marker["stage"] == "ppo"
    assert marker["step"] == 1 if while_importing else 1 <= marker["step"] < 7
    assert (partial / "state" / f"update_{marker['step']:06d}" / "checkpoint.json").exists()
    assert not (partial / "failures").exists()
    out = run_to_the_end(place)
    assert f"resumed after update {marker['step']} of 7" in out
    assert_same_ppo_on_two_ranks(place, undisturbed)


@pytest.mark.slow
def test_one_process_that_is_told_to_save_while_it_imports_does(place: Workplace) -> None:
    process = place.start("ppo", "recipe.yaml")
    wait_until(lambda: len(family(process)) == 1, process)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, err) == (75, "")
    assert "told to end; its state after step 1 is saved" in out
    assert json.loads((place.run / "ppo.partial" / "requeue.json").read_text())["step"] == 1
