"""`results.json`: everything that a comparison found, in one dict from which page, tables and exports are made.

What differs between two equal runs (times, memory, money) stands under `cost` and `run` alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.artifacts import json_safe
from pipeline.compare.arms import Arm, seeds
from pipeline.compare.budget import Budgeted
from pipeline.compare.contrasts import (
    Won,
    by_decisions,
    by_scores,
    differences,
    finite,
    ranking,
    win_rates,
)
from pipeline.compare.gather import Evaluated, Gathered
from pipeline.compare.notes import PER_PROMPT, notes
from pipeline.compare.spent import cost_of, mean_cost, training_seconds
from pipeline.compare.traces import curves, frontier, reward_models
from pipeline.evaluation.contests import Decision
from pipeline.evaluation.intervals import crossed_interval
from pipeline.load import recipe_sha256
from pipeline.recipe import Recipe
from pipeline.recipe_compare import BASELINE

VERSION = 1
SCORE = "score"


@dataclass(frozen=True)
class Material:
    """What the results are made of.

    Attributes:
        decisions: of every judge that compares answers, by its name.
        judge_costs: requests, tokens and money of those judges.
        scorers: the reward model behind `score`, by seed.
        external: tables of other tools, by method.
    """

    recipe: Recipe
    arms: Sequence[Arm]
    gathered: Gathered
    budgets: Mapping[str, Budgeted]
    decisions: Mapping[str, Sequence[Decision]] = field(default_factory=dict)
    judge_costs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    judge_details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scorers: Mapping[int, str] = field(default_factory=dict)
    external: Mapping[str, Any] = field(default_factory=dict)


def assemble(material: Material, run: Mapping[str, Any]) -> dict[str, Any]:
    """The results but for `reading` and `advice`, which are made from them."""
    recipe, gathered = material.recipe, material.gathered
    judges = [name for name, judge in recipe.eval.judges.items() if judge.function]
    won: dict[str, dict[tuple[str, str], Won]] = {judge: by_scores(gathered, judge) for judge in judges}
    scored = [SCORE] if gathered.has(SCORE) else []
    won |= {name: by_scores(gathered, name) for name in scored}
    for name, made in material.decisions.items():
        won[name] = by_decisions(made, seeds(recipe), as_one_seed=recipe.eval.judges[name].votes is not None)
    measured = measures(gathered, [*judges, *scored])
    described = judge_list(material, scored)
    about = {judge["name"]: judge["about"] for judge in described}
    gold = [judge["name"] for judge in described if judge["role"] == "gold" and won[judge["name"]]]
    headline = recipe.compare.headline_judge or next(iter(gold), None)
    results = {
        "version": VERSION,
        "name": recipe.name,
        "recipe": recipe.model_dump(mode="json"),
        "recipe_sha256": recipe_sha256(recipe),
        "methods": list(recipe.compare.methods),
        "baseline": BASELINE,
        "seeds": seeds(recipe),
        "shared_stages": recipe.compare.shared_stages,
        "budget": budget(material),
        "sampling": sampling(material),
        "judges": described,
        "headline_judge": headline,
        "measures": measured,
        "measure_notes": notes(about, {name for of in measured.values() for name in of}),
        "differences": differences(gathered, [*judges, *scored], recipe.seed),
        "win_rates": {name: win_rates(each, name, recipe.seed) for name, each in won.items() if each},
        "ranking": {name: ranking(each, recipe.compare.methods, recipe.seed) for name, each in won.items() if each},
        "frontier": frontier(gathered, judges),
        "curves": curves(gathered, judges),
        "reward_model": reward_models(material.arms, material.scorers),
        "hashes": hashes(material),
        "external": dict(material.external),
        "cost": costs(material),
        "run": dict(run),
    }
    return json_safe(results)


def measures(gathered: Gathered, judges: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Every measure of every method: its mean over seeds, each seed's value, and an interval where prompts give one."""
    found = {}
    for method, of in gathered.of.items():
        seed = of[0].arm.seed
        columns = {name: name for name in judges} | {k: v for k, v in PER_PROMPT.items() if k not in judges}
        table: dict[str, dict[str, Any]] = {}
        for name, column in columns.items():
            if not gathered.has(column):
                continue
            values = gathered.column(method, column).mean(2)
            interval = finite(crossed_interval(values, seed))
            del interval["p"]
            table[name] = {**interval, "per_seed": values.mean(1).tolist()}
        whole = [_whole(evaluated) for evaluated in of]
        for name in dict.fromkeys(name for each in whole for name in each):
            known = [each[name] for each in whole if name in each]
            values = [each.get(name) for each in whole]
            table[name] = {"mean": statistics.fmean(known), "low": None, "high": None, "per_seed": values}
        found[method] = table
    return found


