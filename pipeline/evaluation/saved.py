"""Held-out evaluations that a stage keeps while it trains: `evaluation/update_<n>.json` of its directory."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.artifacts import write_json
from pipeline.evaluation.policy_eval import PolicyReport

FOLDER = "evaluation"


def save_report(out: Path, update: int, report: PolicyReport) -> None:
    """Keeps a report with its samples as `evaluation/update_<n>.json`."""
    (out / FOLDER).mkdir(exist_ok=True)
    write_json(out / FOLDER / f"update_{update:06d}.json", {**report.as_dict(), "rows": report.rows})


def load_report(out: Path, update: int) -> PolicyReport:
    """Reads what `save_report` wrote."""
    text = (out / FOLDER / f"update_{update:06d}.json").read_text(encoding="utf-8")
    return PolicyReport.from_dict(json.loads(text))


def load_reports(out: Path) -> dict[int, PolicyReport]:
    """All reports of a stage by update or optimiser step, in order: the start's, those on the way, the final one."""
    updates = sorted(int(file.stem.rpartition("_")[2]) for file in (out / FOLDER).glob("update_*.json"))
    return {update: load_report(out, update) for update in updates}


def has_report(out: Path, update: int) -> bool:
    """Whether `save_report` has written one for this update."""
    return (out / FOLDER / f"update_{update:06d}.json").exists()
