"""How a stage's process begins and ends: signals, errors, exit codes, and other ranks that fail."""

from __future__ import annotations

import argparse
import faulthandler
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.artifacts import JOB
from pipeline.errors import UserError, disk_error_in, disk_message
from pipeline.exits import EXIT_REQUEUE, EXIT_USER_ERROR, interrupted_message, print_error
from pipeline.failures import INTERRUPTED_SECONDS, PATIENCE_SECONDS, STAGGER_SECONDS, Failures
from pipeline.process import hear_requests, join_parent
from pipeline.stage import LOGS, Preempted, Stage, read_job

if TYPE_CHECKING:
    from types import FrameType

REQUEUE = "TRISTAGE_REQUEUE"
"""Set to 1 by whoever starts a stage again by itself: then SIGTERM too asks for its state."""


class Signals:
    """What was sent to this process: `stop` ends it at once, `save` once its state is saved.

    SIGINT and SIGTERM stop; SIGUSR1 saves, and SIGTERM too where `TRISTAGE_REQUEUE` is set. In a stage that keeps no
    state to go on from (`saves` is False) all of them stop.
    """

    def __init__(self, *, saves: bool) -> None:
        self.stop: list[int] = []
        self.save: list[int] = []
        signal.signal(signal.SIGUSR1, self._save if saves else self._stop)
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background job ignores Ctrl-C
                asks = saves and number == signal.SIGTERM and os.environ.get(REQUEUE) == "1"
                signal.signal(number, self._save if asks else self._stop)
        hear_requests()

    def ignore(self) -> None:
        """From here on this process ends by itself."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stop.append(number)
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    def _save(self, number: int, frame: FrameType | None) -> None:
        self.save.append(number)


def stage_main(*names: str, run: Callable[[Stage], dict[str, Any]], saves: bool = True) -> NoReturn:
    """Entry point of every stage module: `python -m policy.sft runs/demo/sft.partial`.

    `names` are the stages that the module runs; the directory says which of them it was prepared for. `saves`: they ask
    `Stage.told_to_save` between their steps. On several ranks all run this, and what ends one ends all.

    Exit codes: 0 complete, 2 a `UserError` (one paragraph, no traceback), 75 saved and to be started again, 130 and
    143 interrupted by SIGINT and SIGTERM, 1 anything else.
    """
    join_parent()
    faulthandler.enable(sys.__stderr__ or sys.stderr)
    parser = argparse.ArgumentParser(description="Runs a stage in a directory prepared by `tristage`.")
    parser.add_argument("directory", type=Path, help=f"runs/<name>/{'|'.join(names)}.partial")
    out: Path = parser.parse_args().directory
    signals, opened = Signals(saves=saves), list[Stage]()
    name = ", ".join(names)
    try:
        name = _check_directory(out, names)
        _quiet_libraries()
        stage = Stage(out, signals.stop, signals.save)
        opened.append(stage)
        final = stage.complete(run(stage))
        stage.console.print(f"{name}: complete, written to {final}", markup=False, soft_wrap=True)
        code = 0
    except Preempted as ended:
        code = _save_and_go(opened[0], name, ended)
    except BaseException as error:
        stage = opened[0] if opened else None
        words = _words(error, name, out)
        code = _fail(error, stage, out, words, signals)
        if words is None and not _several():
            raise
    _leave(code)


def _words(error: BaseException, name: str, out: Path) -> str | None:
    """What a person reads of the error; None where only its traceback says it."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return interrupted_message(name)
    cause = disk_error_in(error, out)
    return None if cause is None else disk_message(cause, out)


