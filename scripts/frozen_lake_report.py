"""The frozen lake's report: the claim, the order of the methods, their differences, tables, JSON and the picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from pipeline.artifacts import write_json, write_text
from pipeline.evaluation.measures import Estimate
from reward_model.plots import ACCENT, INK, MUTED
from scripts.learn_ppo_report import Claim, Grid
from scripts.learn_ppo_stats import over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER = ("dpo", "ift", "orpo", "sft")
"""Nearest first. Source: Hua et al. 2024 (arXiv:2405.11870), section 5.3, in a figure without numbers."""
MEASURES = ("all states", "states of the optimal walk")
"""Which states the distance is taken over: all that do not end the walk, and those of the optimal walk."""
COLOURS = {"dpo": ACCENT, "ift": INK, "orpo": MUTED, "sft": "black"}


@dataclass(frozen=True)
class Difference:
    """How much farther from the optimal policy `one` ends than `other`, paired by seed."""

    one: str
    other: str
    estimate: Estimate

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.estimate.low > 0 or self.estimate.high < 0


@dataclass(frozen=True)
class Outcome:
    """The experiment.

    Attributes:
        settings: by name, as JSON has them.
        steps: after which the distances were measured; the first is 0, the base.
        distances: per method squared distances, [steps, `MEASURES`, seeds].
        followed: the distance, over the optimal walk's states, of a policy that takes that walk for certain.
    """

    settings: Mapping[str, Any]
    steps: Sequence[int]
    distances: Mapping[str, np.ndarray]
    followed: float

    def final(self, method: str, measure: int) -> np.ndarray:
        """Distances at the end, [seeds]; those of the base for `base`."""
        curves = next(iter(self.distances.values()))[0] if method == "base" else self.distances[method][-1]
        return curves[measure]

    def ranking(self, measure: int) -> list[str]:
        """The methods, nearest first by their means."""
        return sorted(self.distances, key=lambda method: self.final(method, measure).mean())

    def differences(self, measure: int) -> list[Difference]:
        """Of all pairs of methods, the nearer one first, thus negative."""
        pairs = combinations(self.ranking(measure), 2)
        return [Difference(one, other, self._difference(one, other, measure)) for one, other in pairs]

    def claim(self) -> Claim:
        """IFT ends no farther from the optimal policy than SFT, by the mean over the seeds and all states."""
        found = self._difference("ift", "sft", 0)
        text = f"IFT ends no farther from the optimal policy than SFT over {MEASURES[0]}: {_signed(found)}"
        return Claim(found.mean <= 0, text)

    def _difference(self, one: str, other: str, measure: int) -> Estimate:
        return interval(self.final(one, measure) - self.final(other, measure))


def interval(values: np.ndarray) -> Estimate:
    """Mean and Student's 95% interval over seeds, [seeds]. Raises ValueError for a number that has no quantile."""
    found = over_seeds(list(values[:, None]))
    if found is None:
        raise ValueError(f"{len(values)} seeds have no interval")
    return found


def write(out: Path, outcome: Outcome, command: str) -> Claim:
    """Prints the report, writes frozen_lake_MAP.md, .json and .png into `out`, and returns the claim."""
    claim, name = outcome.claim(), f"frozen_lake_{outcome.settings['map']}"
    lines = [f"{'holds' if claim.holds else 'FAILS'}: {claim.text}", *_notes(outcome)]
    grids = [_ranking_grid(outcome), _distance_grid(outcome), *_difference_grids(outcome)]
    console = Console(highlight=False)
    for grid in grids:
        console.print(grid.rich())
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    parts = ["# The frozen lake\n", "".join(f"- {line}\n" for line in lines), *(grid.markdown() for grid in grids)]
    parts += [f"![Distances by step]({name}.png)\n", f"## Command\n\n```console\n$ {command}\n```\n"]
    write_text(out / f"{name}.md", "\n".join(parts))
    write_json(out / f"{name}.json", {"command": command, **numbers(outcome), "claim": asdict(claim)})
    save_curves(out / f"{name}.png", outcome)
    console.print(f"report: {out / name}.md, .json and .png", markup=False, soft_wrap=True)
    return claim