def _whole(each: Evaluated) -> dict[str, float]:
    """The measures that one policy has as a whole, without those that it lacks."""
    figures, report, metrics = each.figures, each.figures["report"], each.manifest["metrics"]
    likelihoods = figures["likelihoods"] or {}
    found = {
        "kl_per_token": report["kl_per_token"],
        "truncation_rate": figures["truncation_rate"],
        "distinct_1": report["distinct_1"],
        "distinct_2": report["distinct_2"],
        "self_bleu": figures["self_bleu"],
        "entropy": figures["entropy"],
        "likelihood_length_spearman": likelihoods.get("spearman"),
        "reward_accuracy": likelihoods.get("reward_accuracy"),
        "ranking_accuracy": likelihoods.get("ranking_accuracy"),
        "reward_likelihood_agreement": likelihoods.get("agreement"),
        "sft_perplexity": figures["sft_perplexity"],
        **{name: metrics.get(name) for name in ("trained_tokens", "optimizer_steps")},
        "generated_tokens": metrics.get("generated_tokens", 0),
        "models_in_memory": len(each.manifest["models_in_memory"]["training"]),
    }
    if each.arm.method == BASELINE:
        found |= dict.fromkeys(("reward_accuracy", "reward_likelihood_agreement"), None)  # its reward is zero
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def budget(material: Material) -> dict[str, Any]:
    """What was held equal, and what every method then used of it."""
    kind, amount = material.recipe.compare.held_equal
    realised: dict[str, float] = {}
    if kind in ("steps", "tokens"):
        key = {"steps": "optimizer_steps", "tokens": "trained_tokens"}[kind]
        for method, of in material.gathered.of.items():
            if method != BASELINE:
                realised[method] = statistics.fmean(each.manifest["metrics"][key] for each in of)
    note = "" if kind == "seconds" else budget_note(material)
    return {"kind": kind, "amount": amount, "realised": realised, "note": note}


def budget_note(material: Material) -> str:
    """How every method's steps were found. Under a budget of seconds it holds times."""
    return "; ".join(f"{method}: {each.note}" for method, each in material.budgets.items() if each.note)


def sampling(material: Material) -> dict[str, Any]:
    """How every policy was sampled."""
    recipe, first = material.recipe, material.gathered.of[BASELINE][0]
    engine = first.evaluator["engine"]
    return {
        "prompts": material.gathered.prompts,
        "samples_per_prompt": material.gathered.samples,
        "prompts_sha256": first.figures["report"]["prompts_sha256"],
        "temperature": recipe.rollout.temperature,
        "max_new_tokens": recipe.data.max_response_tokens,
        "engine": f"{engine['name']} {engine['version']}",
    }


def judge_list(material: Material, scored: Sequence[str]) -> list[dict[str, Any]]:
    """What each judge is; the trained reward model is marked as what PPO maximised."""
    found = []
    for name, judge in material.recipe.eval.judges.items():
        details = dict(material.judge_details.get(name, {}))
        kind = "function" if judge.function else "llm" if judge.llm else "votes"
        about = details.pop("about", judge.function)
        role = "trained_on" if name in trained_on(material.recipe) else "gold"
        found.append({"name": name, "kind": kind, "role": role, "about": about, "details": details})
    if scored:
        learnt = material.recipe.ppo.with_trained_model
        about = "learnt from the preferences that methods learn from" if learnt else "the functions that PPO maximises"
        kind = "reward_model" if learnt else "function"
        found.append({"name": SCORE, "kind": kind, "role": "trained_on", "about": about, "details": {}})
    return found


def trained_on(recipe: Recipe) -> list[str]:
    """Judges that are functions which PPO maximises: they cannot say whether PPO is better."""
    if "ppo" not in recipe.compare.methods:
        return []
    rewards = [(source.function, source.kwargs) for source in recipe.ppo.rewards.values()]
    judges = recipe.eval.judges.items()
    return [name for name, judge in judges if judge.function and (judge.function, judge.kwargs) in rewards]


def hashes(material: Material) -> dict[str, Any]:
    """Of the data and the weights, by which another run can be told to be the same."""
    of = material.gathered.of
    first = of[BASELINE][0].evaluator
    data = {key: _data_hash(entry) for key, entry in first["fingerprint"]["data"].items()}
    return {
        "data": data,
        "weights": {method: [_weights_hash(each.manifest) for each in evaluated] for method, evaluated in of.items()},
        "tokenizer": first["tokenizer_sha256"],
    }


def _data_hash(entry: Mapping[str, Any]) -> str:
    return str(entry.get("sha256", entry))


def _weights_hash(manifest: Mapping[str, Any]) -> str:
    """The hash of a policy's weights; of several files, those of all in order."""
    files = manifest["files"]
    return " ".join(files[name] for name in sorted(files) if name.endswith(".safetensors") and "/" not in name)


def costs(material: Material) -> dict[str, Any]:
    """What every method cost from the shared SFT stage on, means over seeds, and its own stage alone."""
    price = material.recipe.compare.price_per_hour
    found: dict[str, Any] = {}
    for method in material.gathered.of:
        arms = [arm for arm in material.arms if arm.method == method]
        stages = [[step.out for step in arm.steps if step.stage != BASELINE or method == BASELINE] for arm in arms]
        per_seed = [cost_of(each, price) for each in stages]
        own = mean_cost([cost_of(each[-1:], price) for each in stages])
        names = [step.stage for step in arms[0].steps if step.stage != BASELINE or method == BASELINE]
        found[method] = {"stages": names, **mean_cost(per_seed), "own": own, "per_seed": per_seed}
        if method != BASELINE:
            found[method]["training_seconds"] = statistics.fmean(
                sum(training_seconds(directory) for directory in each) for each in stages
            )
    note = budget_note(material) if material.recipe.compare.held_equal.kind == "seconds" else ""
    judges = {name: dict(cost) for name, cost in material.judge_costs.items()}
    return {**found, "judges": judges, "budget_note": note}
