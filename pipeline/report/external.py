"""Results of lm-evaluation-harness, taken into a comparison: `--lm-eval ppo=results.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

NOT_METRICS = {"alias", "name", "sample_len", "sample_count", "samples"}
"""Entries of a task that are no metric."""
STDERR = "_stderr"


def read_lm_eval(files: Mapping[str, str | Path], methods: Collection[str] | None = None) -> dict[str, Any]:
    """`{method: {task: {metric: {"value": number, "stderr": number | None}}}}` of `results_*.json` files by method.

    A metric is named as lm-eval names it, `acc`, with its filter behind it where it has one: `exact_match (strict)`.
    Values keep lm-eval's unit, which for most metrics is a fraction.

    Args:
        methods: those of the comparison; None accepts any.

    Errors:
        UserError: a file that is missing or is none of lm-eval's, or a method that is not compared.
    """
    for method in files:
        if methods is not None and method not in methods:
            raise UserError(
                f"--lm-eval {method}={files[method]}: {method} is not compared.",
                mend=f"Compared are {', '.join(methods)}.",
            )
    return {method: _read(method, Path(file)) for method, file in files.items()}


def _read(method: str, file: Path) -> dict[str, dict[str, dict[str, float | None]]]:
    name = f"--lm-eval {method}={file}"
    mend = "Give a results_*.json that `lm_eval --output_path` wrote."
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}.", mend=mend) from error
    except ValueError as error:
        raise UserError(f"{name}: is not a JSON document: {error}.", mend=mend) from error
    results = found.get("results") if isinstance(found, dict) else None
    if not isinstance(results, dict) or not all(isinstance(entry, dict) for entry in results.values()):
        raise UserError(f"{name}: has no `results` by task.", mend=mend)
    tasks = {task: _metrics(entry) for task, entry in results.items()}
    if not any(tasks.values()):
        raise UserError(f"{name}: no task has a metric.", mend=mend)
    return {task: metrics for task, metrics in tasks.items() if metrics}


def _metrics(entry: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Keys are `metric,filter`, beside `metric_stderr,filter`, which is a number or "N/A"."""
    metrics = {}
    for key, value in entry.items():
        metric, _, kind = key.partition(",")
        number = _number(value)
        if key in NOT_METRICS or metric.endswith(STDERR) or number is None:
            continue
        title = metric if kind in ("", "none") else f"{metric} ({kind})"
        beside = f"{metric}{STDERR},{kind}" if kind else f"{metric}{STDERR}"
        metrics[title] = {"value": number, "stderr": _number(entry.get(beside))}
    return metrics


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
