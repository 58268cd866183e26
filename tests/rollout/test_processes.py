"""vLLM inside a trainer's process: what it leaves untouched, and that nothing survives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

MODULE = [sys.executable, "-m", "tests.rollout.processes"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def in_session(session: int) -> list[int]:
    """Processes of a session; one that has no parent left still belongs to it."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return members


@pytest.mark.vllm
def test_trainer_process_survives_its_engines_and_leaves_nothing_behind(tied_dir: Path) -> None:
    with subprocess.Popen(
        [*MODULE, "life", str(tied_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    ) as trainer:
        assert trainer.stdout is not None
        assert trainer.stderr is not None
        try:
            line = trainer.stdout.readline()
            if line:
                time.sleep(0.2)
                trainer.send_signal(signal.SIGINT)
            errors = trainer.stderr.read()
            code = trainer.wait(timeout=60)
        finally:
            trainer.kill()
    assert line, errors
    report = json.loads(line)
    before, after = report["state"]
    assert after == before
    expected, drawn = report["draws"]
    assert drawn == expected
    assert report["after_close"] == 1
    assert report["after_collection"] == 1
    assert report["second_gap"] < 1e-4
    assert report["interrupted"]
    assert report["third_gap"] < 1e-4
    assert report["children"] == 0
    assert report["first_seconds"] < 2
    # 1 where torch, on its way out, imports tabulate: that makes Python forget what the process died of.
    assert code in (-signal.SIGINT, 1)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert in_session(trainer.pid) == []


@pytest.mark.vllm
def test_trainer_that_dies_of_an_error_leaves_nothing_behind(tied_dir: Path) -> None:
    with subprocess.Popen(
        [*MODULE, "failure", str(tied_dir)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    ) as trainer:
        try:
            _, errors = trainer.communicate(timeout=120)
        finally:
            trainer.kill()
    assert trainer.returncode == 1
    assert errors.rstrip().endswith("ArithmeticError: the trainer's own error")
    assert in_session(trainer.pid) == []


@pytest.mark.vllm
def test_two_ranks_have_an_engine_each_once_the_group_exists(tied_dir: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    child = subprocess.run(
        [*launcher, "--nproc_per_node=2", *MODULE[1:], "ranks", str(tied_dir), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=400,
        env=ENVIRONMENT,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for rank, report in enumerate((first, second)):
        assert f"WORLD_SIZE=2, RANK={rank}" in report["refusal"]
        assert "Accelerator()" in report["refusal"]
        assert report["processes"] == 2
        assert report["rank"] == rank
        assert report["gap"] < 1e-4
        assert report["while_open"] == 3  # 1 + 2
        assert report["after_close"] == 3
    assert first["tokens"] != second["tokens"]
