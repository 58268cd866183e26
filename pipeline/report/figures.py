"""What the figures of a comparison show: frontier, cost against quality, learning curves, the reward model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pipeline.report.detail_tables import bins_table, bucket_table
from pipeline.report.facts import SCORE, Estimate, Facts
from pipeline.report.parts import Cell, Figure, Table
from pipeline.report.svg import (
    ACCENT,
    DASHES,
    INK,
    MARKERS,
    METHOD,
    NARROW,
    PAPER,
    QUIET,
    SMALL,
    WIDE,
    Label,
    Size,
    draw,
    place_labels,
)
from pipeline.report.tables import cost_measure, method_cell, missing, value_cell
from pipeline.report.wording import count, decimals_for, durations, finite, interval, mean_of, number, percent, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOG_FROM = 20.0
"""Ratio of the dearest method to the cheapest from which the cost axis is logarithmic."""
_MODEL_STYLES = [("o", "-"), ("s", (0, (5, 2))), ("^", (0, (2, 1.5))), ("D", (0, (5, 1.5, 1.5, 1.5))), ("v", "-")]


def frontier_figure(facts: Facts, judge: str, *, small: bool) -> Figure | None:
    """What `judge` (or `score`) says against the KL, every method and seed; None where no point has both."""
    lines = {method: _lines(facts, method, judge) for method in facts.methods}
    lines = {method: found for method, found in lines.items() if found}
    if not lines:
        return None
    title = facts.title(judge) if judge == SCORE else facts.judge_title(judge)

    def paint(axes: Axes, size: Size) -> None:
        labels, points = [], []
        for method, found in lines.items():
            colour, slot = METHOD[facts.slots[method]], facts.slots[method]
            for line in found:
                _paint_line(axes, line, slot)
            points += [(kl, value) for line in found for _, _, kl, value in line]
            ends = [line[-1] for line in found]
            middle = [sum(end[place] for end in ends) / len(ends) for place in (2, 3)]
            labels.append(Label(middle[0], middle[1], method, colour))
        axes.margins(0.08, 0.12)
        axes.set_title(title)
        axes.set_xlabel("KL to the reference, nats per response")
        place_labels(axes, labels, points)

    ends = "; ".join(_end_in_words(method, found) for method, found in lines.items())
    return Figure(
        f"frontier-{judge}",
        _frontier_caption(facts, judge, title, small=small),
        f"Scatter plot of {title} against KL. Final policies: {ends}.",
        draw(f"frontier {judge}", paint, [SMALL] if small else [WIDE, NARROW]),
        _frontier_table(facts, judge, title),
        tuple(lines),
    )


def _frontier_caption(facts: Facts, judge: str, title: str, *, small: bool) -> str:
    if facts.is_trained_on(judge):
        return "The same by the reward model that PPO was trained on: it cannot say which method is better."
    if small:
        return f"The same by {title}."
    seeds = "Each line is one seed" if len(facts.seeds) > 1 else "Each line is the one seed"
    return (
        f"{title} against the KL to the reference. {seeds} over its saved steps; the large marker is the final policy. "
        "Higher at the same KL is better."
    )


def _lines(facts: Facts, method: str, judge: str) -> list[list[tuple[int, int, float, float]]]:
    """Per seed: (seed, step, KL, value) in the order of steps."""
    rows = []
    for point in facts.points(method):
        value = finite(point.get("score") if judge == SCORE else (point.get("judges") or {}).get(judge))
        kl = finite(point["kl"])
        if value is not None and kl is not None:
            rows.append((point["seed"], point["step"], kl, value))
    return [list(group) for _, group in groupby(rows, key=lambda row: row[0])]


def _paint_line(axes: Axes, line: Sequence[tuple[int, int, float, float]], slot: int) -> None:
    x, y = [row[2] for row in line], [row[3] for row in line]
    colour, marker = METHOD[slot], MARKERS[slot]
    axes.plot(x, y, color=colour, linestyle=DASHES[slot], linewidth=1.3, alpha=0.6, zorder=2)
    axes.plot(x[:-1], y[:-1], linestyle="", marker=marker, markersize=3.5, color=colour, alpha=0.75, zorder=2)
    axes.plot(
        x[-1:], y[-1:], linestyle="", marker=marker, markersize=9.5, color=colour, markeredgecolor=PAPER, zorder=3
    )


def _end_in_words(method: str, lines: Sequence[Sequence[tuple[int, int, float, float]]]) -> str:
    kl, value = mean_of(line[-1][2] for line in lines), mean_of(line[-1][3] for line in lines)
    return f"{method} {number(value or 0.0, 3)} at {number(kl or 0.0, 2)} nats"


def _frontier_table(facts: Facts, judge: str, title: str) -> Table:
    rows = []
    for method in facts.methods:
        for line in _lines(facts, method, judge):
            for place, (seed, step, kl, value) in enumerate(line):
                state = "final" if place == len(line) - 1 else "saved"
                cells = [Cell(str(seed), tone="number"), Cell(count(step), tone="number"), Cell(state)]
                rows.append([method_cell(method), *cells, value_cell(kl, _three), value_cell(value, _three)])
    return Table(
        f"frontier-{judge}-data",
        f"Numbers of this figure: {title} and KL by step",
        ["method", "seed", "step", "policy", "KL, nats", title],
        rows,
    )


def _three(value: float) -> str:
    return number(value, 3)


def cost_figure(facts: Facts) -> Figure | None:
    """A judge that scores, the headline one where it does, against cost; the shared start is a line."""
    scoring = [name for name in (facts.headline, *facts.gold) if name is not None and facts.measured(name)]
    judge = next(iter(scoring), None)
    key, unit = cost_measure(facts)
    if judge is None:
        return None
    spent = {method: finite(facts.section("cost").get(method, {}).get(key)) for method in facts.methods}
    spent = {m: value for m, value in spent.items() if value is not None and m != facts.baseline}
    known = {method: (spent[method], facts.estimate(method, judge)) for method in spent}
    points = {method: (cost, found) for method, (cost, found) in known.items() if found is not None}
    if not points:
        return None
    start = facts.estimate(facts.baseline, judge)

    def paint(axes: Axes, size: Size) -> None:
        _paint_costs(axes, facts, points, start)
        axes.set_title(judge)
        axes.set_xlabel(f"{unit} beyond {facts.baseline}, per seed")

    form = durations(spent.values())
    words = [f"{m} {number(found.mean, 3)} for {form(cost)}" for m, (cost, found) in points.items()]
    base = "" if start is None else f" {facts.baseline} itself has {number(start.mean, 3)}."
    return Figure(
        "cost-quality",
        f"{judge} against {unit} spent after {facts.baseline}, per seed; whiskers are 95% intervals. The line is "
        f"{facts.baseline}, where all start. Further up is better, further left is cheaper.",
        f"Scatter plot of {judge} against {unit}: {'; '.join(words)}.{base}",
        draw("cost quality", paint, [WIDE, NARROW]),
        _cost_data(facts, points, unit, judge),
        tuple(points) if start is None else (facts.baseline, *points),
    )


def _paint_costs(
    axes: Axes, facts: Facts, points: Mapping[str, tuple[float, Estimate]], start: Estimate | None
) -> None:
    covered, labels = [], []
    costs = [cost for cost, _ in points.values()]
    if min(costs) > 0 and max(costs) / min(costs) > _LOG_FROM:
        axes.set_xscale("log")
    if start is not None:
        colour = METHOD[facts.slots[facts.baseline]]
        axes.axhline(start.mean, color=colour, linewidth=1.5, linestyle=(0, (5, 3)))
        if start.low is not None and start.high is not None:
            axes.axhspan(start.low, start.high, color=colour, alpha=0.13, linewidth=0)
    for method, (cost, found) in points.items():
        slot = facts.slots[method]
        low, high = found.low, found.high
        if low is not None and high is not None:
            axes.plot([cost, cost], [low, high], color=METHOD[slot], linewidth=1.6)
            covered += [(cost, low + share * (high - low) / 4) for share in range(5)]
        covered.append((cost, found.mean))
        marker = MARKERS[slot]
        axes.plot(
            [cost], [found.mean], marker=marker, markersize=11, color=METHOD[slot], markeredgecolor=PAPER, zorder=3
        )
        labels.append(Label(cost, found.mean, method, METHOD[slot]))
    axes.margins(0.14, 0.14)
    _time_axis(axes, costs)
    place_labels(axes, labels, covered)


def _time_axis(axes: Axes, costs: Sequence[float]) -> None:
    """Ticks in the unit of the dearest method, so that they are round numbers of it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullFormatter, NullLocator

    unit, name = next((u, n) for u, n in ((3600.0, "h"), (60.0, "min"), (1.0, "s")) if max(costs) >= 1.5 * u or u == 1)
    logarithmic = axes.get_xscale() == "log"
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value / unit, 3):g} {name}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if logarithmic:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axes.xaxis.set_minor_locator(NullLocator())
        return
    longest = max(costs) / unit
    steps = (base * 10.0**power for power in range(-9, 9) for base in (1, 2, 5))
    axes.xaxis.set_major_locator(MultipleLocator(unit * next(step for step in steps if longest / step <= 6)))
    axes.set_xlim(0, max(costs) * 1.15 or 1.0)


