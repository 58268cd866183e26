"""The tables of costs, of every measure, of the reward model, and of what the run was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.report.facts import Facts
from pipeline.report.parts import Cell, Table
from pipeline.report.tables import estimate_cell, has_cost, method_cell, missing, value_cell
from pipeline.report.wording import (
    NOT_MEASURED,
    count,
    counted,
    durations,
    finite,
    gib,
    listed,
    number,
    percent,
    percent_interval,
    plain,
    shown,
)

_SPENT = {
    "wall_seconds": ("wall time", NOT_MEASURED),
    "cpu_seconds": ("CPU time", NOT_MEASURED),
    "gpu_seconds": ("GPU time", "no GPU used"),
    "peak_memory_gib": ("peak memory", NOT_MEASURED),
    "peak_gpu_memory_gib": ("peak GPU memory", "no GPU used"),
}
_COUNTED = {
    "generated_tokens": "generated tokens",
    "trained_tokens": "trained tokens",
    "optimizer_steps": "optimiser steps",
    "models_in_memory": "models in memory",
}
_ARROWS = {"higher": "higher is better", "lower": "lower is better"}


def cost_table(facts: Facts) -> Table:
    """What each method spent beyond the shared start, and what is in memory while it trains."""
    costs = facts.section("cost")
    spent = [key for key in _SPENT if has_cost(facts, key)]
    forms = {key: _spent_form(facts, key) for key in spent}
    counted_keys = [key for key in _COUNTED if facts.measured(key)]
    priced = has_cost(facts, "money")
    rows = []
    for method in facts.methods:
        cost = costs.get(method, {})
        row = [method_cell(method), Cell(" + ".join(cost.get("stages") or []) or NOT_MEASURED)]
        row += [_spent_cell(cost, key, forms[key]) for key in spent]
        row += [_counted_cell(facts, method, key) for key in counted_keys]
        rows.append([*row, *([_money_cell(cost)] if priced else [])])
    header = ["method", "stages", *(_SPENT[key][0] for key in spent), *(_COUNTED[key] for key in counted_keys)]
    notes = [
        "A second line gives the method's own stage where the total holds more than that.",
        "Tokens and steps are those of the method's own stage. Of the peaks the highest counts, over stages and seeds.",
    ]
    if not priced:
        notes.append("No money: the recipe names no price per hour (compare.price_per_hour).")
    title = f"Cost per seed beyond the shared start, mean of {counted(len(facts.seeds), 'seed')}"
    return Table("cost-table", title, [*header, *(["money"] if priced else [])], rows, stacks=True, notes=notes)


def _spent_form(facts: Facts, key: str) -> Callable[[float], str]:
    costs = [facts.section("cost").get(method, {}) for method in facts.methods]
    return durations(cost.get(key) for cost in costs) if key.endswith("seconds") else gib


def _spent_cell(cost: Mapping[str, Any], key: str, form: Callable[[float], str]) -> Cell:
    total, own = finite(cost.get(key)), finite((cost.get("own") or {}).get(key))
    if total is None:
        return missing(_SPENT[key][1])
    differs = own is not None and len(cost.get("stages") or []) > 1
    return Cell(form(total), f"own {form(own)}" if differs and own is not None else "", "number")


def _counted_cell(facts: Facts, method: str, key: str) -> Cell:
    found = facts.estimate(method, key)
    return value_cell(found.mean if found else None, count, "none" if key == "generated_tokens" else NOT_MEASURED)


def _money_cell(cost: Mapping[str, Any]) -> Cell:
    return value_cell(cost.get("money"), lambda value: number(value, 2 if value >= 1 else 4))


def judge_cost_table(facts: Facts) -> Table | None:
    """What judges that are asked over a network have cost; None where no judge has a bill."""
    bills = {name: bill for name, bill in (facts.section("cost").get("judges") or {}).items() if bill}
    keys = list(dict.fromkeys(key for bill in bills.values() for key in bill))
    if not keys:
        return None
    rows = [[Cell(name), *(_bill_cell(bill.get(key)) for key in keys)] for name, bill in bills.items()]
    header = ["judge", *(key.replace("_", " ") for key in keys)]
    return Table("judge-costs", "What the judges have cost", header, rows)


def _bill_cell(value: object) -> Cell:
    return missing() if value is None else Cell(plain(value), tone="number" if finite(value) is not None else "")


def judge_table(facts: Facts) -> Table:
    """The judges, and whether a method was trained on what they say."""
    rows = []
    for name, judge in facts.judges.items():
        role = "trained on: never the headline" if facts.is_trained_on(name) else "independent"
        headline = " (headline)" if name == facts.headline else ""
        details = plain({key.replace("_", " "): value for key, value in (judge.get("details") or {}).items()})
        rows.append(
            [
                Cell(name),
                Cell(str(judge["kind"]).replace("_", " ")),
                Cell(f"{role}{headline}"),
                _judge_cell(judge, details),
            ]
        )
    return Table("judges", "The judges", ["judge", "kind", "role", "what it is"], rows, stacks=True)


def _judge_cell(judge: Mapping[str, Any], details: str) -> Cell:
    return Cell(judge.get("about") or "no description", details, "words")


def measure_table(facts: Facts) -> Table:
    """Every measure of every method with its interval."""
    rows = []
    for name in facts.measures:
        form = facts.form(name)
        note = facts.note(name)
        about = ", ".join(part for part in (note.get("unit"), _ARROWS.get(note.get("better") or "")) if part)
        cells = [estimate_cell(facts.estimate(method, name), form) for method in facts.methods]
        cells = [_without_note(cell) if name not in _with_intervals(facts) else cell for cell in cells]
        rows.append([Cell(facts.title(name), about), *cells])
    title = f"Every measure, mean of {counted(len(facts.seeds), 'seed')}; 95% intervals in brackets where there are any"
    return Table("measure-table", title, ["measure", *facts.methods], rows)


def _with_intervals(facts: Facts) -> set[str]:
    found = {(m, name): facts.estimate(m, name) for m in facts.methods for name in facts.measures}
    return {name for (_, name), one in found.items() if one and one.low is not None}


def _without_note(cell: Cell) -> Cell:
    return Cell(cell.text, tone=cell.tone)


def seed_table(facts: Facts) -> Table:
    """Every measure of every seed."""
    rows = []
    for name in facts.measures:
        form = facts.form(name)
        cells = []
        for method in facts.methods:
            found = facts.estimate(method, name)
            values = [shown(value, form, "-") for value in found.per_seed] if found else []
            cells.append(Cell(" / ".join(values), tone="number") if values else missing())
        rows.append([Cell(facts.title(name)), *cells])
    title = f"Seed by seed: {listed(f'seed {seed}' for seed in facts.seeds)}, in this order"
    return Table("seed-table", title, ["measure", *facts.methods], rows)


def measure_notes(facts: Facts) -> list[tuple[str, str]]:
    """What each measure is and which estimator it has."""
    notes = [(name, facts.note(name).get("explains")) for name in facts.measures]
    return [(facts.title(name), explains) for name, explains in notes if explains]


def reward_model_table(models: Sequence[Mapping[str, Any]]) -> Table:
    """Accuracy and calibration error of each reward model on held-out pairs."""
    rows = []
    for model in models:
        ends = percent_interval(model.get("accuracy_low"), model.get("accuracy_high"))
        accuracy = finite(model.get("accuracy"))
        rows.append(
            [
                Cell(f"seed {model['seed']}"),
                missing() if accuracy is None else Cell(percent(accuracy), ends, "number"),
                value_cell(model.get("ece"), lambda value: number(value, 3)),
                value_cell(model.get("pairs"), count),
            ]
        )
    header = ["reward model", "accuracy", "calibration error (ECE)", "pairs"]
    return Table("reward-model-table", "Reward models on held-out pairs, 95% intervals", header, rows)


def bins_table(model: Mapping[str, Any]) -> Table:
    """The calibration plot's numbers."""
    rows = [
        [
            Cell(shown(each.get("predicted"), lambda value: number(value, 3), "none"), tone="number"),
            value_cell(each.get("observed"), lambda value: number(value, 3)),
            value_cell(each.get("pairs"), count),
        ]
        for each in model.get("bins") or []
    ]
    caption = f"Calibration, seed {model['seed']}"
    return Table(f"bins-{model['seed']}", caption, ["predicted", "observed", "pairs"], rows)


