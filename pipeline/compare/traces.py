"""How the arms came to their ends: saved steps on the reward-KL frontier, learning curves, the reward models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.compare.arms import Arm
from pipeline.compare.gather import Evaluated, Gathered
from pipeline.evaluation.saved import load_reports
from pipeline.tracking import read_metrics

CURVES = (
    "loss",
    "loss/policy_avg",
    "loss/value_avg",
    "objective/scores",
    "objective/kl",
    "policy/entropy_avg",
    "response/length",
    "rewards/accuracies",
    "rewards/margins",
)
"""Metrics of the stages, under their logged names, that are drawn beside the held-out judges."""
POINTS = 60
"""Of a curve, at most."""
RM_EVALUATION = "evaluation.json"


def frontier(gathered: Gathered, judges: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Every arm's KL, judges and score at its saved steps, and at its end by the final evaluation."""
    return {method: [point for each in of for point in _points(each, judges)] for method, of in gathered.of.items()}


def _points(each: Evaluated, judges: Sequence[str]) -> list[dict[str, Any]]:
    saved = load_reports(each.arm.policy)
    points = [
        _point(each.arm.seed, step, saved[step].as_dict(), judges, final=False) for step in sorted(saved)[:-1]
    ]  # the last one is the final policy, which the evaluation measures anew
    last = max(saved, default=each.manifest["metrics"].get("optimizer_steps", 0))
    return [*points, _point(each.arm.seed, last, each.figures["report"], judges, final=True)]


def _point(seed: int, step: int, report: Mapping[str, Any], judges: Sequence[str], *, final: bool) -> dict[str, Any]:
    kl, score = report["kl_per_sequence"], report["score"]
    return {
        "seed": seed,
        "step": step,
        "final": final,
        "kl": kl and kl["mean"],
        "score": score and score["mean"],
        "judges": {name: report["judges"][name]["mean"] for name in judges if name in report["judges"]},
    }


def curves(gathered: Gathered, judges: Sequence[str]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Learning curves of every method by metric: one line per seed, thinned to `POINTS`.

    The held-out `eval/...` come from rows with a judge alone: KTO logs a `kl` of its own, the mismatched answers'.
    """
    held_out = [f"eval/{judge}" for judge in judges]
    names = (*held_out, "eval/kl", *CURVES)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for method, of in gathered.of.items():
        for each in of:
            rows = read_metrics(each.arm.policy)
            judged = [row for row in rows if row.keys() & set(held_out)]
            for name in names:
                from_rows = judged if name.startswith("eval/") else rows
                line = [(row["step"], row[name]) for row in from_rows if isinstance(row.get(name), float)]
                if len(line) > 1:
                    steps, values = zip(*_thinned(line), strict=True)
                    entry = {"seed": each.arm.seed, "steps": list(steps), "values": list(values)}
                    found.setdefault(method, {}).setdefault(name, []).append(entry)
    return found


def _thinned(line: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    if len(line) <= POINTS:
        return list(line)
    return [line[round(place * (len(line) - 1) / (POINTS - 1))] for place in range(POINTS)]


def reward_models(arms: Sequence[Arm], evaluated: Mapping[int, str]) -> list[dict[str, Any]]:
    """Accuracy, calibration and buckets of every reward model; `evaluated` holds their directories by seed."""
    found, seen = [], set()
    for arm in arms:
        directory = evaluated.get(arm.seed)
        if directory is None or directory in seen or not (Path(directory) / RM_EVALUATION).exists():
            continue
        seen.add(directory)
        figures = json.loads((Path(directory) / RM_EVALUATION).read_text(encoding="utf-8"))
        found.append(_reward_model(arm.seed, figures))
    return found


def _reward_model(seed: int, figures: Mapping[str, Any]) -> dict[str, Any]:
    buckets = figures["buckets"]
    unit = "ratings" if buckets["by"] == "rating_gap" else "scores"
    titled = [(f"{unit} at least {entry['gap']:g} apart", entry) for entry in buckets["at_least"]]
    titled += [(f"{unit} {entry['from']:.3g} to {entry['to']:.3g} apart", entry) for entry in buckets["quantiles"]]
    return {
        "seed": seed,
        **{key: figures[key] for key in ("accuracy", "accuracy_low", "accuracy_high", "pairs")},
        "ece": figures["calibration"]["ece"],
        "bins": [
            {key: each[key] for key in ("predicted", "observed", "pairs")} for each in figures["calibration"]["bins"]
        ],
        "buckets": [
            {
                "title": title,
                "accuracy": entry["accuracy"],
                "low": entry["accuracy_low"],
                "high": entry["accuracy_high"],
                "pairs": entry["pairs"],
            }
            for title, entry in titled
        ],
    }