def _cost_data(facts: Facts, points: Mapping[str, tuple[float, Estimate]], unit: str, judge: str) -> Table:
    form = facts.form(judge)
    rows = [
        [
            method_cell(method),
            value_cell(cost, durations(cost for cost, _ in points.values())),
            Cell(form(found.mean), interval(found.low, found.high, form), "number"),
        ]
        for method, (cost, found) in points.items()
    ]
    return Table("cost-quality-data", f"Numbers of this figure: {unit} and {judge}", ["method", unit, judge], rows)


def curve_figure(facts: Facts, metric: str) -> Figure:
    """One metric over the steps of every method that logs it, a line a seed."""
    curves: dict[str, list[Mapping[str, Any]]] = {
        method: facts.section("curves")[method][metric]
        for method in facts.methods
        if facts.section("curves").get(method, {}).get(metric)
    }

    def paint(axes: Axes, size: Size) -> None:
        for method, lines in curves.items():
            slot = facts.slots[method]
            for line in lines:
                steps, values = _finite_line(line)
                axes.plot(steps, values, color=METHOD[slot], linestyle=DASHES[slot], linewidth=1.4, alpha=0.8)
                axes.plot(steps[-1:], values[-1:], linestyle="", marker=MARKERS[slot], markersize=6, color=METHOD[slot])
        axes.set_title(metric)
        axes.set_xlabel("step")

    return Figure(
        f"curve-{metric}",
        "",
        f"Line plot of {metric} over steps for {', '.join(curves)}; first and last values stand in the table.",
        draw(f"curve {metric}", paint, [SMALL]),
        _curve_data(metric, curves),
    )


