"""The sections of a report and what stands in each; page and Markdown are written from the same list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from pipeline.report.detail_tables import (
    cost_table,
    external_tables,
    hash_table,
    judge_cost_table,
    judge_table,
    measure_notes,
    measure_table,
    reward_model_table,
    run_terms,
    seed_table,
    weights_table,
)
from pipeline.report.facts import SCORE, Facts
from pipeline.report.figures import bucket_figure, calibration_figure, cost_figure, curve_figure, frontier_figure
from pipeline.report.parts import Bullets, Cell, Code, Fold, Gallery, Heading, Part, Prose, Section, Table, Terms
from pipeline.report.samples import sample_browser
from pipeline.report.tables import contest_table, difference_table, elo_table, headline_table, win_matrix
from pipeline.report.wording import counted, finite, listed, number, plain

_CURVES_IN_SIGHT = 6
_NO_GOLD = (
    "No independent judge took part, so nothing here says which method is better. A reward model that a method was "
    "trained on cannot: name a judge under eval.judges."
)


def sections(facts: Facts, samples: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Every section that the results have something for, in the order of the page."""
    built = [
        Section("summary", "Summary", list(_summary(facts))),
        Section("frontier", "Reward and KL", list(_frontier(facts))),
        Section("win-rates", "Win rates", list(_win_rates(facts))),
        Section("cost", "Cost", list(_cost(facts))),
        Section("measures", "Every measure", list(_measures(facts))),
        Section("curves", "Learning curves", list(_curves(facts))),
    ]
    models = facts.results.get("reward_model") or []
    if models:
        built.append(Section("reward-model", "The reward model", list(_reward_model(models))))
    built.append(Section("samples", "Answers side by side", list(_samples(facts, samples))))
    if facts.section("advice"):
        built.append(Section("advice", "Advice", list(_advice(facts))))
    tables = external_tables(facts)
    if tables:
        lead = Prose("Measured by lm-evaluation-harness outside this comparison and taken in as they are.", quiet=True)
        built.append(Section("external", "External benchmarks", [lead, *tables]))
    return [*built, Section("recipe-and-hashes", "Recipe and hashes", list(_origin(facts)))]


def _summary(facts: Facts) -> Iterator[Part]:
    reading = facts.results.get("reading") or []
    reading = [*reading[:1], *(facts.section("cost").get("reading") or []), *reading[1:]]
    if facts.headline is None:
        yield Prose(_NO_GOLD)
    if reading:
        yield Bullets(reading, large=True)
    yield headline_table(facts)
    yield Fold("How this was measured", [Terms(_setting(facts)), judge_table(facts)])


def _setting(facts: Facts) -> list[tuple[str, str]]:
    sampling, budget = facts.section("sampling"), facts.section("budget")
    shared = {"per_seed": "trained anew for every seed", "once": "trained once and shared by all seeds"}
    pairs = [
        ("methods", f"{listed(facts.methods)}; the baseline is {facts.baseline}"),
        ("seeds", _seeds_in_words(facts)),
        ("SFT and reward model", shared.get(str(facts.results.get("shared_stages")), "not recorded")),
        ("held equal", _budget_in_words(budget, facts)),
        ("answers", _sampling_in_words(sampling)),
    ]
    if not facts.results.get("reward_model"):
        pairs.append(("reward model", "none took part in this comparison"))
    return pairs


def _seeds_in_words(facts: Facts) -> str:
    seeds = listed(str(seed) for seed in facts.seeds)
    if len(facts.seeds) == 1:
        return f"{seeds} alone: intervals are over prompts and say nothing about another training run"
    return f"{seeds}; intervals are over seeds and prompts"


def _budget_in_words(budget: Mapping[str, Any], facts: Facts) -> str:
    amount = finite(budget.get("amount"))
    if budget.get("kind") in (None, "recipe") or amount is None:
        text = "nothing: every method trains as its section of the recipe says"
    else:
        text = f"{number(amount, 0)} {budget['kind']} for each method"
    realised, costs = budget.get("realised") or {}, facts.section("cost")
    if budget.get("kind") == "seconds":
        seconds = {method: costs.get(method, {}).get("training_seconds") for method in facts.methods}
        realised = {method: value and round(value) for method, value in seconds.items()}
    used = ", ".join(f"{method} {plain(value)}" for method, value in realised.items() if value is not None)
    note = budget.get("note") or costs.get("budget_note") or ""
    return ". ".join(part for part in (text, f"Realised: {used}" if used else "", note) if part)


def _sampling_in_words(sampling: Mapping[str, Any]) -> str:
    parts = [
        f"{counted(sampling['prompts'], 'held-out prompt')}" if sampling.get("prompts") else "",
        f"{counted(sampling['samples_per_prompt'], 'sample')} each" if sampling.get("samples_per_prompt") else "",
        f"temperature {plain(sampling['temperature'])}" if sampling.get("temperature") is not None else "",
        f"at most {plain(sampling['max_new_tokens'])} tokens" if sampling.get("max_new_tokens") else "",
        f"engine {sampling['engine']}" if sampling.get("engine") else "",
    ]
    return ", ".join(part for part in parts if part) or "not recorded"


def _frontier(facts: Facts) -> Iterator[Part]:
    names = [name for name in facts.gold if frontier_points(facts, name)]
    if not names and not frontier_points(facts, SCORE):
        yield Prose("No policy has both a KL to the reference and a score, so there is no frontier to draw.")
        return
    if names:
        large = frontier_figure(facts, names[0], small=False)
        if large:
            yield large
    else:
        yield Prose("No independent judge scored these policies; the reward model they were trained on says less.")
    small = [frontier_figure(facts, name, small=True) for name in (*names[1:], SCORE)]
    found = [figure for figure in small if figure]
    if found:
        shared = [] if names else list(dict.fromkeys(method for figure in found for method in figure.legend))
        yield Gallery(found, shared)


