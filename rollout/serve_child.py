"""The child of `tristage serve`: starts vLLM's OpenAI server with the arguments given, and ends all that belongs to it.

vLLM's engine and worker processes outlive a server that is killed. So the server is told to end in order when this
process is, or when `tristage serve` has died. What it leaves behind, such as the process that gives shared memory back,
is adopted and has some seconds to end; whatever is left of the process group after that is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

from pipeline.process import join_parent

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PATIENCE_SECONDS = 30
LAST_SECONDS = 10.0


def main() -> None:
    """Runs the server to its end; the exit code is the server's."""
    parent = os.getppid()
    join_parent()
    server = subprocess.Popen([sys.executable, "-m", "vllm.entrypoints.openai.api_server", *sys.argv[1:]])

    def end(number: int, frame: object) -> None:
        server.terminate()
        signal.alarm(PATIENCE_SECONDS)

    signal.signal(signal.SIGALRM, lambda number, frame: os.killpg(0, signal.SIGKILL))
    signal.signal(signal.SIGTERM, end)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    code = server.wait()
    _wait_for_the_rest()
    if os.getppid() != parent:
        os.killpg(0, signal.SIGKILL)
    sys.exit(code if code >= 0 else 128 - code)


def _wait_for_the_rest() -> None:
    deadline = time.monotonic() + LAST_SECONDS
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.05)


if __name__ == "__main__":
    main()
