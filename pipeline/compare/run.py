"""`tristage compare`: trains what is missing, evaluates every policy alike, and writes one report.

Everything it runs is an ordinary stage: what is done is skipped, what was interrupted goes on, and the same command
ends with the same report.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.artifacts import read_manifest, write_json, write_text
from pipeline.compare.answers import prompts_and_answers, side_by_side
from pipeline.compare.arms import Arm, Step, all_steps, folder, make_arms, reward_model, seeds
from pipeline.compare.budget import budgeted
from pipeline.compare.gather import Gathered, gather
from pipeline.compare.reading import price, reading
from pipeline.compare.results import Material, assemble, trained_on
from pipeline.compare.terminal import say_results
from pipeline.errors import UserError
from pipeline.evaluation.contests import Decision, PairwiseJudge, contests_between
from pipeline.evaluation.judges import load_judges, load_pairwise_judges
from pipeline.leaks import refuse_leaks
from pipeline.process import only_one
from pipeline.recipe import Recipe
from pipeline.recipe_compare import BASELINE
from pipeline.runner import plan_stage, prepare, run_stage
from pipeline.stages import wanted_paths

RESULTS = "results.json"
SAMPLES = "samples.jsonl"
JUDGES = "judges"
"""Of the comparison's directory: what the judges that compare answers keep."""


@dataclass(frozen=True)
class Options:
    """What the command line says beside the recipe.

    Attributes:
        overwrite: replace stages that were made from something else.
        lm_eval: files of lm-evaluation-harness by method.
    """

    command: Sequence[str]
    overwrite: bool = False
    lm_eval: Mapping[str, str] = field(default_factory=dict)