def frontier_points(facts: Facts, judge: str) -> bool:
    """Whether any point of the frontier has this judge's value."""
    points = [point for method in facts.methods for point in facts.points(method)]
    values = [point.get("score") if judge == SCORE else (point.get("judges") or {}).get(judge) for point in points]
    return any(finite(value) is not None for value in values)


def _win_rates(facts: Facts) -> Iterator[Part]:
    judged = facts.section("win_rates")
    names = [name for name in (*facts.gold, *judged) if judged.get(name)]
    if not names:
        yield Prose(
            "No win rates: one method alone, or no judge that compares."
            if len(facts.methods) < 2
            else "No judge compared the methods, so there are no win rates."
        )
        return
    if not any(facts.judges[name]["kind"] in ("llm", "votes") for name in names if name in facts.judges):
        yield Prose(
            "No LLM judge and no human votes took part; a contest is won by the answer with the higher score.",
            quiet=True,
        )
    for name in dict.fromkeys(names):
        yield Heading(f"Judge {facts.judge_title(name)}")
        yield win_matrix(facts, name)
        if facts.section("ranking").get(name):
            yield elo_table(facts, name)
        else:
            yield Prose(f"No ranking: {name} has not compared every method with another.", quiet=True)
        details: list[Part] = [contest_table(facts, name)]
        if facts.section("differences").get(name):
            details.append(difference_table(facts, name))
        yield Fold(f"All contests before {name}, with p-values and in words", details)


def _cost(facts: Facts) -> Iterator[Part]:
    figure = cost_figure(facts)
    if figure:
        yield figure
    else:
        yield Prose("No plot of cost against quality: it needs a judge that scores answers and a cost for some method.")
    if facts.section("cost"):
        yield cost_table(facts)
    else:
        yield Prose("No cost was recorded.")
    bills = judge_cost_table(facts)
    if bills:
        yield bills


def _measures(facts: Facts) -> Iterator[Part]:
    if not facts.measures:
        yield Prose("Nothing was measured.")
        return
    yield measure_table(facts)
    notes = measure_notes(facts)
    if notes:
        yield Fold("What each measure is, and its estimator", [Terms(notes)])
    if len(facts.seeds) > 1:
        yield Fold("Seed by seed", [seed_table(facts)])


def _curves(facts: Facts) -> Iterator[Part]:
    curves = facts.section("curves")
    metrics = list(dict.fromkeys(metric for method in facts.methods for metric in curves.get(method, {})))
    if not metrics:
        yield Prose("No method logged a curve.")
        return
    drawn = [curve_figure(facts, metric) for metric in metrics]
    legend = [method for method in facts.methods if curves.get(method)]
    yield Prose("One line a seed. Steps are each method's own: PPO's are not optimiser steps of DPO.", quiet=True)
    yield Gallery(drawn[:_CURVES_IN_SIGHT], legend)
    if drawn[_CURVES_IN_SIGHT:]:
        rest = drawn[_CURVES_IN_SIGHT:]
        yield Fold(f"{counted(len(rest), 'more curve')}", [Gallery(rest, legend)])


def _reward_model(models: Sequence[Mapping[str, Any]]) -> Iterator[Part]:
    yield Prose(
        "What PPO was trained on. Its accuracy bounds what can be learnt from it, and it is no judge of the methods.",
        quiet=True,
    )
    yield reward_model_table(models)
    figures = [calibration_figure(models), bucket_figure(models)]
    yield Gallery([figure for figure in figures if figure])


def _samples(facts: Facts, samples: Sequence[Mapping[str, Any]]) -> Iterator[Part]:
    browser = sample_browser(facts, samples)
    yield browser if browser else Prose("No answers were kept.")


def _advice(facts: Facts) -> Iterator[Part]:
    advice = facts.section("advice")
    also = listed(advice.get("also") or [])
    others = f" Also worth a try: {also}." if also else ""
    yield Bullets([f"Recommended for this data: {advice['recommended']}.{others}"], large=True)
    reasons = [_reason(facts, reason) for reason in advice.get("reasons") or []]
    if reasons:
        header = ["method", "speaks", "weight", "reason", "source"]
        yield Table("advice-reasons", "Reasons, and where each comes from", header, reasons, stacks=True)
    if advice.get("cautions"):
        yield Heading("What to mind")
        yield Bullets(advice["cautions"])
    if advice.get("found"):
        yield Fold("What the advice rests on", [Bullets(advice["found"])])


def _reason(facts: Facts, reason: Mapping[str, Any]) -> list[Cell]:
    method = str(reason.get("for"))
    head = Cell(method, method=method if method in facts.slots else None)
    texts = [reason.get(key) for key in ("speaks", "weight")]
    words = [Cell(plain(reason.get(key)), tone="words") for key in ("text", "source")]
    return [head, *(Cell(plain(text)) for text in texts), *words]


def _origin(facts: Facts) -> Iterator[Part]:
    terms = run_terms(facts)
    yield Terms(terms) if terms else Prose("Command, device and versions were not recorded.")
    yield hash_table(facts)
    weights = weights_table(facts)
    if weights:
        yield Fold("sha256 of every policy's weights", [weights])
    recipe = facts.results.get("recipe")
    if recipe:
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
        yield Code("The resolved recipe", text, "yaml")
