"""Starts the ranks of a stage on this machine and ends when they have: a child of `tristage`, the parent of the ranks.

`python -m pipeline.agent PROCESSES MODULE DIRECTORY`. Ranks die with it, and signals reach each of them. When one fails
the others are sent nothing: they learn of it by themselves (`pipeline.failures`), and what each says stays its own.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pipeline.exits import EXIT_REQUEUE, interrupted_message, killed_message, print_error
from pipeline.failures import GRACE_SECONDS, Failures
from pipeline.process import LOCK, PARENT, deaf_to_requests, hear_requests, join_parent

ENOUGH_SECONDS = GRACE_SECONDS + 5.0
"""How long the ranks may live on after one of them has failed."""
POLL_SECONDS = 0.05


class Agent:
    """The `processes` ranks of the stage `module` in the prepared `directory`.

    Signals that end this process end the ranks instead; SIGUSR1 asks them to save their state.
    """

    def __init__(self, processes: int, module: str, directory: Path) -> None:
        self._world, self._words, self._directory = processes, [sys.executable, "-m", module, str(directory)], directory
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._received: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._pass_on)
        Failures(directory, -1).clear()

    def run(self, environment: Mapping[str, str], lock: int | None) -> int:
        """Runs the ranks to their end; returns the exit code of the first that failed (128 + n after signal n), or 0.

        Args:
            environment: what theirs has beside this process's own.
            lock: descriptor of the stage's lock, which they hold too.
        """
        held = {} if lock is None else {LOCK: str(lock)}
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self._world))}
        shared = threads | dict(os.environ) | held | dict(environment) | {PARENT: str(os.getpid())}
        with deaf_to_requests():
            for rank in range(self._world):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                self._ranks.append(
                    subprocess.Popen(self._words, env=shared | own, pass_fds=() if lock is None else (lock,))
                )
        for number in list(self._received):
            self._send(number)
        hear_requests()
        return self._wait()

    def _wait(self) -> int:
        code, deadline = 0, float("inf")
        running = dict(enumerate(self._ranks))
        while running:
            for rank in [rank for rank, child in running.items() if child.poll() is not None]:
                ended = running.pop(rank).returncode
                if ended and not code:
                    code = ended if ended > 0 else 128 - ended
                    deadline = time.monotonic() + (float("inf") if code == EXIT_REQUEUE else ENOUGH_SECONDS)
                    if ended < 0:
                        self._say(rank, -ended)
            if running and time.monotonic() > deadline:
                print_error(f"ranks {', '.join(map(str, running))} did not end after another failed: they are killed.")
                for child in running.values():
                    child.kill()
                deadline = float("inf")
            time.sleep(POLL_SECONDS)
        return code

    def _say(self, rank: int, number: int) -> None:
        """Says what a rank that a signal ended cannot say, here and to the other ranks."""
        if any(received != signal.SIGUSR1 for received in self._received):
            text = interrupted_message(self._directory.stem)
        else:
            text = killed_message(f"rank {rank} of {self._directory.stem}", number, self._directory)
        Failures(self._directory, rank).tell(128 + number, text)
        print_error(text)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
        self._send(number)

    def _send(self, number: int) -> None:
        for child in self._ranks:
            child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)


@contextmanager
def meeting_point() -> Iterator[int]:
    """A port of this machine for rank 0 to listen on; bound meanwhile, so that nobody else is given it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def main() -> None:
    """Runs the ranks that the command line names and ends with their exit code."""
    lock = join_parent()
    processes, module, directory = sys.argv[1:]
    agent = Agent(int(processes), module, Path(directory))
    with meeting_point() as port:
        world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        sys.exit(agent.run({**world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}, lock))


if __name__ == "__main__":
    main()
