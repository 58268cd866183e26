from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.errors import UserError
from pipeline.process import only_one, run_child

ROOT = Path(__file__).resolve().parent.parent.parent
PARENT = """\
import sys
from pathlib import Path
from pipeline.process import only_one, run_child
with only_one(Path(sys.argv[1])) as lock:
    ended = run_child([sys.executable, "-c", sys.argv[2], *sys.argv[3:]], lock=lock)
print(ended.code, ended.interrupted_by, flush=True)
"""
SLEEPER = """\
import os, signal, subprocess, sys, time
from pathlib import Path
from pipeline.process import join_parent
join_parent()
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: Path(sys.argv[1]).with_name("asked").touch())
Path(sys.argv[1]).write_text(f"{os.getpid()} {grandchild.pid}")
end = time.time() + 600
while time.time() < end:
    time.sleep(0.05)
"""


def start(tmp_path: Path, *words: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A parent that runs the sleeper, once the sleeper and its own child are up."""
    ready = tmp_path / "ready"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "lock"), SLEEPER, str(ready), *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: ready.exists() and len(ready.read_text().split()) == 2, parent)
    return parent, [psutil.Process(int(pid)) for pid in ready.read_text().split()]


def wait_for(condition, process: subprocess.Popen[str] | None = None) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        assert process is None or process.poll() is None
        time.sleep(0.02)


def all_gone(processes: list[psutil.Process]) -> bool:
    return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes)


def child(code: str, tmp_path: Path):
    with only_one(tmp_path / "lock") as lock:
        return run_child([sys.executable, "-c", code], lock=lock)


def test_the_exit_code_is_passed_on(tmp_path: Path) -> None:
    assert child("import sys; sys.exit(7)", tmp_path).code == 7
    ended = child("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    assert (ended.code, ended.interrupted_by) == (-9, None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_once_and_nothing_is_left(tmp_path: Path, number: signal.Signals) -> None:
    parent, processes = start(tmp_path)
    parent.send_signal(number)
    out, _ = parent.communicate(timeout=120)
    assert out.split() == ["-15", str(int(number))]
    wait_for(lambda: all_gone(processes))


def test_a_second_signal_kills_what_does_not_end(tmp_path: Path) -> None:
    parent, processes = start(tmp_path, "stubborn")
    parent.send_signal(signal.SIGINT)
    wait_for((tmp_path / "asked").exists, parent)
    parent.send_signal(signal.SIGINT)
    out, _ = parent.communicate(timeout=120)
    assert out.split() == ["-9", "2"]
    wait_for(lambda: all_gone(processes))


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_stage_dies_with_a_killed_parent_and_frees_the_lock(tmp_path: Path) -> None:
    parent, (stage, grandchild) = start(tmp_path)
    parent.kill()
    parent.wait(timeout=120)
    wait_for(lambda: all_gone([stage]))
    with only_one(tmp_path / "lock", "still held"):
        assert grandchild.is_running()
    grandchild.kill()


def test_the_lock_is_held_by_one_process(tmp_path: Path) -> None:
    parent, _ = start(tmp_path)
    with pytest.raises(UserError, match="it is taken"), only_one(tmp_path / "lock", "it is taken."):
        pass
    parent.send_signal(signal.SIGTERM)
    parent.communicate(timeout=120)
    with only_one(tmp_path / "lock", "it is taken."):
        pass


def test_handlers_are_as_before(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    child("pass", tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    """`nohup tristage ...` ignores SIGHUP, a shell's background job SIGINT."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        code = "import os, signal; os.kill(os.getppid(), signal.SIGHUP)"
        ended = child(code, tmp_path)
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert (ended.code, ended.interrupted_by) == (0, None)
