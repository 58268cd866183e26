"""One `log(step, values)`: metrics.jsonl always, W&B when asked, and a progress display on a terminal."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.errors import UserError
from pipeline.recipe import Recipe

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
SHOWN = 6
LINES_EVERY_SECONDS = 10.0


class Tracker:
    """Writes a stage's metrics and samples; one row per call, a step never twice.

    `metrics.jsonl` rows are `{"step": int, <key>: float ...}`. Non-finite numbers are written as strings ("nan"),
    so that every line stays valid JSON.
    """

    def __init__(self, out: Path, recipe: Recipe, stage: str) -> None:
        self._metrics = out / METRICS
        self._samples = out / SAMPLES
        self._run = _start_wandb(out, recipe, stage) if recipe.tracking.wandb != "off" else None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one row of numbers."""
        row = {"step": step, **{key: _json_number(value) for key, value in values.items()}}
        _append(self._metrics, [row])
        if self._run is not None:
            self._run.log(dict(values), step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends generations, each with its step."""
        _append(self._samples, [{"step": step, **row} for row in rows])
        if self._run is not None and rows:
            import wandb

            columns = list(rows[0])
            table = wandb.Table(
                columns=columns, data=[[str(row[c]) for c in columns] for row in rows]
            )
            self._run.log({"samples": table}, step=step)

    def rewind(self, step: int) -> None:
        """Drops rows past `step`: a resumed run writes them again."""
        for file in (self._metrics, self._samples):
            if file.exists():
                kept = [row for row in _read_rows(file) if row["step"] <= step]
                beside = file.with_name(f".{file.name}.tmp")
                beside.unlink(missing_ok=True)
                _append(beside, kept)
                beside.replace(file) if kept else file.unlink()

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final metrics, shown by W&B beside the run's name."""
        if self._run is not None:
            self._run.summary.update(dict(values))

    def close(self, *, failed: bool = False) -> None:
        """Ends the W&B run."""
        if self._run is not None:
            self._run.finish(exit_code=int(failed))


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Rows of a stage's metrics.jsonl."""
    return _read_rows(directory / METRICS)


def _append(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(
            "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        )


def _read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file of ours; a last line that a kill cut off is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows


def _json_number(value: float) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _start_wandb(out: Path, recipe: Recipe, stage: str) -> Any:
    """One W&B run per stage, grouped under the recipe's name; a resumed stage continues its run."""
    import wandb

    if recipe.tracking.wandb == "online" and not wandb.api.api_key:
        raise UserError(
            "tracking.wandb is 'online' but no W&B key is set.",
            mend="Set WANDB_API_KEY or run `wandb login`, or use tracking.wandb: offline.",
        )
    id_file = out / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(wandb.util.generate_id())
    directory = out.parent / "wandb"
    directory.mkdir(exist_ok=True)
    return wandb.init(
        project=recipe.tracking.project,
        name=f"{recipe.name}/{stage}",
        group=recipe.name,
        job_type=stage,
        id=id_file.read_text(),
        resume="allow",
        mode=recipe.tracking.wandb,
        dir=directory,
        config=recipe.model_dump(mode="json"),
        settings=wandb.Settings(silent=True),
    )


class ProgressDisplay:
    """Stage, step, time left and the six numbers that matter; plain lines where there is no terminal."""

    def __init__(self, console: Console, title: str, total: int, live: Live | None) -> None:
        self._console, self._title, self._total, self._live = console, title, total, live
        self._last_line = 0.0
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
        if self._live is not None:
            grid = Table.grid(padding=(0, 2))
            grid.add_row(self._bar)
            numbers = "   ".join(
                f"[dim]{key}[/] [bold]{_short(value)}[/]" for key, value in shown.items()
            )
            grid.add_row(numbers)
            self._live.update(grid)
        elif step >= self._total or time.monotonic() - self._last_line >= LINES_EVERY_SECONDS:
            self._last_line = time.monotonic()
            numbers = "  ".join(f"{key} {_short(value)}" for key, value in shown.items())
            self._console.print(f"{self._title} {step}/{self._total}  {numbers}", highlight=False)


@contextmanager
def progress_display(
    console: Console, title: str, total: int, *, enabled: bool
) -> Iterator[ProgressDisplay]:
    """A progress display for the duration of the block."""
    if enabled and console.is_terminal:
        with Live(console=console, refresh_per_second=4) as live:
            yield ProgressDisplay(console, title, total, live)
    else:
        yield ProgressDisplay(console, title, total, None)


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
