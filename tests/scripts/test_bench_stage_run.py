"""How the benchmark of the ppo stage disturbs a run, and what it reads of logs, states and cards."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import UserError
from scripts.bench_ppo import ROOT
from scripts.bench_stage_run import (
    Disturbance,
    Saved,
    Site,
    descendants,
    fullest_gib,
    kill_all,
    log_lines,
    newest_state,
    resume_of,
    start_of,
)

PHASES = {"time/rollout": 1e-3, "time/experience": 2e-3, "time/update": 4e-3, "time/sync": 8e-3}


def write_log(file: Path, *lines: tuple[float, str]) -> Path:
    """A stage's log; times are seconds after a fixed moment."""
    stamp = "%Y-%m-%d %H:%M:%S"
    start = time.mktime(time.strptime("2026-03-01 12:00:00", stamp))
    text = "".join(
        f"{time.strftime(stamp, time.localtime(start + int(at)))},{round(at % 1 * 1000):03d} {words}\n"
        for at, words in lines
    )
    file.write_text(text, encoding="utf-8")
    return file


LOG = (
    (10.5, "MiB of weights"),
    (10.75, "batch arithmetic\nsecond line"),
    (11.0, "held out after update 0: kl 0.000"),
    (20.0, "ppo: told to end"),
    (30.0, "batch arithmetic"),
    (34.5, "resumed after update 3 of 6"),
)


def test_a_resume_is_timed_by_the_log(tmp_path: Path) -> None:
    lines = log_lines(write_log(tmp_path / "log.txt", *LOG))
    zero = lines[0][0] - 10.5
    assert start_of(lines, zero + 2.0) == pytest.approx(8.75)
    found = resume_of(lines, zero + 22.0)
    assert (found.update, found.seconds, found.reading) == (3, pytest.approx(12.5), pytest.approx(4.5))


def test_an_older_resume_is_not_taken_for_this_one(tmp_path: Path) -> None:
    lines = log_lines(write_log(tmp_path / "log.txt", *LOG))
    with pytest.raises(UserError, match="began anew"):
        resume_of(lines, lines[-1][0] + 60.0)


def write_state(partial: Path, update: int, *, sealed: bool = True) -> Path:
    folder = partial / "state" / f"update_{update:06d}"
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "part").write_bytes(b"1" * 1000)
    if sealed:
        (folder / "checkpoint.json").write_bytes(b"2" * 24)
    return folder


def write_rows(partial: Path, *steps: int) -> Path:
    file = partial / "metrics.jsonl"
    file.write_text("".join(json.dumps({**PHASES, "step": step}) + "\n" for step in steps))
    return file


def test_the_newest_sealed_state_is_measured(tmp_path: Path) -> None:
    for update, sealed in ((2, True), (4, True), (6, False)):
        write_state(tmp_path, update, sealed=sealed)
    os.utime(write_rows(tmp_path, 3, 4), (1000.0, 1000.0))
    os.utime(tmp_path / "state" / "update_000004" / "checkpoint.json", (1002.5, 1002.5))
    assert newest_state(tmp_path) == Saved(4, 1024 / 2**30, 2.5)
    write_rows(tmp_path, 3, 4, 5)
    assert newest_state(tmp_path).seconds is None


def test_no_state_is_an_error(tmp_path: Path) -> None:
    write_state(tmp_path, 2, sealed=False)
    with pytest.raises(UserError, match="without a saved state"):
        newest_state(tmp_path)


def test_a_disturbance_waits_for_its_update(tmp_path: Path) -> None:
    """SIGUSR1 in update 3 comes after row 2; the kill, after the state of update 3."""
    told, kills = Disturbance(tmp_path, 3, kills=False), Disturbance(tmp_path, 3, kills=True)
    write_rows(tmp_path, 1)
    write_state(tmp_path, 2)
    assert not told.is_due()
    write_rows(tmp_path, 1, 2)
    told.is_due()
    time.sleep(0.02)  # half of an update of 15 ms
    assert told.is_due()
    assert not kills.is_due()
    write_state(tmp_path, 3)
    kills.is_due()
    time.sleep(0.02)
    assert kills.is_due()


def test_all_that_a_command_started_is_killed() -> None:
    inner = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    with subprocess.Popen([sys.executable, "-c", inner], start_new_session=True) as process:
        while not (found := descendants(process.pid)):
            time.sleep(0.02)
        kill_all([process.pid, *found], ours=process)
        assert process.returncode == -9
    assert all(not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text() for pid in found)


def test_a_command_ends_at_the_deadline(tmp_path: Path) -> None:
    site = Site(tmp_path, os.environ | {"PYTHONPATH": str(ROOT)}, time.monotonic() - 1, asks_card=False)
    with pytest.raises(UserError, match=r"--minutes is over; the command had printed"):
        site.attempt(["doctor"])


def test_a_card_is_as_full_as_the_fullest() -> None:
    assert fullest_gib("1024\n512\n[N/A]\n3072\n") == 3.0
    assert fullest_gib("") is None


def test_the_card_is_asked_while_a_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 2048\necho 1024\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    site = Site(tmp_path, os.environ | {"PYTHONPATH": str(ROOT)}, math.inf, asks_card=True)
    attempt = site.attempt(["show", "no-such-recipe.yaml"])
    assert (attempt.code, attempt.card_gib) == (2, 2.0)
    assert "no-such-recipe.yaml does not exist" in site.last_words()
