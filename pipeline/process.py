"""Child processes that end when their parent does, and locks that the kernel takes back.

A stage runs in a process group of its own: a signal reaches it once, passed on by its parent, and whatever is left of
the group when the stage ends is ended with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError

_PARENT = "TRISTAGE_PARENT"
_LOCK = "TRISTAGE_LOCK"
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
LOCK_PATIENCE_SECONDS = 2.0


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: exit code, or minus the signal that ended it.
        interrupted_by: the first signal that reached this process meanwhile, None if none did.
    """

    code: int
    interrupted_by: int | None


def run_child(words: Sequence[str], *, lock: int) -> Ended:
    """Runs a command to its end and reports how it ended.

    SIGINT, SIGTERM and SIGHUP are passed on as one SIGTERM; the second such signal kills the command and all that it
    started. The command holds the lock too, so that nobody takes over while it lives.

    Args:
        lock: file descriptor from `only_one`.
    """
    received: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        for child in children:
            _signal(child, signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    previous = {number: signal.getsignal(number) for number in _PASSED_ON}
    try:
        for number, handler in previous.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, pass_on)
        environment = os.environ | {
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
            _PARENT: str(os.getpid()),
            _LOCK: str(lock),
        }
        child = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, process_group=0, pass_fds=(lock,))
        children.append(child)
        if received:
            _signal(child, signal.SIGTERM)
        return Ended(_wait(child), received[0] if received else None)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def join_parent() -> None:
    """Called first by a stage: it dies with the `tristage` that started it, and its own children get no lock.

    Without a `tristage` above it (another launcher) nothing happens.
    """
    parent, lock = os.environ.pop(_PARENT, ""), os.environ.pop(_LOCK, "")
    if lock:
        os.set_inheritable(int(lock), False)
    if parent and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        try:
            os.kill(int(parent), 0)
        except ProcessLookupError:
            sys.exit(1)


@contextlib.contextmanager
def only_one(file: Path, refusal: str = "") -> Iterator[int]:
    """Holds the lock `file` and yields its descriptor; the kernel lets go of it when its holders end, however they end.

    Args:
        refusal: error text when another process keeps it for two seconds; "" waits for as long as it takes.
    """
    with file.open("a+") as stream:
        deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
        while not _locked(stream.fileno()):
            if refusal and time.monotonic() > deadline:
                raise UserError(refusal, mend="Wait for it, or end it first.")
            time.sleep(0.1)
        yield stream.fileno()


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Waits for the child, then kills what is left of its group while its number is still taken."""
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """SIGTERM to the child alone, which ends its own helpers in order; SIGKILL to its whole group."""
    with contextlib.suppress(ProcessLookupError):
        if number == signal.SIGKILL:
            os.killpg(child.pid, number)
        else:
            os.kill(child.pid, number)