def bucket_table(model: Mapping[str, Any]) -> Table:
    """Accuracy by how far apart the two answers are."""
    rows = []
    for bucket in model.get("buckets") or []:
        accuracy = finite(bucket.get("accuracy"))
        ends = percent_interval(bucket.get("low"), bucket.get("high"))
        cell = missing() if accuracy is None else Cell(percent(accuracy), ends, "number")
        rows.append([Cell(bucket["title"]), cell, value_cell(bucket.get("pairs"), count)])
    caption = f"Accuracy by margin, seed {model['seed']}"
    return Table(f"buckets-{model['seed']}", caption, ["pairs whose", "accuracy", "pairs"], rows)


def external_tables(facts: Facts) -> list[Table]:
    """lm-eval results: one table, tasks and metrics by method."""
    external = {method: rows for method, rows in facts.section("external").items() if rows}
    flat = {method: dict(_flat(rows)) for method, rows in external.items()}
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    if not keys:
        return []
    rows = [[Cell(key), *(_plain_cell(values.get(key)) for values in flat.values())] for key in keys]
    return [Table("external-table", "Results of lm-evaluation-harness", ["task and metric", *flat], rows)]


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested mappings with their joined keys; `{"value", "stderr"}` is one leaf."""
    if not isinstance(value, Mapping):
        return [(path, value)]
    if "value" in value:
        spread = finite(value.get("stderr"))
        text = plain(value["value"]) + (f" ({plain(spread)} standard error)" if spread is not None else "")
        return [(path, text)]
    return [leaf for key, item in value.items() for leaf in _flat(item, f"{path}, {key}" if path else str(key))]


def _plain_cell(value: object) -> Cell:
    return missing() if value is None else Cell(plain(value), tone="number")


def hash_table(facts: Facts) -> Table:
    """sha256 of the data, the tokenizer, the recipe and the held-out prompts."""
    hashes = facts.section("hashes")
    found = [(f"data: {key}", value) for key, value in (hashes.get("data") or {}).items()]
    found.append(("tokenizer", hashes.get("tokenizer")))
    found.append(("recipe", facts.results.get("recipe_sha256")))
    found.append(("held-out prompts", facts.section("sampling").get("prompts_sha256")))
    return Table("hash-table", "What went in", ["what", "sha256"], [_hash_row(what, value) for what, value in found])


def weights_table(facts: Facts) -> Table | None:
    """sha256 of every policy's weights; None where there are none."""
    weights = facts.section("hashes").get("weights") or {}
    found = [
        (f"{method}, seed {seed}", value)
        for method, of_method in weights.items()
        for seed, value in zip(facts.seeds, of_method, strict=False)
    ]
    rows = [_hash_row(what, value) for what, value in found]
    return Table("weights-table", "Weights of the policies", ["policy", "sha256"], rows) if rows else None


def _hash_row(what: str, value: object) -> list[Cell]:
    return [Cell(what), Cell(str(value), tone="code") if value else missing("not recorded")]


def run_terms(facts: Facts) -> list[tuple[str, str]]:
    """Command, device, times, code and package versions."""
    run = facts.section("run")
    pairs = [(key, plain(run[key])) for key in ("command", "started", "finished", "device", "code") if run.get(key)]
    packages = run.get("packages") or {}
    listing = ", ".join(f"{name} {version}" for name, version in packages.items())
    return [*pairs, *([("packages", listing)] if listing else [])]
