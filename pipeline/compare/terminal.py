"""What a comparison says in the terminal: the headline table and the sentences of its reading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

Results = Mapping[str, Any]


def say_results(results: Results, console: Console) -> None:
    """Prints the headline table, then the reading with the price after its first sentence."""
    console.print(headline(results))
    first, *rest = results["reading"]
    for sentence in (first, *results["cost"]["reading"], *rest):
        console.print(sentence, markup=False, soft_wrap=True)


def headline(results: Results) -> Table:
    """A row per method: every judge that scores, win rate against the baseline by the first, KL, length, seconds."""
    judges = [judge["name"] for judge in results["judges"] if judge["kind"] == "function"]
    on_gpu = any(results["cost"][method]["gpu_seconds"] is not None for method in results["methods"])
    key, unit = ("gpu_seconds", "GPU s") if on_gpu else ("cpu_seconds", "CPU s")
    table = Table("", *judges, "wins", "KL", "tokens", unit, box=None, padding=(0, 2, 0, 0), header_style="bold")
    for method in results["methods"]:
        measures, spent = results["measures"][method], results["cost"][method][key]
        cells = [_estimate(measures[judge]) for judge in judges]
        cells += [_wins(results, method), _number(measures["kl_per_sequence"]), _number(measures["length"])]
        table.add_row(method, *cells, "-" if spent is None else f"{spent:.0f}")
    return table


def _wins(results: Results, method: str) -> str:
    against = results["win_rates"].get(results["headline_judge"], {}).get(method, {})
    entry = against.get(results["baseline"])
    return "-" if entry is None else f"{entry['mean']:.1%}"


def _estimate(measure: Mapping[str, Any]) -> str:
    ends = "" if measure["low"] is None else f" [{measure['low']:.3f}, {measure['high']:.3f}]"
    return f"{measure['mean']:.3f}{ends}"


def _number(measure: Mapping[str, Any]) -> str:
    return f"{measure['mean']:.1f}"