def _fail(error: BaseException, stage: Stage | None, out: Path, words: str | None, signals: Signals) -> int:
    """Says what ended this process, here and to the other ranks; returns the exit code.

    Of the ranks of a machine one speaks: the first that failed, and of those that fail alike the lowest.
    """
    signals.ignore()
    interrupted, lost = isinstance(error, KeyboardInterrupt), words is None and _several() and _lost_the_others(error)
    code = 1 if words is None else 128 + (signals.stop or [signal.SIGINT])[0] if interrupted else EXIT_USER_ERROR
    if not _several():
        _give_up(stage)
        if words is not None:
            print_error(words)
        return code
    rank, local = (int(os.environ.get(key, "0")) for key in ("RANK", "LOCAL_RANK"))
    failures, joined = Failures(out, rank), _joined()
    words = _lost_words(error, rank, stage, out) if lost else words
    waits = PATIENCE_SECONDS if lost or (rank and not interrupted) else INTERRUPTED_SECONDS if rank else 0.0
    first = failures.of_another(waits + local * STAGGER_SECONDS) if joined else None
    if joined and first is None:
        failures.tell(code, words or _first_line(error))
    _give_up(stage)
    if first is not None:
        machine = int(os.environ["LOCAL_WORLD_SIZE"])
        if local == 0 and first.rank // machine != rank // machine:
            print_error(f"rank {rank} ends because rank {first.rank} failed: {first.text}")
        return first.code
    if words is None:
        traceback.print_exception(error)
    elif joined or local == 0:  # before the ranks have met, what a person can mend is the same for all of a machine
        print_error(words)
    return code


def _several() -> bool:
    """Whether this process is one rank of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _joined() -> bool:
    """Whether the ranks have met."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def _lost_the_others(error: BaseException) -> bool:
    """Whether the error comes from a collective that the other ranks did not finish."""
    from torch.distributed import DistError

    text = str(error).lower()
    if any(word in text for word in ("invalid usage", "duplicate gpu")):
        return False
    known = ("gloo", "nccl", "connection closed by peer", "connection reset", "timed out waiting", "tcpstore")
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and any(word in text for word in known))


def _lost_words(error: BaseException, rank: int, stage: Stage | None, out: Path) -> str:
    """What a person reads of such an error."""
    cause = re.sub(r"\[\S*\.(cc|cpp|h):\d+\] ?", "", _first_line(error)).partition(". ")[0]
    if re.search(r"time[d ]*out", cause, re.IGNORECASE):
        limit = "" if stage is None else f" ({stage.recipe.launch.timeout_seconds:g})"
        what = (
            f"rank {rank} waited for the others longer than launch.timeout_seconds{limit} allows: one of them hangs or "
            "cannot be reached"
        )
    else:
        what = (
            f"rank {rank} lost the others: one of them was killed, perhaps for want of memory, or its machine is gone"
        )
    return (
        f"{what} ({cause}). The logs of the ranks lie in {out} and {out / LOGS}. Run the same command again: it "
        "resumes from the last complete checkpoint."
    )


def _first_line(error: BaseException) -> str:
    return (f"{type(error).__name__}: {error}".strip().splitlines() or [type(error).__name__])[0][:300]


def _save_and_go(stage: Stage, name: str, ended: Preempted) -> int:
    stage.preempted(ended.step)
    stage.say(f"{name}: told to end; its state after step {ended.step} is saved. The same command goes on from there.")
    _give_up(stage, with_traceback=False)
    stage.ranks.barrier()  # whoever starts ranks ends the others when one has gone
    return EXIT_REQUEUE


def _give_up(stage: Stage | None, *, with_traceback: bool = True) -> None:
    """Best effort on the way out of an unfinished stage: the disk may be what failed."""
    if stage is None:
        return
    stage.displays.close()
    try:
        if with_traceback:
            stage.log_traceback()
        stage.note_time_spent()
        stage.tracker.close(failed=True)
    except OSError:
        stage.console.print("log.txt could not be written", markup=False)
    stage.close_log()


def _leave(code: int) -> NoReturn:
    """Ends the process; where others are lost, an orderly end would wait for them."""
    if _joined():
        if code == 0:
            sys.modules["torch"].distributed.destroy_process_group()
        else:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)


def _check_directory(out: Path, names: Sequence[str]) -> str:
    """Which of the stages `names` the directory was prepared for."""
    start = f"Start the stage with `tristage {names[0]} RECIPE`."
    if not (out / JOB).exists():
        raise UserError(f"{out} holds no {JOB}.", mend=start)
    prepared_for = read_job(out)["stage"]
    if prepared_for not in names:
        raise UserError(f"{out} was prepared for the stage {prepared_for}, not {', '.join(names)}.", mend=start)
    return prepared_for


def _quiet_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
