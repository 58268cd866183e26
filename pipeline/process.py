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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError

PARENT = "TRISTAGE_PARENT"
LOCK = "TRISTAGE_LOCK"
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


def run_child(
    words: Sequence[str], *, lock: int, environment: Mapping[str, str] | None = None, is_ours: bool = True
) -> Ended:
    """Runs a command to its end and reports how it ended.

    SIGINT, SIGTERM and SIGHUP are passed on as one SIGTERM; the second such signal kills the command and all that it
    started. The command holds the lock too, so that nobody takes over while it lives.

    SIGUSR1 is passed on as it is, and counts as no interruption. One of ours is not ended by it while it starts.

    Args:
        lock: file descriptor from `only_one`.
        environment: what the command's has beside this process's own.
        is_ours: the command calls `join_parent`; one that starts processes elsewhere must not.
    """
    relay = _Relay()
    previous = {number: signal.getsignal(number) for number in (*_PASSED_ON, signal.SIGUSR1)}
    try:
        for number, handler in previous.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, relay.ask if number == signal.SIGUSR1 else relay.stop)
        ours = {PARENT: str(os.getpid()), LOCK: str(lock)} if is_ours else {}
        waiting = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
        with deaf_to_requests() if is_ours else contextlib.nullcontext():
            child = subprocess.Popen(
                words,
                env=os.environ | waiting | ours | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                process_group=0,
                pass_fds=(lock,),
            )
            relay.serve(child)
        return Ended(_wait(child), relay.stops[0] if relay.stops else None)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Relay:
    """Passes signals on to a child, also those that came before it was there."""

    def __init__(self) -> None:
        self.stops: list[int] = []
        self._asked = False
        self._child: subprocess.Popen[bytes] | None = None

    def serve(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        if self.stops:
            _signal(child, signal.SIGTERM)
        if self._asked:
            _signal(child, signal.SIGUSR1)

    def stop(self, number: int, frame: object) -> None:
        self.stops.append(number)
        if self._child is not None:
            _signal(self._child, signal.SIGTERM if len(self.stops) == 1 else signal.SIGKILL)

    def ask(self, number: int, frame: object) -> None:
        self._asked = True
        if self._child is not None:
            _signal(self._child, signal.SIGUSR1)


@contextlib.contextmanager
def deaf_to_requests() -> Iterator[None]:
    """Processes that are started in the block keep SIGUSR1 waiting until `hear_requests`, however long they import."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hear_requests() -> None:
    """From here on SIGUSR1 does what its handler says."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def join_parent() -> int | None:
    """Called first by a stage: it dies with the `tristage` that started it, and its own children get no lock.

    Returns the lock's descriptor. Without a `tristage` above it (another launcher) nothing happens.
    """
    parent, lock = os.environ.pop(PARENT, ""), os.environ.pop(LOCK, "")
    if lock:
        os.set_inheritable(int(lock), False)
    if parent and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != int(parent):  # it died while this process imported its libraries
            sys.exit(1)
    return int(lock) if lock else None


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
