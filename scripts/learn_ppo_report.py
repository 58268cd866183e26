"""The learning experiment's report: claims, tables for the terminal and as Markdown, JSON, and the frontier's plot."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.artifacts import write_json, write_text
from pipeline.evaluation.measures import Estimate
from pipeline.evaluation.policy_eval import SCORE, PolicyReport
from policy.ppo.health import length_hacking
from reward_model.plots import ACCENT, INK, MUTED
from scripts.learn_ppo_stats import (
    ERRORS,
    Step,
    best_of_kl_bound,
    hierarchical_bootstrap,
    over_seeds,
    per_prompt,
    standard_error,
    steps,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KL_SLACK = 1.1
"""Share of the KL target that a run may end at."""
NAME = "learn_ppo"


@dataclass(frozen=True)
class Arms:
    """SFT, best of n and PPO of one training seed on the same held-out prompts, and PPO's health verdicts."""

    sft: PolicyReport
    best: PolicyReport
    ppo: PolicyReport
    health: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class LengthRun:
    """PPO against the reward model that pays for length: reports by update, and its health verdicts."""

    reports: Mapping[int, PolicyReport]
    health: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """Everything that was run; `frontier` goes from the highest `kl_coef` to the lowest."""

    arms: Mapping[int, Arms]
    frontier: Mapping[float, PolicyReport]
    length: LengthRun
    best_of: int
    kl_target: float
    commands: Sequence[str]

    @property
    def first(self) -> Arms:
        """The seed whose SFT policy and reward model the frontier shares."""
        return next(iter(self.arms.values()))

    @property
    def judges(self) -> list[str]:
        """Names of the gold judges."""
        return list(self.first.sft.judges)

    @property
    def measures(self) -> list[str]:
        """The judges and the reward model's score."""
        return [*self.judges, SCORE]


@dataclass(frozen=True)
class Claim:
    """A statement that the numbers bear out, or not."""

    holds: bool
    text: str


@dataclass(frozen=True)
class Grid:
    """A table, printed by rich and as Markdown."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(*self.header, title=self.title, title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """With its title as heading."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return f"## {self.title}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def write(out: Path, outcome: Outcome) -> list[Claim]:
    """Prints the report, writes learn_ppo.md, .json and .png into `out`, and returns the claims."""
    claims = list(all_claims(outcome))
    grids = [_seed_grid(outcome), _difference_grid(outcome), _frontier_grid(outcome), _length_grid(outcome)]
    console = Console(highlight=False)
    for grid in grids:
        console.print(grid.rich())
    lines = [f"{'holds' if claim.holds else 'FAILS'}: {claim.text}" for claim in claims]
    notes = list(_notes(outcome))
    for line in [*lines, *notes]:
        console.print(line, markup=False, soft_wrap=True)
    parts = ["# Does PPO learn?\n", "".join(f"- {line}\n" for line in lines), *(grid.markdown() for grid in grids)]
    parts += ["".join(f"- {line}\n" for line in notes), f"![The frontier]({NAME}.png)\n"]
    parts.append("## Commands\n\n```console\n" + "".join(f"$ {line}\n" for line in outcome.commands) + "```\n")
    write_text(out / f"{NAME}.md", "\n".join(parts))
    write_json(out / f"{NAME}.json", _finite({**numbers(outcome), "claims": [asdict(claim) for claim in claims]}))
    save_frontier(out / f"{NAME}.png", outcome)
    console.print(f"report: {out / NAME}.md, .json and .png", markup=False, soft_wrap=True)
    return claims


def all_claims(outcome: Outcome) -> Iterator[Claim]:
    """What must hold."""
    for name in outcome.judges:
        found = gains(outcome, name, "sft")
        intervals = [interval for interval in (hierarchical_bootstrap(found), over_seeds(found)) if interval]
        yield Claim(
            all(e.low > 0 for e in intervals), f"PPO above SFT by {name}: {' and '.join(map(_text, intervals))}"
        )
    limit = KL_SLACK * outcome.kl_target
    for seed, arms in outcome.arms.items():
        kl = _kl(arms.ppo)
        text = f"seed {seed} ends at {kl.mean:.2f} nats per response, target {outcome.kl_target:g}, limit {limit:g}"
        yield Claim(kl.mean <= limit, text)
    for name, title in (("kl", "KL"), (SCORE, "reward-model score")):
        taken = frontier_steps(outcome, name)
        broken = [f"{s.before} to {s.after} ({s.difference:+.3f}, error {s.error:.3f})" for s in taken if not s.rises]
        text = f"{title} rises as kl_coef falls, within {ERRORS:g} standard errors"
        yield Claim(not broken, text + (f", but not from {'; '.join(broken)}" if broken else ""))
    yield from _length_claims(outcome)


