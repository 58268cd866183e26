"""The tables of the headline, the contests and the ranking."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pipeline.report.facts import KL, LENGTH, Estimate, Facts, significance
from pipeline.report.parts import Cell, Table
from pipeline.report.wording import (
    NO_INTERVAL,
    NOT_MEASURED,
    counted,
    durations,
    finite,
    interval,
    number,
    p_value,
    percent,
    percent_interval,
    shown,
)

ABOVE, BELOW, EVEN = "\N{BLACK UP-POINTING TRIANGLE}", "\N{BLACK DOWN-POINTING TRIANGLE}", "\N{ALMOST EQUAL TO}"
_STEPS = (0.05, 0.15, 0.3)
"""Distance from 0.5 at which the tint of a win rate deepens."""


def missing(text: str = NOT_MEASURED) -> Cell:
    """A cell that says what is not there."""
    return Cell(text, tone="missing")


def method_cell(method: str) -> Cell:
    """The head of a method's row."""
    return Cell(method, method=method)


def value_cell(value: object, form: Callable[[float], str], absent: str = NOT_MEASURED) -> Cell:
    """A number on its own."""
    known = finite(value)
    return missing(absent) if known is None else Cell(form(known), tone="number")


def estimate_cell(found: Estimate | None, form: Callable[[float], str]) -> Cell:
    """A mean with its interval below."""
    if found is None:
        return missing()
    return Cell(form(found.mean), interval(found.low, found.high, form), "number")


