"""One process of a stage fails, and all end with its error: failures are told through the run directory.

The processes share that directory whatever connects them, so that a failure is told even where messages no longer pass.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.artifacts import write_json

FOLDER = "failures"
POLL_SECONDS = 1.0
PATIENCE_SECONDS = 3.0
"""How long a process that lost the others waits to hear of a failure that explains it."""
INTERRUPTED_SECONDS = 1.0
"""The same for one that was interrupted and is not the first: signals reach all."""
STAGGER_SECONDS = 0.25
"""How much longer each further process of a machine waits, so that of several alike one speaks."""
GRACE_SECONDS = 15.0
"""How long a process may go on after another's failure before it is ended where it stands."""


class Failure(NamedTuple):
    """What ended a process: its rank, its exit code and the error's text."""

    rank: int
    code: int
    text: str


class Failures:
    """Failures of the `world` processes that write into the stage directory `out`; this one is `rank`."""

    def __init__(self, out: Path, rank: int) -> None:
        self._folder, self._rank = out / FOLDER, rank

    def clear(self) -> None:
        """Forgets those of an earlier start."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def tell(self, code: int, text: str) -> None:
        """Tells the others that this process ends, where the disk lets it."""
        entry = {"rank": self._rank, "code": code, "text": text, "time": time.time()}
        with suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            write_json(self._folder / f"rank_{self._rank:05d}.json", entry)

    def of_another(self, patience: float = 0.0) -> Failure | None:
        """The first failure that another process told of, once there is one or `patience` seconds have passed."""
        deadline = time.monotonic() + patience
        while True:
            told = [json.loads(text) for text in self._read()]
            others = [one for one in told if one["rank"] != self._rank]
            if others:
                first = min(others, key=lambda one: one["time"])
                return Failure(first["rank"], first["code"], first["text"])
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.1)

    def _read(self) -> Iterator[str]:
        for file in self._folder.glob("rank_*.json"):
            with suppress(OSError):  # forgotten by a new start, or the stage is complete
                yield file.read_text(encoding="utf-8")

    def watch(self) -> None:
        """Ends this process when another has failed and it does not notice: where it hangs is written to stderr."""
        threading.Thread(target=self._watch, name="failures", daemon=True).start()

    def _watch(self) -> None:
        while (failure := self.of_another()) is None:
            time.sleep(POLL_SECONDS)
        time.sleep(GRACE_SECONDS)
        print(  # noqa: T201
            f"rank {self._rank} is ended: rank {failure.rank} failed {GRACE_SECONDS:.0f} s ago. It stood here:",
            file=sys.stderr,
        )
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
        os._exit(failure.code)