def numbers(outcome: Outcome) -> dict[str, Any]:
    """All figures of the experiment."""
    found: dict[str, Any] = {"settings": dict(outcome.settings), "paper": list(PAPER), "steps": list(outcome.steps)}
    found["followed"] = outcome.followed
    for measure, title in enumerate(MEASURES):
        found[title] = {
            "ranking": outcome.ranking(measure),
            "distances": {
                method: {**interval(values)._asdict(), "each_seed": values.tolist()}
                for method, values in _finals(outcome, measure).items()
            },
            "differences": [
                {"one": d.one, "other": d.other, **d.estimate._asdict(), "told_apart": d.told_apart}
                for d in outcome.differences(measure)
            ],
            "curves": {method: curve[:, measure].mean(-1).tolist() for method, curve in outcome.distances.items()},
        }
    return found


def save_curves(path: Path, outcome: Outcome) -> None:
    """The distance against the step, one panel per measure: means over the seeds with 95% intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.0), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(MEASURES), squeeze=False)[0]
    for measure, axes in enumerate(panels):
        _panel(axes, outcome, measure)
    panels[0].legend(fontsize=8, frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))


def _panel(axes: Axes, outcome: Outcome, measure: int) -> None:
    for method in PAPER:
        points = [interval(values) for values in outcome.distances[method][:, measure]]
        mean, low, high = np.array(points).T
        axes.plot(outcome.steps, mean, color=COLOURS[method], label=method.upper())
        axes.fill_between(outcome.steps, low, high, color=COLOURS[method], alpha=0.15, linewidth=0)
    axes.set(xlabel="steps after the base", ylabel="squared distance to the optimal policy", title=MEASURES[measure])
    axes.title.set_fontsize(10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e9ed", linewidth=0.8)


def _ranking_grid(outcome: Outcome) -> Grid:
    columns = [*(outcome.ranking(measure) for measure in range(len(MEASURES))), PAPER]
    rows = [
        [str(place), *(method.upper() for method in row)] for place, row in enumerate(zip(*columns, strict=True), 1)
    ]
    return Grid("The order, nearest to the optimal policy first", ["place", *MEASURES, "the paper"], rows)


def _distance_grid(outcome: Outcome) -> Grid:
    finals = [_finals(outcome, measure) for measure in range(len(MEASURES))]
    rows = [[name.upper(), *(_plain(interval(values[name])) for values in finals)] for name in finals[0]]
    return Grid("Mean squared distance to the optimal policy, 95% intervals over seeds", ["method", *MEASURES], rows)


def _difference_grids(outcome: Outcome) -> Iterator[Grid]:
    for measure, title in enumerate(MEASURES):
        rows = [
            [f"{d.one.upper()} - {d.other.upper()}", _signed(d.estimate), "yes" if d.told_apart else "no"]
            for d in outcome.differences(measure)
        ]
        yield Grid(
            f"Paired differences over {title}, 95% intervals over seeds", ["pair", "difference", "told apart"], rows
        )


def _notes(outcome: Outcome) -> Iterator[str]:
    for measure, title in enumerate(MEASURES):
        order = outcome.ranking(measure)
        agrees = "the paper's order" if tuple(order) == PAPER else f"not the paper's order, {_order(PAPER)}"
        yield f"Over {title}: {_order(order)}; {agrees}."
        close = [f"{d.one.upper()} and {d.other.upper()}" for d in outcome.differences(measure) if not d.told_apart]
        yield f"Not told apart over {title}: {', '.join(close) or 'no pair'}."
    yield (
        f"A policy that takes the optimal walk for certain is {outcome.followed:.3g} away over its states; that is 0 "
        "where each of them has one best action."
    )
    yield "Each interval is at 95% by itself: among 12 differences one may leave out zero by chance."
    shown = ", ".join(f"{name} {value}" for name, value in outcome.settings.items())
    yield f"Settings: {shown}. The base learnt both walks."
    yield (
        "The order and the claim depend on the sub-optimal walk: with --sub-optimal RRLLDDRDRR on the map 4x4, a way "
        "there and back, IFT ends farther from the optimal policy than SFT."
    )


def _finals(outcome: Outcome, measure: int) -> dict[str, np.ndarray]:
    return {method: outcome.final(method, measure) for method in ("base", *PAPER)}


def _order(methods: Sequence[str]) -> str:
    return " < ".join(method.upper() for method in methods)


def _plain(estimate: Estimate) -> str:
    return f"{estimate.mean:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def _signed(estimate: Estimate) -> str:
    return f"{estimate.mean:+.3g} [{estimate.low:+.3g}, {estimate.high:+.3g}]"