def bars(found: Iterable[Estimate | None]) -> list[tuple[float, float | None, float | None] | None]:
    """Means and ends as shares of the range that all of them span, with a margin."""
    estimates = list(found)
    known = [value for one in estimates if one for value in (one.mean, one.low, one.high) if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    reach = (high - low) * 1.1 or 1.0
    start = (low + high - reach) / 2

    def share(value: float | None) -> float | None:
        return None if value is None else round((value - start) / reach, 4)

    return [(share(one.mean) or 0.0, share(one.low), share(one.high)) if one else None for one in estimates]


def headline_table(facts: Facts) -> Table:
    """One row a method: gold judge, win rates against the baseline, KL, length, cost, and the verdict in words."""
    columns = [column for column in _headline_columns(facts) if column[1]]
    rows = []
    for place, method in enumerate(facts.methods):
        rows.append([method_cell(method), *(cells[place] for _, cells in columns)])
    key, title = cost_measure(facts)
    notes = [f"{title} is per seed and begins after {facts.baseline}, whose own row is its stage."]
    if not has_cost(facts, key):
        notes = ["No cost was recorded."]
    if any(cell.note == NO_INTERVAL for row in rows for cell in row):
        notes.append("No interval: there are too few seeds or prompts for one.")
    return Table(
        "headline",
        f"Each method on the same held-out prompts, mean of {counted(len(facts.seeds), 'seed')} with 95% intervals",
        ["method", *(title for title, _ in columns)],
        rows,
        stacks=True,
        notes=notes,
    )


def _headline_columns(facts: Facts) -> list[tuple[str, list[Cell]]]:
    judge, base = facts.headline, facts.baseline
    columns: list[tuple[str, list[Cell]]] = []
    if judge is not None and facts.measured(judge):
        found = [facts.estimate(method, judge) for method in facts.methods]
        cells = [estimate_cell(one, facts.form(judge)) for one in found]
        drawn = zip(cells, bars(found), strict=True)
        columns.append((judge, [Cell(cell.text, cell.note, cell.tone, bar=bar) for cell, bar in drawn]))
    if judge is not None:
        contests = [facts.win_rate(judge, method, base) for method in facts.methods]
        columns.append((f"win rate against {base}", _against_baseline(facts, contests, _rate_cell)))
        if any(contest.get("length_controlled") for contest in contests):
            columns.append(("length-controlled", _against_baseline(facts, contests, _controlled_cell)))
    for measure, title in ((KL, "KL, nats"), (LENGTH, "length, tokens")):
        if facts.measured(measure):
            form = facts.form(measure)
            columns.append((title, [estimate_cell(facts.estimate(m, measure), form) for m in facts.methods]))
    key, title = cost_measure(facts)
    costs = [facts.section("cost").get(method, {}).get(key) for method in facts.methods]
    if has_cost(facts, key):
        columns.append((title, [value_cell(cost, durations(costs)) for cost in costs]))
    columns.append(("verdict", [Cell(facts.verdict(method), tone="words") for method in facts.methods]))
    return columns


def cost_measure(facts: Facts) -> tuple[str, str]:
    """The cost that methods are held against: GPU time where every method has it, else CPU time."""
    costs = [facts.section("cost").get(method, {}) for method in facts.methods]
    if costs and all(finite(cost.get("gpu_seconds")) for cost in costs):
        return "gpu_seconds", "GPU time"
    return "cpu_seconds", "CPU time"


def has_cost(facts: Facts, key: str) -> bool:
    """Whether any method's cost has a number under `key`."""
    return any(finite(facts.section("cost").get(method, {}).get(key)) is not None for method in facts.methods)


def _against_baseline(
    facts: Facts, contests: Sequence[Mapping[str, Any]], cell: Callable[[Mapping[str, Any]], Cell]
) -> list[Cell]:
    pairs = zip(facts.methods, contests, strict=True)
    return [Cell("baseline", tone="missing") if m == facts.baseline else cell(contest) for m, contest in pairs]


def _rate_cell(contest: Mapping[str, Any]) -> Cell:
    if finite(contest.get("mean")) is None:
        return missing("not compared")
    return Cell(percent(contest["mean"]), percent_interval(contest.get("low"), contest.get("high")), "number")


def _controlled_cell(contest: Mapping[str, Any]) -> Cell:
    found = contest.get("length_controlled")
    if not found or finite(found.get("rate")) is None:
        return missing()
    return Cell(percent(found["rate"]), percent_interval(found.get("low"), found.get("high")), "number")


def win_matrix(facts: Facts, judge: str) -> Table:
    """Who beats whom before a judge; significance is a sign beside the number, the tint only follows it."""
    rows = []
    for ours in facts.methods:
        cells = [_matrix_cell(facts, judge, ours, theirs) for theirs in facts.methods]
        rows.append([method_cell(ours), *cells])
    return Table(
        f"wins-{judge}",
        f"{facts.judge_title(judge)}: share of contests that the row's method wins against the column's, ties half",
        ["", *facts.methods],
        rows,
        notes=[
            f"{ABOVE} wins more often and {BELOW} less often than it loses, p < 0.05 after Holm; "
            f"{EVEN} no significant difference. 95% intervals in brackets."
        ],
    )


def _matrix_cell(facts: Facts, judge: str, ours: str, theirs: str) -> Cell:
    if ours == theirs:
        return Cell("\N{EN DASH}", tone="self")
    contest = facts.win_rate(judge, ours, theirs)
    mean = finite(contest.get("mean"))
    if mean is None:
        return missing("not compared")
    sign = significance(contest, 0.5)
    deep = sum(abs(mean - 0.5) >= step for step in _STEPS)
    tone = f"{'win' if mean > 0.5 else 'lose'}{deep}" if deep else "even"
    mark = {1: ABOVE, -1: BELOW, 0: EVEN}[sign]
    tested = finite(contest.get("p_holm")) is not None or finite(contest.get("p")) is not None
    ends = percent_interval(contest.get("low"), contest.get("high"))
    return Cell(f"{percent(mean)} {mark if tested else ''}".strip(), ends, f"rate {tone}{' sure' if sign else ''}")


def contest_table(facts: Facts, judge: str) -> Table:
    """Every pair of methods once: win rate, length control, p-values, and what they say in words."""
    rows = []
    for place, ours in enumerate(facts.methods):
        for theirs in facts.methods[:place]:
            contest = facts.win_rate(judge, ours, theirs)
            if not contest:
                continue
            rows.append(
                [
                    Cell(f"{ours} against {theirs}", method=ours),
                    _rate_cell(contest),
                    _controlled_cell(contest),
                    Cell(p_value(contest.get("p")), tone="number"),
                    Cell(p_value(contest.get("p_holm")), tone="number"),
                    Cell(contest.get("says") or "not tested", tone="words"),
                ]
            )
    header = ["contest", "win rate", "length-controlled", "p", "p, Holm", "in words"]
    return Table(f"contests-{judge}", f"Contests before {facts.judge_title(judge)}", header, rows)


def difference_table(facts: Facts, judge: str) -> Table:
    """Every method minus the baseline by a pointwise judge."""
    found = facts.section("differences").get(judge, {})
    form = facts.form(judge)
    rows = []
    for method, difference in found.items():
        per_seed = [value for value in map(finite, difference.get("per_seed") or []) if value is not None]
        ends = interval(difference.get("low"), difference.get("high"), lambda value: signed(value, form))
        rows.append(
            [
                method_cell(method),
                Cell(shown(difference.get("mean"), lambda value: signed(value, form)), ends, "number"),
                Cell(p_value(difference.get("p")), tone="number"),
                Cell(p_value(difference.get("p_holm")), tone="number"),
                Cell(" / ".join(signed(value, form) for value in per_seed) or NOT_MEASURED, tone="number"),
                Cell(difference.get("says") or "not tested", tone="words"),
            ]
        )
    title = f"{facts.judge_title(judge)}: method minus {facts.baseline}, the same prompts"
    return Table(f"differences-{judge}", title, ["method", "difference", "p", "p, Holm", "each seed", "in words"], rows)


def signed(value: float, form: Callable[[float], str]) -> str:
    """A difference with its sign, plus included."""
    return f"+{form(value)}" if value > 0 else form(value)


def elo_table(facts: Facts, judge: str) -> Table:
    """Bradley-Terry strengths as Elo, best first."""
    ranked = facts.section("ranking").get(judge) or []
    ends = [_elo(row) for row in ranked]
    rows = []
    for row, found, bar in zip(ranked, ends, bars(ends), strict=True):
        place = Cell(shown(row.get("strength"), lambda value: number(value, 3), "none"), tone="number")
        text = shown(row.get("elo"), lambda value: number(value, 0), "none")
        brackets = interval(row.get("low"), row.get("high"), lambda value: number(value, 0))
        rows.append([method_cell(row["method"]), Cell(text, brackets, "number", bar=bar if found else None), place])
    caption = (
        f"{facts.judge_title(judge)}: Elo from a Bradley-Terry fit to all contests, {facts.baseline} at 1000, "
        "95% intervals"
    )
    return Table(f"elo-{judge}", caption, ["method", "Elo", "strength (natural log)"], rows)


def _elo(row: Mapping[str, Any]) -> Estimate | None:
    elo = finite(row.get("elo"))
    return None if elo is None else Estimate(elo, finite(row.get("low")), finite(row.get("high")), ())
