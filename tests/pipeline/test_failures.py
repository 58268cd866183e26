"""Failures told through the run directory: in order, with patience, and ending those that do not notice."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline import failures
from pipeline.failures import Failure, Failures
from tests.workplace import command_environment

WATCHING = """\
import sys, time
from pathlib import Path
from pipeline import failures

failures.POLL_SECONDS, failures.GRACE_SECONDS = 0.05, float(sys.argv[2])

def stands_here():
    Path(sys.argv[1], "watching").touch()
    time.sleep(float(sys.argv[3]))

failures.Failures(Path(sys.argv[1]), 0).watch()
stands_here()
sys.exit(5)
"""


def test_the_first_that_another_told_of_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([30.0, 20.0, 10.0])
    monkeypatch.setattr(failures.time, "time", lambda: next(clock))
    Failures(tmp_path, 3).tell(2, "later")
    Failures(tmp_path, 12).tell(137, "earlier: ü")
    Failures(tmp_path, 0).tell(1, "own")
    assert Failures(tmp_path, 0).of_another() == Failure(12, 137, "earlier: ü")
    assert Failures(tmp_path, 12).of_another() == Failure(0, 1, "own")


def test_two_of_the_same_moment_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures.time, "time", lambda: 1.0)
    for rank in (1, 2):
        Failures(tmp_path, rank).tell(2, "alike")
    found = Failures(tmp_path, 0).of_another()
    assert found is not None
    assert found.text == "alike"


def test_one_waits_as_long_as_it_is_told_to(tmp_path: Path) -> None:
    start = time.monotonic()
    assert Failures(tmp_path, 0).of_another(0.4) is None
    assert 0.4 <= time.monotonic() - start < 5.0
    Failures(tmp_path, 0).tell(1, "own")
    assert Failures(tmp_path, 0).of_another() is None


def test_one_that_is_told_meanwhile_ends_the_wait(tmp_path: Path) -> None:
    later = threading.Timer(0.3, Failures(tmp_path, 1).tell, (2, "told late"))
    later.start()
    start = time.monotonic()
    assert Failures(tmp_path, 0).of_another(60.0) == Failure(1, 2, "told late")
    assert time.monotonic() - start < 30.0
    later.join()


def test_a_new_start_forgets(tmp_path: Path) -> None:
    Failures(tmp_path, 1).tell(2, "old")
    Failures(tmp_path, 0).clear()
    assert Failures(tmp_path, 0).of_another() is None
    assert list(tmp_path.iterdir()) == []
    Failures(tmp_path, 0).clear()


def test_a_disk_that_refuses_does_not_hide_the_failure(tmp_path: Path) -> None:
    Failures(tmp_path / "gone", 0).tell(2, "the directory was renamed: the stage is complete")
    (tmp_path / "failures").write_text("in the way")
    Failures(tmp_path, 0).tell(2, "no folder can be made")


def watching(tmp_path: Path, *, grace: float, sleeps: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHING, str(tmp_path), str(grace), str(sleeps)],
        env=command_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "watching").exists():
        assert process.poll() is None
        time.sleep(0.02)
    return process


def test_who_does_not_notice_is_ended_and_says_where_it_stood(tmp_path: Path) -> None:
    process = watching(tmp_path, grace=0.2, sleeps=600.0)
    Failures(tmp_path, 1).tell(7, "broken")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 7
    assert err.startswith("rank 0 is ended: rank 1 failed 0 s ago. It stood here:\n")
    assert "in stands_here" in err


def test_who_ends_within_the_grace_ends_by_itself(tmp_path: Path) -> None:
    process = watching(tmp_path, grace=60.0, sleeps=0.5)
    Failures(tmp_path, 1).tell(7, "broken")
    assert process.communicate(timeout=60) == (None, "")
    assert process.returncode == 5