def _length_claims(outcome: Outcome) -> Iterator[Claim]:
    gained = length_gains(outcome)
    score = gained[SCORE]
    yield Claim(score.low > 0, f"the broken reward's score rises by {_text(score)} standard deviations of SFT")
    last = list(outcome.length.reports.values())[-1]
    for name in outcome.judges:
        lost = hierarchical_bootstrap([_paired(outcome.first.ppo, last, name)])
        text = (
            f"{name} ends below PPO with the trained reward: {_text(lost)}; over SFT {_text(gained[name])} deviations"
        )
        yield Claim(lost.high < 0, text)
    wanted = length_hacking.__name__
    said = [verdict for verdict in outcome.length.health if verdict["name"] == wanted]
    text = "".join(f"update {verdict['update']}: {verdict['cause']}" for verdict in said) or "no such verdict"
    yield Claim(bool(said), f"health reports {wanted}: {text}")


def gains(outcome: Outcome, name: str, baseline: str) -> list[np.ndarray]:
    """Per training seed: PPO minus `sft` or `best` by prompt."""
    return [_paired(vars(arms)[baseline], arms.ppo, name) for arms in outcome.arms.values()]


def frontier_steps(outcome: Outcome, name: str) -> list[Step]:
    """The changes of a measure along the frontier."""
    return steps({f"{kl_coef:g}": per_prompt(report, name) for kl_coef, report in outcome.frontier.items()})


def length_gains(outcome: Outcome) -> dict[str, Estimate]:
    """What PPO against the broken reward gains over SFT, in standard deviations of SFT's responses."""
    reports = list(outcome.length.reports.values())
    found = {}
    for name in outcome.measures:
        spread = float(np.std([row[name] for row in reports[0].rows]))
        found[name] = hierarchical_bootstrap([_paired(reports[0], reports[-1], name) / (spread or 1.0)])
    return found


def numbers(outcome: Outcome) -> dict[str, Any]:
    """All figures of the experiment."""
    return {
        "commands": list(outcome.commands),
        "seeds": list(outcome.arms),
        "kl_target": outcome.kl_target,
        "best_of": outcome.best_of,
        "best_of_kl_bound": best_of_kl_bound(outcome.best_of),
        "arms": {
            seed: {k: _brief(vars(arms)[k]) for k in ("sft", "best", "ppo")} for seed, arms in outcome.arms.items()
        },
        "health": {seed: list(arms.health) for seed, arms in outcome.arms.items()},
        "pooled": {
            f"ppo - {baseline}": {name: _both(gains(outcome, name, baseline)) for name in outcome.measures}
            for baseline in ("sft", "best")
        },
        "frontier": [
            {"kl_coef": kl_coef, "errors": _errors(outcome, report), **_brief(report)}
            for kl_coef, report in outcome.frontier.items()
        ],
        "steps": {n: [s._asdict() for s in frontier_steps(outcome, n)] for n in ("kl", *outcome.measures)},
        "length": {
            "reports": {update: _brief(report) for update, report in outcome.length.reports.items()},
            "gains": {name: gain._asdict() for name, gain in length_gains(outcome).items()},
            "health": list(outcome.length.health),
        },
    }


