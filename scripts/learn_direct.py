"""What the direct methods do on a recipe: gold judges against their start, lengths, likelihoods; several seeds.

    python -m scripts.learn_direct [RECIPE] [--seeds 0,1,2 --methods dpo,simpo --section.key value ...]

Beside every method, SimPO runs without length normalisation and along its margin (`--gammas`, gamma / beta). All runs
are ordinary stages below `--out`: finished ones are skipped, and an interrupted experiment goes on with the same
command. The report says which method raises which judge.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from pipeline.artifacts import read_manifest, write_json, write_text
from pipeline.errors import UserError
from pipeline.evaluation.measures import Estimate
from pipeline.evaluation.policy_eval import PolicyReport
from pipeline.evaluation.saved import load_reports
from pipeline.exits import EXIT_USER_ERROR, print_error
from pipeline.recipe import Recipe
from pipeline.recipe_direct import DIRECT
from policy.likelihoods import Likelihoods, likelihoods
from scripts.learn_ppo import Experiment, split_words
from scripts.learn_ppo_report import Grid
from scripts.learn_ppo_stats import hierarchical_bootstrap, over_seeds, per_prompt

NAME = "learn_direct"
SUMS = "simpo without length normalisation"
QUICK = ("--eval.prompts", "8")
"""Of a try of the experiment itself, with 4 steps per run."""
QUICK_STEPS = 4


@dataclass(frozen=True)
class Arm:
    """One run of one method."""

    before: PolicyReport
    after: PolicyReport
    metrics: Mapping[str, float]
    likelihoods: Likelihoods


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the experiment and writes its report; returns the exit code."""
    options, experiment = _parse(arguments)
    try:
        arms = run(experiment, options.methods.split(","), [float(g) for g in options.gammas.split(",")], options.quick)
    except UserError as error:
        print_error(str(error))
        return EXIT_USER_ERROR
    write(Path(experiment.out), arms, experiment.commands)
    return 0


def run(experiment: Experiment, methods: Sequence[str], gammas: Sequence[float], quick: bool) -> dict[str, list[Arm]]:
    """Every variant's runs by its title, a seed each; the margins along `gammas` with the first seed alone."""
    variants: dict[str, tuple[str, Sequence[str], Sequence[int]]] = {
        name: (name, (), experiment.seeds) for name in methods
    }
    if "simpo" in methods:
        variants[SUMS] = ("simpo", ("--simpo.length_normalize", "false"), experiment.seeds)
        for gamma in gammas:
            keys = ("--simpo.gamma_beta_ratio", f"{gamma:g}")
            variants[f"simpo, gamma/beta {gamma:g}"] = ("simpo", keys, experiment.seeds[:1])
    arms: dict[str, list[Arm]] = {}
    for title, (method, keys, seeds) in variants.items():
        steps = (f"--{method}.trainer.max_steps", str(QUICK_STEPS)) if quick else ()
        for seed in seeds:
            start = experiment.stage("sft", f"seed{seed}", seed)
            name = f"seed{seed}" if not keys else f"seed{seed}-{keys[0].rpartition('.')[2]}-{keys[1]}"
            made = experiment.stage(method, name, seed, f"--{method}.policy", str(start), *keys, *steps)
            arms.setdefault(title, []).append(_arm(experiment.resolved(name, seed), made, start))
    return arms


def _arm(recipe: Recipe, made: Path, start: Path) -> Arm:
    metrics = {key: value for key, value in read_manifest(made)["metrics"].items() if isinstance(value, float)}
    reports = load_reports(made)
    return Arm(reports[0], reports[max(reports)], metrics, likelihoods(recipe, made, start))


def write(out: Path, arms: Mapping[str, Sequence[Arm]], commands: Sequence[str]) -> None:
    """Prints the tables and writes learn_direct.md and .json into `out`."""
    grids = [gold_grid(arms), text_grid(arms), likelihood_grid(arms)]
    console = Console(highlight=False)
    for grid in grids:
        console.print(grid.rich())
    found = findings(arms)
    console.print(*found, sep="\n", markup=False, soft_wrap=True)
    parts = ["# What the direct methods do\n", *(f"- {line}" for line in found), ""]
    parts += [grid.markdown() for grid in grids]
    parts.append("## Commands\n\n```console\n" + "".join(f"$ {line}\n" for line in dict.fromkeys(commands)) + "```\n")
    write_text(out / f"{NAME}.md", "\n".join(parts))
    numbers = {
        title: [
            {
                "before": {k: v for k, v in arm.before.as_dict().items() if k != "per_prompt"},
                "after": {k: v for k, v in arm.after.as_dict().items() if k != "per_prompt"},
                "metrics": dict(arm.metrics),
                "likelihoods": asdict(arm.likelihoods),
            }
            for arm in each
        ]
        for title, each in arms.items()
    }
    write_json(out / f"{NAME}.json", {"findings": found, "commands": list(dict.fromkeys(commands)), "arms": numbers})
    console.print(f"report: {out / NAME}.md and .json", markup=False, soft_wrap=True)