def compare(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Runs the comparison and writes it below `runs/<name>/compare`; returns the results.

    Errors:
        UserError: a held-out prompt is trained on, a stage refuses, a judge fails; what is done is kept.
        SystemExit: a stage failed; it has printed why.
    """
    started = time.time()
    console = Console(highlight=False)
    _refuse(recipe)
    prepare(recipe, _data_paths(recipe), console)
    for line in refuse_leaks(recipe.data):
        console.print(line, markup=False, soft_wrap=True)
    out = folder(recipe)
    out.mkdir(parents=True, exist_ok=True)
    with only_one(out / ".compare.lock", f"another process is running the comparison in {out}."):
        external = _external(recipe, options)
        runner = _Runner(options, console)
        budgets = budgeted(recipe, runner.run)
        arms = make_arms(recipe, {method: each.recipe for method, each in budgets.items()})
        _say_plan(arms, options, console)
        for step in all_steps(arms):
            runner.run(step)
        gathered = gather(arms)
        material = Material(
            recipe,
            arms,
            gathered,
            budgets,
            scorers={seed: path for seed in seeds(recipe) if (path := reward_model(recipe, seed))},
            external=external,
            **_decided(recipe, gathered, console),
        )
        return _write(material, out, options, started, console)


def _refuse(recipe: Recipe) -> None:
    """Faults that would only show after hours of training."""
    load_judges(recipe.eval)
    load_pairwise_judges(recipe.eval, folder(recipe) / JUDGES, lambda _: None)
    named = recipe.compare.headline_judge
    if named is not None and named not in recipe.eval.judges:
        raise UserError(
            f"compare.headline_judge: {named} is not in eval.judges.",
            mend=f"Name one of {', '.join(recipe.eval.judges) or 'none: eval.judges is empty'}.",
        )
    if named in trained_on(recipe):
        raise UserError(
            f"compare.headline_judge: {named} is a function of ppo.rewards: PPO is trained on it.",
            mend="Name a judge that no method is trained on.",
        )


def _data_paths(recipe: Recipe) -> list[str]:
    return [path for stage in ("sft", *recipe.compare.methods) for path in wanted_paths(recipe, stage, {})]


@dataclass
class _Runner:
    """Runs steps, each once."""

    options: Options
    console: Console

    def __post_init__(self) -> None:
        self._done: set[Path] = set()

    def run(self, step: Step) -> Path:
        """Makes the step's directory unless it is done."""
        if step.out in self._done:
            return step.out
        overwrite = False
        if self.options.overwrite:
            state = plan_stage(step.recipe, step.stage, step.inputs).state
            overwrite = state.startswith("stale")
        run_stage(step.recipe, step.stage, overwrite=overwrite, command=self.options.command, inputs=step.inputs)
        self._done.add(step.out)
        return step.out


def _say_plan(arms: Sequence[Arm], options: Options, console: Console) -> None:
    """What is done and what will run, a line per stage; refuses at once what a stage would refuse later."""
    table = Table("stage", "now", box=None, padding=(0, 2, 0, 0))
    for step in all_steps(arms):
        planned = plan_stage(step.recipe, step.stage, step.inputs)
        stale = planned.state.startswith("stale")
        if stale and not options.overwrite:
            raise UserError(f"{planned.name}: {planned.note}", mend="Use --overwrite to replace it, or another `name`.")
        if planned.state == "done":
            _refuse_uncounted(step)
        words = {"done": "done", "resume": "goes on", "later": "depends on its inputs"}
        table.add_row(str(step.out), "is replaced" if stale else words.get(planned.state, "will run"))
    console.print(table)


def _refuse_uncounted(step: Step) -> None:
    """A stage of an earlier version has not counted what it took."""
    if step.stage != "evaluate" and "trained_tokens" not in read_manifest(step.out)["metrics"]:
        raise UserError(
            f"{step.out} was made by an earlier version, which did not count tokens and steps.",
            mend="Remove it: it is made anew.",
        )


def _decided(recipe: Recipe, gathered: Gathered, console: Console) -> dict[str, Any]:
    """What the judges that compare answers say, what they cost, what they are."""

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    judges: Mapping[str, PairwiseJudge] = load_pairwise_judges(recipe.eval, folder(recipe) / JUDGES, say)
    prompts, answers = prompts_and_answers(gathered)
    decisions: dict[str, list[Decision]] = {}
    for name, judge in judges.items():
        decisions[name] = judge.decide(contests_between(prompts, answers, BASELINE, judge.selection))
    return {
        "decisions": decisions,
        "judge_details": {name: {"about": judge.about, **judge.details()} for name, judge in judges.items()},
        "judge_costs": {name: judge.costs() for name, judge in judges.items()},
    }


def _external(recipe: Recipe, options: Options) -> dict[str, Any]:
    from pipeline.report.external import read_lm_eval

    return read_lm_eval(options.lm_eval, recipe.compare.methods) if options.lm_eval else {}


def _write(material: Material, out: Path, options: Options, started: float, console: Console) -> dict[str, Any]:
    """Results, samples, page, tables and exports; the results last, so that they never speak of older files."""
    from pipeline.advise import advise, read_facts
    from pipeline.report.exports import log_tables, write_exports
    from pipeline.report.page import write_report

    recipe = material.recipe
    results = assemble(material, _run_facts(material, options, started))
    results["reading"] = reading(results)
    results["cost"]["reading"] = price(results)
    results["advice"] = advise(read_facts(recipe), results).as_dict()
    judges = [name for name, judge in recipe.eval.judges.items() if judge.function]
    samples = list(side_by_side(material.gathered, judges))
    write_text(out / SAMPLES, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples))
    write_exports(results, samples, out)
    write_report(results, samples, out)
    write_json(out / RESULTS, results)
    log_tables(results, samples, recipe, out)
    say_results(results, console)
    console.print(
        f"report: {out / 'report.html'} (tables: report.md; numbers: {RESULTS})", markup=False, soft_wrap=True
    )
    return results


def _run_facts(material: Material, options: Options, started: float) -> dict[str, Any]:
    """When, where and by which versions."""
    manifest = read_manifest(material.arms[0].evaluation.out)
    form = "%Y-%m-%dT%H:%M:%SZ"
    return {
        "command": shlex.join(options.command),
        "started": time.strftime(form, time.gmtime(started)),
        "finished": time.strftime(form, time.gmtime()),
        "device": manifest["device"],
        "packages": manifest["packages"],
        "code": manifest["code"],
    }
