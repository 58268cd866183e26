"""What a stage is: a process, or several, that read artifacts and write one.

`pipeline.runner` prepares `runs/<name>/<stage>.partial` (resolved recipe and job.json) and starts
`python -m <stage module> <that directory>`, once or on several ranks (`pipeline.launchers`).
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shlex
import shutil
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipeline.artifacts import JOB, STATE, Artifact, finish, open_artifact, write_json
from pipeline.errors import UserError
from pipeline.failures import FOLDER as FAILURES
from pipeline.failures import Failures
from pipeline.load import RESOLVED, load_recipe
from pipeline.recipe import Recipe
from pipeline.surroundings import device_name, git_commit, gpu_peak, package_versions
from pipeline.tracking import ProgressDisplay, SilentTracker, Tracker, progress_display

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOG = "log.txt"
LOGS = "logs"
"""Folder of the logs of the ranks after the first."""
MARKER = "requeue.json"
"""Says that the stage saved its state because it was told to, and wants to be started again."""
NOTE_TIME_EVERY_SECONDS = 5.0


class Preempted(Exception):
    """The stage has saved its state and ends, to be started again.

    Args:
        step: how far it has come.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"told to save and end after step {step}")
        self.step = step


class Stage:
    """A running stage: its recipe, verified inputs, output directory and tracker.

    Attributes:
        out: `runs/<name>/<stage>.partial`; everything is written below it.
        state: `out/state`, checkpoints of the unfinished stage; removed at success.
        inputs: verified artifacts by role.
        displays: progress displays that are still open; closed however the stage ends.
        ranks: the processes that run the stage. All call the same functions; what is said, tracked and written is the
            first one's, and the others keep a log of their own in `logs/`.

    Args:
        told: signals received that ask the stage to save its state and end.
        signals: the signals received so far. Their KeyboardInterrupt is lost when it is raised where Python ignores
            exceptions (a finaliser, a callback from C); the next line or row that the stage writes raises it again.
    """

    def __init__(self, out: Path, signals: Sequence[int] = (), told: Sequence[int] = ()) -> None:
        self._started = (time.time(), time.perf_counter())
        from pipeline.ranks import join

        job = read_job(out)
        self.name: str = job["stage"]
        self.out = out
        self.state = out / STATE
        self.recipe: Recipe = load_recipe(out / RESOLVED)
        self.ranks = join(self.recipe.launch)
        self.failures = Failures(out, self.ranks.rank)
        self.console = Console(highlight=False, quiet=not self.ranks.is_main)
        self.displays = ExitStack()
        self._log = _file_logger(_log_file(out, self.ranks.rank))
        self._job = job
        self._earlier: Mapping[str, float] = job["spent"] if self.ranks.is_main else {}
        self._manifest: dict[str, Any] = {}
        self._noted = time.monotonic()
        self._signals, self._told = signals, told
        self._forget_earlier_ends()
        self.inputs: Mapping[str, Artifact] = {
            role: open_artifact(
                entry["path"], kinds=entry["kinds"], wanted_as=entry["wanted_as"], verify=self.ranks.is_main
            )
            for role, entry in job["inputs"].items()
        }
        if self.ranks.is_main:
            self.tracker = Tracker(out, self.recipe, self.name, on_write=self._on_write)
        else:
            self.tracker = SilentTracker(self._on_write)

    def _forget_earlier_ends(self) -> None:
        """Removes what an earlier start said when it ended; then all ranks may fail, and watch for one another's."""
        if self.ranks.is_main:
            self.failures.clear()
            (self.out / MARKER).unlink(missing_ok=True)
        self.ranks.barrier()
        if self.ranks.world > 1:
            self.failures.watch()

    def say(self, text: str) -> None:
        """One line to the terminal and to log.txt."""
        self._stop_if_told_to()
        self.console.print(text, markup=False, soft_wrap=True)
        self._log.info(text)

    def note(self, text: str) -> None:
        """One line to this rank's log alone."""
        self._log.info(text)

    def record(self, **entries: Any) -> None:
        """Adds entries to the manifest."""
        self._manifest.update(entries)

    def record_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Puts the tokenizer's and the chat template's hashes into the manifest."""
        from pipeline.tokens import chat_template_sha256, tokenizer_sha256

        self.record(
            tokenizer_sha256=tokenizer_sha256(tokenizer),
            chat_template_sha256=chat_template_sha256(tokenizer),
        )

    def progress(self, total: int, title: str) -> AbstractContextManager[ProgressDisplay]:
        """A progress display of `total` steps."""
        return progress_display(self.console, title, total, enabled=self.recipe.tracking.progress)

    def told_to_save(self) -> bool:
        """Whether some rank was told to save its state and end; all ranks ask together, between two steps."""
        return self.ranks.any(bool(self._told))

    def preempted(self, step: int) -> None:
        """Leaves the marker for whoever starts stages again; the state after `step` is saved."""
        self.ranks.barrier()
        if self.ranks.is_main:
            self.note_time_spent()
            write_json(self.out / MARKER, {"stage": self.name, "step": step, "time": time.time()})
        self.ranks.barrier()

    def complete(self, metrics: Mapping[str, Any]) -> Path:
        """Writes the manifest and renames the directory; returns its final path."""
        final = self.out.with_name(self.name)
        self.displays.close()
        self.tracker.summary(metrics)
        self.tracker.close()
        self.close_log()
        known = {"packages": package_versions(), "code": git_commit(), "device": device_name()}
        spent = self.ranks.gather(self._spent())
        if self.ranks.is_main:
            for leftover in (self.out / FAILURES, self.out / MARKER):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
            finish(self.out, final, {**self._full_manifest(metrics, final, spent), **known})
        self.ranks.barrier()
        return final

    def _full_manifest(
        self, metrics: Mapping[str, Any], final: Path, spent: Sequence[Mapping[str, float]]
    ) -> dict[str, Any]:
        """`spent`: time and memory of every rank; CPU seconds are those of all together."""
        several = {"ranks": list(spent)} if len(spent) > 1 else {}
        total = {"cpu_seconds": round(sum(each["cpu_seconds"] for each in spent), 2)}
        return {
            "kind": self.name,
            "fingerprint": self._job["fingerprint"],
            "inputs": {
                role: entry["identity"] | {"path": _relative(entry["path"], final)}
                for role, entry in self._job["inputs"].items()
            },
            "seed": self.recipe.seed,
            "metrics": dict(metrics),
            **self._manifest,
            **spent[0],
            **total,
            **several,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started[0])),
            "command": shlex.join(self._job["command"]),
        }

    def note_time_spent(self) -> None:
        """Keeps the time of a run that may end unfinished, for the manifest of the one that resumes."""
        self._noted = time.monotonic()
        if self.ranks.is_main and (self.out / JOB).exists():
            write_json(self.out / JOB, {**self._job, "spent": self._spent()})

    def _on_write(self) -> None:
        self._stop_if_told_to()
        if time.monotonic() - self._noted >= NOTE_TIME_EVERY_SECONDS:
            self.note_time_spent()

    def _stop_if_told_to(self) -> None:
        if self._signals:
            raise KeyboardInterrupt

    def _spent(self) -> dict[str, float]:
        """Wall and CPU seconds (ended children included) and peak memory, with those of earlier, unfinished runs."""
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        now = {
            "wall_seconds": time.perf_counter() - self._started[1],
            "cpu_seconds": sum(u.ru_utime + u.ru_stime for u in usage),
        }
        spent = {key: round(value + self._earlier.get(key, 0.0), 2) for key, value in now.items()}
        peaks = {"peak_memory_gib": max(u.ru_maxrss for u in usage) / 2**20, **gpu_peak()}
        return spent | {key: round(max(value, self._earlier.get(key, 0.0)), 3) for key, value in peaks.items()}

    def close_log(self) -> None:
        """Closes log.txt for good: a closed file handler would open it again, after its hash was taken."""
        for handler in self._log.handlers:
            with suppress(OSError):
                handler.close()
        self._log.handlers[:] = [logging.NullHandler()]

    def log_traceback(self) -> None:
        """Writes the current exception into log.txt."""
        self._log.error(traceback.format_exc())


def read_job(partial: Path) -> dict[str, Any]:
    """`job.json` of a prepared directory, refusing a damaged one."""
    try:
        job = json.loads((partial / JOB).read_text(encoding="utf-8"))
        if job["fingerprint"]["sha256"] and job["spent"].keys() and job["stage"]:
            return job
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{partial / JOB} is corrupted ({type(error).__name__}: {error}).",
            mend="Run the stage again with --overwrite: it starts anew.",
        ) from error
    raise UserError(f"{partial / JOB} is corrupted.", mend="Run the stage again with --overwrite: it starts anew.")


def _relative(path: str, start: Path) -> str:
    """A local path as seen from the artifact, so that a run directory may be moved; a hub id as it is."""
    return os.path.relpath(path, start) if Path(path).exists() else path


class _LogFile(logging.FileHandler):
    """A log file whose write errors are raised instead of printed."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


def _log_file(out: Path, rank: int) -> Path:
    if rank == 0:
        return out / LOG
    (out / LOGS).mkdir(exist_ok=True)
    return out / LOGS / f"rank_{rank:05d}.txt"


def _file_logger(file: Path) -> logging.Logger:
    logger = logging.getLogger(f"tristage.{file.parent.name}.{file.stem}")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = _LogFile(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.handlers[:] = [handler]
    return logger
