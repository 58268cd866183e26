"""One `log(step, values)`: metrics.jsonl always, W&B when asked, and a progress display on a terminal."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.artifacts import json_safe, write_text
from pipeline.errors import UserError
from pipeline.recipe import Recipe

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
WANDB_ID = "wandb_id.txt"
SHOWN = 6
LINES_EVERY_SECONDS = 10.0


class Tracker:
    """Writes a stage's metrics and samples; what a resumed run writes again replaces what was there.

    `metrics.jsonl` rows are `{"step": int, <key>: float ...}`, one per step and set of keys; `samples.jsonl` holds the
    generations of each step once. Non-finite numbers are written as strings ("nan"), so that every line is valid JSON.

    Args:
        out: the stage's directory.
        on_write: called after each row of metrics.
    """

    def __init__(self, out: Path, recipe: Recipe, stage: str, on_write: Callable[[], None] = lambda: None) -> None:
        self._metrics = out / METRICS
        self._samples = out / SAMPLES
        self._on_write = on_write
        for file in (self._metrics, self._samples):
            _drop_cut_line(file)
        self._logged = {_key(row) for row in _read_rows(self._metrics)}
        self._sampled = {row["step"] for row in _read_rows(self._samples) if "step" in row}
        self._run = open_wandb(out, recipe, stage) if recipe.tracking.wandb != "off" else None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one row of numbers."""
        row = {"step": step, **{key: float(value) for key, value in values.items()}}
        if _key(row) in self._logged:
            _keep(self._metrics, lambda old: _key(old) != _key(row))
        _append(self._metrics, [row])
        self._logged.add(_key(row))
        if self._run is not None:
            self._run.log(dict(values), step=step)
        self._on_write()

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends generations, each with its step."""
        if step in self._sampled:
            _keep(self._samples, lambda old: old["step"] != step)
        _append(self._samples, [{"step": step, **row} for row in rows])
        self._sampled.add(step)
        if self._run is not None and rows:
            import wandb

            columns: list[str | int] = list(rows[0])
            table = wandb.Table(columns=columns, data=[[str(row[str(c)]) for c in columns] for row in rows])
            self._run.log({"samples": table}, step=step)

    def rewind(self, step: int) -> None:
        """Drops rows past `step`: a resumed run writes them again."""
        for file in (self._metrics, self._samples):
            _keep(file, lambda row: row["step"] <= step)
        self._logged = {key for key in self._logged if key[0] <= step}
        self._sampled = {sampled for sampled in self._sampled if sampled <= step}

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final metrics, shown by W&B beside the run's name."""
        if self._run is not None:
            self._run.summary.update(dict(values))

    def alert(self, title: str, text: str) -> None:
        """Sends an alert through W&B, which mails it or posts it as its user has set."""
        if self._run is not None:
            self._run.alert(title=title, text=text)

    def close(self, *, failed: bool = False) -> None:
        """Ends the W&B run."""
        if self._run is not None:
            run, self._run = self._run, None
            run.finish(exit_code=int(failed))


class SilentTracker(Tracker):
    """The tracker of a rank that writes nothing."""

    def __init__(self, on_write: Callable[[], None]) -> None:
        self._on_write = on_write

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._on_write()

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing."""

    def rewind(self, step: int) -> None:
        """Nothing."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def alert(self, title: str, text: str) -> None:
        """Nothing."""

    def close(self, *, failed: bool = False) -> None:
        """Nothing."""


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Rows of a stage's metrics.jsonl."""
    return _read_rows(directory / METRICS)


def _key(row: Mapping[str, Any]) -> tuple[int, frozenset[str]]:
    return row["step"], frozenset(row)


def _append(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends and syncs: a state that is saved later never stands on the disk without the rows before it."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(_lines(rows))
        stream.flush()
        os.fsync(stream.fileno())


def _keep(file: Path, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
    """Leaves only the `wanted` rows; the file changes in one step."""
    if file.exists():
        rows = _read_rows(file)
        kept = [row for row in rows if wanted(row)]
        if len(kept) < len(rows):
            write_text(file, _lines(kept))


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(json_safe(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file of ours, none where there is no file; a last line that a kill cut off is left out.

    Lines end at a newline only: texts may hold other line separators, which JSON does not escape.
    """
    if not file.exists():
        return []
    *lines, _cut = file.read_text(encoding="utf-8", errors="replace").split("\n")
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(
            f"{file} is damaged: {error}.", mend="Remove the damaged line, or run the stage again with --overwrite."
        ) from error


def _drop_cut_line(file: Path) -> None:
    """Removes what follows the last newline: a kill came in the middle of that line."""
    if file.exists():
        content = file.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with file.open("r+b") as stream:
                stream.truncate(end)


def open_wandb(out: Path, recipe: Recipe, stage: str) -> Any:
    """One W&B run per stage, grouped under the recipe's name; a resumed stage continues its run."""
    import wandb
    from wandb.errors import Error as WandbError

    mend = "Set WANDB_API_KEY or run `wandb login`, or use tracking.wandb: offline."
    mode = "online" if recipe.tracking.wandb == "online" else "offline"
    try:
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise UserError("tracking.wandb is 'online' but no W&B key is set.", mend=mend)
        id_file = out / WANDB_ID
        if not id_file.exists():
            write_text(id_file, secrets.token_hex(4))
        return wandb.init(
            project=recipe.tracking.project,
            name=f"{recipe.name}/{stage}",
            group=recipe.name,
            job_type=stage,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            mode=mode,
            dir=out.parent,
            config=recipe.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )
    except WandbError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"tracking.wandb: W&B could not be started ({reason}).", mend=mend) from error


class ProgressDisplay:
    """Stage, step, time left and the six numbers that matter; plain lines where there is no terminal."""

    def __init__(self, console: Console, title: str, total: int, live: Live | None) -> None:
        self._console, self._title, self._total, self._live = console, title, total, live
        self._last_line = -LINES_EVERY_SECONDS
        self._first: tuple[int, float] | None = None
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task(title, total=total)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows `step` of the total and the first six of `values`."""
        shown = dict(list(values.items())[:SHOWN])
        self._bar.update(self._task, completed=step)
        self._first = self._first or (step, time.monotonic())
        if self._live is not None:
            grid = Table.grid(padding=(0, 2))
            grid.add_row(self._bar)
            numbers = "   ".join(f"[dim]{key}[/] [bold]{_short(value)}[/]" for key, value in shown.items())
            grid.add_row(numbers)
            self._live.update(grid)
        elif step >= self._total or time.monotonic() - self._last_line >= LINES_EVERY_SECONDS:
            self._last_line = time.monotonic()
            numbers = "  ".join(f"{key} {_short(value)}" for key, value in shown.items())
            line = f"{self._title} {step}/{self._total}{self._time_left(step)}  {numbers}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _time_left(self, step: int) -> str:
        """Time left at the mean pace since the first step of this process."""
        first, at = self._first or (step, 0.0)
        if not first < step < self._total:
            return ""
        seconds = (time.monotonic() - at) / (step - first) * (self._total - step)
        return f"  {seconds / 60:.0f} min left" if seconds >= 90 else f"  {seconds:.0f} s left"


@contextmanager
def progress_display(console: Console, title: str, total: int, *, enabled: bool) -> Iterator[ProgressDisplay]:
    """A progress display for the duration of the block."""
    if enabled and console.is_terminal:
        with Live(console=console, refresh_per_second=4) as live:
            yield ProgressDisplay(console, title, total, live)
    else:
        yield ProgressDisplay(console, title, total, None)


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