def save_frontier(path: Path, outcome: Outcome) -> None:
    """Score and judges against the KL, one panel each, with standard errors and the baselines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(outcome.measures), 4.0), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(outcome.measures), squeeze=False)[0]
    for axes, name in zip(panels, outcome.measures, strict=True):
        _panel(axes, outcome, name)
    panels[0].legend(fontsize=8, frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))


def _panel(axes: Axes, outcome: Outcome, name: str) -> None:
    def point(report: PolicyReport) -> tuple[float, float, float, float]:
        kl, values = per_prompt(report, "kl"), per_prompt(report, name)
        return float(kl.mean()), float(values.mean()), standard_error(kl), standard_error(values)

    x, y, dx, dy = np.array([point(report) for report in outcome.frontier.values()]).T
    axes.errorbar(x, y, xerr=dx, yerr=dy, fmt="o-", color=INK, capsize=2, label="PPO, fixed kl_coef")
    for kl_coef, *place in zip(outcome.frontier, x, y, strict=True):
        axes.annotate(f"{kl_coef:g}", (place[0], place[1]), xytext=(4, -11), textcoords="offset points", fontsize=8)
    x, y, dx, dy = np.array([point(arms.ppo) for arms in outcome.arms.values()]).T
    axes.errorbar(x, y, xerr=dx, yerr=dy, fmt="s", color=ACCENT, capsize=2, label="PPO to the KL target, each seed")
    best, sft = per_prompt(outcome.first.best, name), per_prompt(outcome.first.sft, name)
    bound = best_of_kl_bound(outcome.best_of)
    label = f"best of {outcome.best_of} (KL at most)"
    axes.errorbar([bound], [best.mean()], yerr=[standard_error(best)], fmt="^", color=MUTED, capsize=2, label=label)
    axes.errorbar([0.0], [sft.mean()], yerr=[standard_error(sft)], fmt="D", color="black", capsize=2, label="SFT")
    axes.set(xlabel="KL to SFT, nats per response", ylabel="reward-model score" if name == SCORE else f"judge {name}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e9ed", linewidth=0.8)


def _seed_grid(outcome: Outcome) -> Grid:
    rows = []
    titles = {"sft": "SFT", "best": f"best of {outcome.best_of}", "ppo": "PPO"}
    for seed, arms in outcome.arms.items():
        for arm, title in titles.items():
            report: PolicyReport = vars(arms)[arm]
            kl = f"<= {best_of_kl_bound(outcome.best_of):.2f}" if arm == "best" else _plain(_kl(report))
            values = [_plain(_estimate(report, name)) for name in outcome.measures]
            rows.append([str(seed), title, kl, *values, f"{report.length.mean:.1f}", f"{report.distinct_2:.3f}"])
    header = ["seed", "policy", "KL", *outcome.measures, "tokens", "distinct-2"]
    return Grid("Each seed on the same held-out prompts, 95% intervals over prompts", header, rows)


def _difference_grid(outcome: Outcome) -> Grid:
    rows = []
    for baseline, title in (("sft", "SFT"), ("best", f"best of {outcome.best_of}")):
        for name in outcome.measures:
            found = gains(outcome, name, baseline)
            student = over_seeds(found)
            by_seed = "  ".join(f"{values.mean():+.3f}" for values in found)
            interval = _text(student) if student else "-"
            rows.append([f"PPO - {title}", name, _text(hierarchical_bootstrap(found)), interval, by_seed])
    header = ["difference", "measure", "bootstrap of seeds and prompts", "Student's t over seeds", "each seed"]
    return Grid("Paired differences, pooled over seeds, 95% intervals", header, rows)


def _frontier_grid(outcome: Outcome) -> Grid:
    rows = []
    for kl_coef, report in outcome.frontier.items():
        errors = _errors(outcome, report)
        cells = [f"{per_prompt(report, name).mean():.3f} ({errors[name]:.3f})" for name in errors]
        rows.append([f"{kl_coef:g}", *cells, f"{report.length.mean:.1f}", f"{report.distinct_2:.3f}"])
    header = ["kl_coef", "KL", *outcome.measures, "tokens", "distinct-2"]
    return Grid("Reward-KL frontier, one SFT policy and reward model (standard error over prompts)", header, rows)


def _length_grid(outcome: Outcome) -> Grid:
    rows = []
    for update, report in outcome.length.reports.items():
        values = [_plain(_estimate(report, name)) for name in outcome.measures]
        rows.append([str(update), _plain(_kl(report)), *values, f"{report.length.mean:.1f}"])
    header = ["update", "KL", *outcome.measures, "tokens"]
    return Grid("PPO against a reward model that pays for length (score: that model's)", header, rows)


def _notes(outcome: Outcome) -> Iterator[str]:
    bound = best_of_kl_bound(outcome.best_of)
    yield (
        f"The KL of best of {outcome.best_of} is bounded by log n - (n-1)/n = {bound:.2f} nats (arXiv:2401.01879), "
        "PPO's is measured: the two are compared at different KL."
    )
    yield (
        "Standard errors along the frontier are those of sampling the held-out responses; each point is one training "
        "run, and what another seed would change is not in them."
    )
    for seed, arms in outcome.arms.items():
        for verdict in arms.health:
            yield f"Health, seed {seed}, update {verdict['update']}: {verdict['name']}: {verdict['cause']}"


def _paired(before: PolicyReport, after: PolicyReport, name: str) -> np.ndarray:
    if before.prompts_sha256 != after.prompts_sha256:
        raise ValueError("the two reports are of different prompts; sample both on the same ones")
    return per_prompt(after, name) - per_prompt(before, name)


def _estimate(report: PolicyReport, name: str) -> Estimate | None:
    return report.score if name == SCORE else report.judges[name]


def _kl(report: PolicyReport) -> Estimate:
    if report.kl_per_sequence is None:
        raise ValueError("PPO's reports have a KL")
    return report.kl_per_sequence


def _errors(outcome: Outcome, report: PolicyReport) -> dict[str, float]:
    return {name: standard_error(per_prompt(report, name)) for name in ("kl", *outcome.measures)}


def _both(found: Sequence[np.ndarray]) -> dict[str, Any]:
    student = over_seeds(found)
    return {
        "bootstrap": hierarchical_bootstrap(found)._asdict(),
        "student": student._asdict() if student else None,
        "each_seed": [float(values.mean()) for values in found],
    }


def _brief(report: PolicyReport) -> dict[str, Any]:
    return {key: value for key, value in report.as_dict().items() if key != "per_prompt"}


def _finite(content: Any) -> Any:
    """The same with null for what is not finite, and text for keys."""
    if isinstance(content, Mapping):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _text(estimate: Estimate) -> str:
    return f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def _plain(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