def findings(arms: Mapping[str, Sequence[Arm]]) -> list[str]:
    """What the tables say: which method raises which judge, and the SimPO paper's observations, borne out or not."""
    lines = []
    for title, each in arms.items():
        of_verdict: dict[str, list[str]] = {}
        for judge in each[0].after.judges:
            of_verdict.setdefault(judge_change(each, judge)[2], []).append(judge)
        verdicts = ", ".join(f"{' and '.join(judges)} {verdict}" for verdict, judges in of_verdict.items())
        lines.append(f"{title}: {verdicts} ({len(each)} seed{'s' * (len(each) > 1)})")
    if SUMS in arms:
        means, sums = (
            (
                statistics.fmean(arm.after.length.mean for arm in arms[title]),
                statistics.fmean(arm.likelihoods.spearman for arm in arms[title]),
            )
            for title in ("simpo", SUMS)
        )
        lines.append(
            f"{SUMS}: answers of {sums[0]:.2f} tokens instead of {means[0]:.2f} "
            f"({'longer' if sums[0] > means[0] else 'not longer'}; longer in the paper), likelihood-length Spearman "
            f"{sums[1]:+.3f} instead of {means[1]:+.3f} ({'higher' if sums[1] > means[1] else 'not higher'}; higher in "
            "the paper)"
        )
    if "dpo" in arms:
        dpo = [arm.likelihoods for arm in arms["dpo"]]
        agreement = statistics.fmean(each.agreement for each in dpo)
        lines.append(f"dpo's implicit reward orders {agreement:.1%} of the held-out pairs as its likelihood does")
        if "simpo" in arms:
            own = statistics.fmean(each.reward_accuracy for each in dpo)
            other = statistics.fmean(arm.likelihoods.ranking_accuracy for arm in arms["simpo"])
            lines.append(f"held-out accuracy of their own rewards: dpo {own:.3f}, simpo {other:.3f}")
    return lines


def judge_change(each: Sequence[Arm], judge: str) -> tuple[list[np.ndarray], tuple[Estimate, Estimate | None], str]:
    """A judge's changes by prompt of every seed, their mean with both intervals, and the verdict that both bear out."""
    changes = [per_prompt(arm.after, judge) - per_prompt(arm.before, judge) for arm in each]
    pooled, student = hierarchical_bootstrap(changes), over_seeds(changes)
    both = [estimate for estimate in (pooled, student) if estimate]
    lowered = "lowered" if all(estimate.high < 0 for estimate in both) else "not clearly changed"
    return changes, (pooled, student), "raised" if all(estimate.low > 0 for estimate in both) else lowered


def gold_grid(arms: Mapping[str, Sequence[Arm]]) -> Grid:
    """Every judge's change from the start: bootstrap of seeds and prompts, Student's t over seeds, the verdict."""
    rows = []
    for title, each in arms.items():
        for judge in each[0].after.judges:
            changes, estimates, verdict = judge_change(each, judge)
            shown = [f"{e.mean:+.3f} [{e.low:+.3f}, {e.high:+.3f}]" if e else "-" for e in estimates]
            rows.append([title, judge, *shown, "  ".join(f"{values.mean():+.3f}" for values in changes), verdict])
    header = ["method", "judge", "bootstrap of seeds and prompts", "Student's t over seeds", "each seed", ""]
    return Grid("Gold judges, method - start, 95% intervals", header, rows)


def text_grid(arms: Mapping[str, Sequence[Arm]]) -> Grid:
    """Distance to the start, lengths and diversity, means over seeds."""
    header = ["method", "KL, nats per response", "tokens before", "tokens", "ends with EOS", "distinct-2"]
    rows = []
    for title, each in arms.items():
        kl = [arm.after.kl_per_sequence.mean for arm in each if arm.after.kl_per_sequence is not None]
        columns = [
            kl,
            [arm.before.length.mean for arm in each],
            [arm.after.length.mean for arm in each],
            [arm.after.eos_rate for arm in each],
            [arm.after.distinct_2 for arm in each],
        ]
        rows.append([title, *(f"{statistics.fmean(values):.3f}" for values in columns)])
    return Grid("Samples, means over seeds", header, rows)


def likelihood_grid(arms: Mapping[str, Sequence[Arm]]) -> Grid:
    """Held-out answers under the policy, means over seeds (least to most)."""
    names = ("spearman", "ranking_accuracy", "reward_accuracy", "agreement")
    header = [
        "method",
        "likelihood-length Spearman",
        "ranking by likelihood",
        "implicit reward",
        "agreement of the two",
    ]
    rows = []
    for title, each in arms.items():
        cells = []
        for name in names:
            values = [asdict(arm.likelihoods)[name] for arm in each]
            cells.append(f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        rows.append([title, *cells])
    return Grid("Held-out answers, means over seeds (range)", header, rows)


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Experiment]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("recipe", nargs="?", default="recipes/demo.yaml")
    parser.add_argument("--seeds", default="0,1,2", help="training seeds (default: %(default)s)")
    parser.add_argument("--methods", default=",".join(DIRECT), help="default: %(default)s")
    parser.add_argument("--gammas", default="0,0.5,1", help="SimPO's gamma / beta (default: %(default)s)")
    parser.add_argument("--out", default="runs/learn", help="directory of all runs (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one seed, 4 steps per run")
    ours, overrides = split_words(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(ours)
    seeds = [int(word) for word in options.seeds.split(",")]
    return options, Experiment(
        recipe=options.recipe,
        out=options.out,
        seeds=seeds[:1] if options.quick else seeds,
        frontier=(),
        best_of=0,
        overrides=[*overrides, *(QUICK if options.quick else ())],
    )


if __name__ == "__main__":
    raise SystemExit(main())
