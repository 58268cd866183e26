"""`tristage advise`: one method for the data, model and machine at hand, runner-ups, and the reasons with sources.

Facts come from the recipe's own data, reasons from the rule table of published findings. What a comparison measured on
this data (results.json) beats what papers found on theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.advise_facts import Facts, Machine, read_facts
from pipeline.advise_rules import CHEAPEST, RULES, Rule, ranked
from pipeline.errors import UserError
from pipeline.recipe import Recipe

RUNNER_UPS = 3
CLOSE = 1
"""Points between the first two from which on the choice is not called close."""
FEW_COMPARISONS = 500
SIGNIFICANT = 0.05
TITLES = {
    "sft": "supervised fine-tuning",
    "ppo": "RLHF: reward model and PPO",
    "dpo": "direct preference optimisation",
    "ipo": "identity preference optimisation",
    "kto": "Kahneman-Tversky optimisation",
    "simpo": "SimPO",
    "orpo": "ORPO",
    "ift": "intuitive fine-tuning",
    "contrast": "contrast SFT",
}


@dataclass(frozen=True, slots=True)
class Reason:
    """One sentence for or against a method, and where it comes from."""

    method: str
    speaks: Literal["for", "against"]
    weight: str
    """decisive, strong, some or slight; `measured` for what this data showed."""
    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Advice:
    """A recommendation.

    Attributes:
        recommended: the method; `also` are runner-ups, best first.
        reasons: those about `recommended` first, then about the runner-ups, then about what was ruled out.
        cautions: what to mind whatever is chosen.
    """

    recommended: str
    also: tuple[str, ...]
    facts: Facts
    reasons: tuple[Reason, ...]
    cautions: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """`advice` of results.json: recommended, also, found (facts as sentences), facts, reasons, cautions."""
        reasons = [
            {"for": r.method, "speaks": r.speaks, "weight": r.weight, "text": r.text, "source": r.source}
            for r in self.reasons
        ]
        facts = {key: _finite(value) for key, value in self.facts.as_dict().items()}
        return {
            "recommended": self.recommended,
            "also": list(self.also),
            "found": describe(self.facts),
            "facts": facts,
            "reasons": reasons,
            "cautions": list(self.cautions),
        }


@dataclass(frozen=True, slots=True)
class _Measured:
    """What a comparison says: its choice, what it cannot tell from that, and why."""

    order: tuple[str, ...]
    reasons: tuple[Reason, ...]
    cautions: tuple[str, ...]


def advise(facts: Facts, measured: Mapping[str, Any] | None = None) -> Advice:
    """The advice for `facts`; `measured` is a results.json, whose headline judge decides where there is one.

    Without measured rows, methods that can use the data are ordered by the points of the rules that hold, the cheaper
    first among equals. With them, the choice is the cheapest method that the best one does not significantly beat.
    No sentence tells a time, in which two equal runs differ, but of methods over `facts.budget_hours`.
    """
    methods = usable(facts)
    fired = [rule for rule in RULES if rule.method in methods and rule.when(facts)]
    points = {method: sum(rule.points for rule in fired if rule.method == method) for method in methods}
    by_rules = sorted(methods, key=lambda method: (-points[method], CHEAPEST.index(method)))
    shown = _measured(measured, facts) if measured is not None else _Measured((), (), ())
    cautions = [*shown.cautions, *_cautions(facts, measured is not None)]
    if shown.order:
        order = [*shown.order, *(m for m in by_rules if m not in measured_methods(measured or {}) and points[m] > 0)]
    else:
        order = [by_rules[0], *(method for method in by_rules[1:] if points[method] > 0)]
        cautions = [*_close_call(by_rules, points), *cautions]
    named = order[: 1 + RUNNER_UPS]
    reasons = [*shown.reasons, *_reasons(fired, named, facts)]
    return Advice(named[0], tuple(named[1:]), facts, tuple(reasons), tuple(cautions))


def usable(facts: Facts) -> tuple[str, ...]:
    """The methods that can learn from this data, cheapest first."""
    if ranked(facts):
        return CHEAPEST
    methods = {"sft", "ift"} if facts.feedback == "demonstrations" or facts.desirable else set()
    if facts.desirable and facts.undesirable:
        methods.add("kto")
    if facts.label_pairs:
        methods |= {"dpo", "ipo", "simpo", "orpo", "contrast"}
    if not facts.needs_reward_model:
        methods.add("ppo")
    return tuple(method for method in CHEAPEST if method in methods)


def _reasons(fired: Sequence[Rule], named: Sequence[str], facts: Facts) -> list[Reason]:
    """Of the methods that are named, those for before those against; then what rules out the others."""
    about = [rule for method in named for rule in fired if rule.method == method]
    about.sort(key=lambda rule: (named.index(rule.method), -rule.points))
    out = [rule for rule in fired if rule.method not in named and rule.points < 0 and rule.weight == "decisive"]
    return [Reason(r.method, r.speaks, r.weight, r.says(facts), r.source) for r in (*about, *out)]


def _close_call(order: Sequence[str], points: Mapping[str, int]) -> list[str]:
    if len(order) < 2 or points[order[0]] - points[order[1]] > CLOSE or points[order[1]] <= 0:
        return []
    first, second = order[:2]
    methods = ",".join(dict.fromkeys(("sft", first, second)))
    return [
        f"The reasons for {first} and {second} weigh about the same. "
        f"`tristage compare RECIPE --methods {methods}` decides it on your data."
    ]


def _cautions(f: Facts, measured: bool) -> list[str]:
    """What to mind, as sentences; each rests on a fact."""
    one_label = f.feedback == "labels" and not (f.desirable and f.undesirable)
    found = [
        (not measured, "Nothing was measured on this data yet; papers compare on theirs and disagree with each other."),
        (
            ranked(f) and f.tied_share >= 0.2,
            f"{f.tied_share:.0%} of the answer pairs are tied: nothing learns from them.",
        ),
        (
            ranked(f) and f.comparisons < FEW_COMPARISONS,
            f"{f.comparisons:,} comparisons are few: expect wide intervals, and a reward model that overfits.",
        ),
        (
            f.noisy,
            f"{f.contradicting:,} of {f.repeated:,} repeated verdicts contradict each other and "
            f"{f.scores_against_ranks:,} comparisons their own scores: mending them helps every method.",
        ),
        (f.length_biased, "Better answers are longer: read win rates beside the length-controlled ones."),
        (one_label, "All labels are the same: KTO needs both kinds."),
        (
            f.feedback == "demonstrations",
            "Contrast SFT, DPO and their kin would also need a worse answer per prompt.",
        ),
        (
            not f.fits("simpo"),
            "Not even one model in training fits the GPU memory given: train adapters (`lora: true`).",
        ),
        (
            f.parameters is None and f.gpu_memory_gib is not None,
            "The model's size is not known here, so memory played no part.",
        ),
        (
            f.budget_hours is not None and not measured,
            "How long a stage takes is not known before one has run; `--results` of a comparison tells.",
        ),
    ]
    return [text for holds, text in found if holds]


def measured_methods(measured: Mapping[str, Any]) -> list[str]:
    """Methods of a results.json."""
    return list(measured.get("methods", []))


def _measured(measured: Mapping[str, Any], facts: Facts) -> _Measured:
    judge = measured.get("headline_judge")
    ranks = (measured.get("ranking") or {}).get(judge) or []
    if judge is None or len(ranks) < 2:
        return _Measured((), (), ("The comparison has no headline judge, so its rows decide nothing here.",))
    over = _over_budget(measured, facts)
    order = [row["method"] for row in ranks if row["method"] not in over]
    source = _source(measured, judge)
    reasons = [
        Reason(method, "against", "measured", f"On this data: {text}", f"{source}, cost")
        for method, text in over.items()
    ]
    if not order:
        return _Measured((), tuple(reasons), ("Every measured method takes longer than the budget.",))
    best = order[0]
    rates = (measured.get("win_rates") or {}).get(judge, {}).get(best, {})
    level = [method for method in order if method == best or not _beaten(rates.get(method))]
    chosen = min(level, key=_cheapness)
    reasons = [*_why(chosen, best, measured, judge), *reasons]
    for method in order:
        if method != best and method not in level:
            reasons.append(Reason(method, "against", "measured", f"On this data: {_says(rates[method])}", source))
    cautions = _about_baseline(measured, level, judge)
    others = [method for method in order if method != chosen and method in level]
    return _Measured((chosen, *others), tuple(reasons), tuple(cautions))


def _why(chosen: str, best: str, measured: Mapping[str, Any], judge: str) -> list[Reason]:
    """Why the choice is the best, or as good as the best."""
    source = _source(measured, judge)
    rates = (measured.get("win_rates") or {}).get(judge, {}).get(best, {})
    if chosen == best:
        baseline = measured.get("baseline")
        versus = rates.get(baseline)
        text = _says(versus) if versus else f"{best} ranks first by {judge}."
        return [Reason(best, "for", "measured", f"On this data: {text}", source)]
    said = _says(rates.get(chosen) or {})
    text = (
        f"On this data: {best} ranks first by {judge}, but there is no significant difference between {best} and "
        f"{chosen}{f' ({said})' if said else ''}, and {chosen} is made for a smaller budget."
    )
    return [
        Reason(chosen, "for", "measured", text, source),
        Reason(best, "for", "measured", f"On this data: {best} ranks first by {judge}, within noise.", source),
    ]


def _about_baseline(measured: Mapping[str, Any], level: Sequence[str], judge: str) -> list[str]:
    baseline = measured.get("baseline")
    if baseline not in level:
        return []
    return [
        f"By {judge} no method is significantly better than {baseline} on this data: more seeds, more prompts or "
        "better feedback come before a choice of method."
    ]


def _over_budget(measured: Mapping[str, Any], facts: Facts) -> dict[str, str]:
    """Methods that took longer than the budget, and the sentence that says so."""
    found = {}
    costs = measured.get("cost") or {}
    for method in measured["methods"]:
        seconds = _seconds(costs.get(method))
        if facts.budget_hours is not None and seconds is not None and seconds > 3600 * facts.budget_hours:
            hours = seconds / 3600
            found[method] = f"{method} took {hours:.1f} hours, over the budget of {facts.budget_hours:g}."
    return found


def _seconds(entry: Mapping[str, Any] | None) -> float | None:
    """Wall seconds of one training, mean over seeds."""
    return None if entry is None else entry.get("wall_seconds")


def _beaten(entry: Mapping[str, Any] | None) -> bool:
    """Whether a win rate of the best against another is significant, adjusted for the number of comparisons."""
    if entry is None:
        return False
    p = entry["p_holm"] if entry.get("p_holm") is not None else entry.get("p")
    return p is not None and p < SIGNIFICANT


def _says(entry: Mapping[str, Any]) -> str:
    return str(entry.get("says", ""))


def _source(measured: Mapping[str, Any], judge: str) -> str:
    prompts = (measured.get("sampling") or {}).get("prompts")
    seeds = len(measured["seeds"])
    return f"measured: judge {judge}, {seeds} seed{'s' * (seeds != 1)}, {prompts} prompts"


def _cheapness(method: str) -> int:
    return CHEAPEST.index(method) if method in CHEAPEST else len(CHEAPEST)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


def read_results(file: str | Path) -> dict[str, Any]:
    """A results.json of `tristage compare`; UserError for anything else."""
    mend = "Give the results.json that `tristage compare` wrote."
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--results: {file} cannot be read: {error.strerror}.", mend=mend) from error
    except ValueError as error:
        raise UserError(f"--results: {file} is not JSON: {error}.", mend=mend) from error
    if not isinstance(found, dict) or not {"methods", "headline_judge", "win_rates", "ranking"} <= found.keys():
        raise UserError(f"--results: {file} holds no comparison.", mend=mend)
    return found


def data_paths(recipe: Recipe) -> list[str]:
    """The data that the facts come from."""
    sources = (recipe.data.sft, recipe.data.preferences, recipe.data.prompts)
    return [source if isinstance(source, str) else source.path for source in sources if source is not None]


def advise_on(recipe: Recipe, machine: Machine, results: str | None, console: Console) -> None:
    """`tristage advise`: reads the data, and `results` (a results.json) where one is given, and prints the advice."""
    measured = None if results is None else read_results(results)
    print_advice(advise(read_facts(recipe, machine), measured), console)
    costs = {} if measured is None else measured.get("cost") or {}
    spent = {method: _seconds(costs.get(method)) for method in CHEAPEST}
    minutes = [f"{method} {seconds / 60:.1f}" for method, seconds in spent.items() if seconds is not None]
    if minutes:
        console.print(f"\nMinutes of wall time that the comparison took: {', '.join(minutes)}", markup=False)


def describe(facts: Facts) -> list[str]:
    """The facts that matter, in lines for people."""
    f = facts
    lines = [f"feedback: {_feedback(f)}"]
    if f.demonstrations and f.feedback != "demonstrations":
        lines.append(f"demonstrations: {f.demonstrations:,}")
    lines.append(f"prompts: {f.prompts:,} with feedback, {f.rollout_prompts:,} to sample from in training")
    if ranked(f):
        lines.append(
            f"ratings: {f.rated_share:.0%} of comparisons; ties: {f.tied_share:.0%} of answer pairs; "
            f"better answers have {_percent(f.length_gap)} characters, and are the longer ones in "
            f"{f.longer_chosen_share:.0%} of comparisons"
        )
    noise = f"noise: {f.contradicting:,} of {f.repeated:,} repeated verdicts decided both ways"
    noise = noise if f.repeated else "noise: no verdict was given twice"
    against = f"; {f.scores_against_ranks:,} of {f.rated_comparisons:,} rated comparisons against their scores"
    if f.feedback != "demonstrations":
        lines.append(noise + (against if f.rated_comparisons else ""))
    size = "of unknown size" if f.parameters is None else f"of {f.parameters / 1e6:,.1f}M parameters"
    tuned = {"base": "no chat template, so probably a base model", "instruct": "instruction-tuned by its looks"}
    lines.append(f"model: {size}; {tuned.get(f.start, 'base or instruct is not known')}")
    if f.gpus is not None:
        memory = f" of {f.gpu_memory_gib:.0f} GiB" if f.gpu_memory_gib else ""
        hours = "" if f.budget_hours is None else f"; {f.budget_hours:g} hours"
        lines.append(f"machine: {f'{f.gpus} GPU{memory}' if f.gpus else 'no GPU'}{hours}")
    return lines


def _percent(share: float) -> str:
    """With its sign, and zero without the minus that rounding may leave."""
    return f"{round(share, 2) + 0.0:+.0%}"


def _feedback(f: Facts) -> str:
    if f.feedback == "labels":
        return f"{f.rows:,} labels, {f.desirable:,} desirable and {f.undesirable:,} not"
    if f.feedback == "demonstrations":
        return f"{f.demonstrations:,} demonstrations and no preferences"
    kind = f"rankings of {f.mean_answers:.1f} answers on average (most {f.most_answers})"
    return f"{f.rows:,} {'pairs' if f.feedback == 'pairs' else kind}, {f.comparisons:,} comparisons"


def print_advice(advice: Advice, console: Console) -> None:
    """The advice for a terminal or a pipe."""
    console.print(Text.assemble("Recommended: ", (_titled(advice.recommended), "bold")), soft_wrap=True)
    if advice.also:
        others = ", ".join(_titled(method) for method in advice.also)
        console.print(f"Also worth a try: {others}", markup=False, soft_wrap=True)
    console.print("\nWhat was found", style="bold")
    for line in describe(advice.facts):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    console.print("\nWhy", style="bold")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for reason in advice.reasons:
        sign = "+" if reason.speaks == "for" else "-"
        text = Text.assemble(reason.text, (f" [{reason.source}]", "dim"))
        table.add_row(Text(f"  {sign} {reason.method} ({reason.weight})"), text)
    console.print(table)
    if advice.cautions:
        console.print("\nMind", style="bold")
        for caution in advice.cautions:
            console.print(f"  {caution}", markup=False, soft_wrap=True)


def _titled(method: str) -> str:
    return f"{method} ({TITLES.get(method, method)})"