def _finite_line(line: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    pairs = zip(line["steps"], line["values"], strict=True)
    known = [(float(step), value) for step, each in pairs if (value := finite(each)) is not None]
    return [step for step, _ in known], [value for _, value in known]


def _curve_data(metric: str, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    rows = []
    for method, lines in curves.items():
        for line in lines:
            steps, values = _finite_line(line)
            if not values:
                rows.append([method_cell(method), Cell(str(line["seed"])), *[missing("no finite value")] * 5])
                continue
            places = decimals_for(values)
            cells = [number(value, places) for value in (values[0], min(values), max(values), values[-1])]
            row = [Cell(text, tone="number") for text in (str(line["seed"]), count(steps[-1]), *cells)]
            rows.append([method_cell(method), *row])
    header = ["method", "seed", "last step", "first", "lowest", "highest", "last"]
    return Table(f"curve-{metric}-data", f"Numbers of this figure: {metric}", header, rows)


def calibration_figure(models: Sequence[Mapping[str, Any]]) -> Figure:
    """Predicted against observed preference, a line a reward model."""

    def paint(axes: Axes, size: Size) -> None:
        axes.plot([0.5, 1], [0.5, 1], color=QUIET, linestyle=(0, (4, 3)), linewidth=1)
        axes.annotate("perfect", (0.97, 0.97), (-6, 4), textcoords="offset points", ha="right", color=QUIET)
        for place, model in enumerate(models):
            marker, dash = _MODEL_STYLES[place % len(_MODEL_STYLES)]
            pairs = [(finite(b.get("predicted")), finite(b.get("observed"))) for b in model.get("bins") or []]
            known = [(x, y) for x, y in pairs if x is not None and y is not None]
            axes.plot(
                [x for x, _ in known],
                [y for _, y in known],
                marker=marker,
                linestyle=dash,
                color=ACCENT if place == 0 else INK,
                alpha=1 if place < 2 else 0.6,
                linewidth=1.4,
                label=f"seed {model['seed']}",
            )
        axes.set_title("observed: how often it is the better one")
        axes.set_xlabel("predicted probability of the higher-scored answer")
        if len(models) > 1:
            axes.legend(frameon=False, loc="lower right")

    errors = "; ".join(
        f"seed {m['seed']}: calibration error {shown(m.get('ece'), lambda v: number(v, 3))}" for m in models
    )
    table = bins_table(models[0]) if len(models) == 1 else _joined([bins_table(model) for model in models], models)
    return Figure(
        "calibration",
        "Calibration: how often the answer with the higher score is the better one, against what the score says. "
        "On the dashed line the reward model is as sure as it may be.",
        f"Line plot of observed against predicted preference. {errors}.",
        draw("calibration", paint, [SMALL]),
        table,
    )


def bucket_figure(models: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Accuracy by margin: a row a bucket, a marker a reward model; None without buckets."""
    titles = list(dict.fromkeys(bucket["title"] for model in models for bucket in model.get("buckets") or []))
    if not titles:
        return None

    def paint(axes: Axes, size: Size) -> None:
        for place, model in enumerate(models):
            marker = _MODEL_STYLES[place % len(_MODEL_STYLES)][0]
            colour = ACCENT if place == 0 else INK
            for bucket in model.get("buckets") or []:
                accuracy, low, high = (finite(bucket.get(key)) for key in ("accuracy", "low", "high"))
                if accuracy is None:
                    continue
                row = titles.index(bucket["title"]) + 0.22 * (place - (len(models) - 1) / 2)
                if low is not None and high is not None:
                    axes.plot([low, high], [row, row], color=colour, linewidth=1.6)
                axes.plot([accuracy], [row], marker=marker, color=colour, markersize=6, linestyle="")
        axes.axvline(0.5, color=QUIET, linestyle=(0, (4, 3)), linewidth=1)
        axes.set_yticks(range(len(titles)), [_broken(title) for title in titles])
        axes.set_ylim(len(titles) - 0.5, -0.5)
        axes.set_title("accuracy, 95% interval", x=0)
        axes.xaxis.set_major_formatter(_percent_ticks())

    table = bucket_table(models[0]) if len(models) == 1 else _joined([bucket_table(model) for model in models], models)
    words = [f"{row[0].text}: {' '.join(cell.text for cell in row[1:-1])}" for row in table.rows]
    return Figure(
        "buckets",
        "Accuracy on held-out pairs by how far apart the two answers are; the dashed line is a coin toss."
        + (" Markers are those of the seeds in the calibration plot." if len(models) > 1 else ""),
        f"Dot plot of accuracy by margin. {'; '.join(words)}.",
        draw("buckets", paint, [Size(SMALL.width, max(200, 60 + 46 * len(titles)), "any")]),
        table,
    )


def _broken(title: str) -> str:
    """A long row title in two lines."""
    middle = len(title) // 2
    spaces = [place for place, sign in enumerate(title) if sign == " "]
    if len(title) < 18 or not spaces:
        return title
    cut = min(spaces, key=lambda place: abs(place - middle))
    return f"{title[:cut]}\n{title[cut + 1 :]}"


def _percent_ticks() -> Callable[[float, float], str]:
    return lambda value, _: percent(value).replace(".0%", "%")


def _joined(tables: Sequence[Table], models: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [Cell(f"seed {model['seed']}"), *row] for table, model in zip(tables, models, strict=True) for row in table.rows
    ]
    first = tables[0]
    return Table(first.name, first.caption.partition(",")[0], ["reward model", *first.header], rows)
