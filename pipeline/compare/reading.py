"""A comparison in a few sentences, made from its results: who gains, at what cost, what cannot be told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SIGNIFICANT = 0.05
EVEN = 0.5
POOR = 0.75
"""Of the baseline's distinct-2, below which diversity is spoken of."""
TAXED = 1.1
"""Of the baseline's perplexity on SFT data, above which the alignment tax is spoken of."""
TITLES = {"simpo": "SimPO", "contrast": "Contrast SFT"}
"""How methods are written where it is not their name in capitals."""
Results = Mapping[str, Any]


def reading(results: Results) -> list[str]:
    """The sentences of the summary; each rests on numbers that the tables show."""
    judge = results["headline_judge"]
    if judge is None:
        return ["No judge that no method was trained on: name one in eval.judges. Nothing is said of who is better."]
    sentences = [_best(results, judge), *_ties(results, judge), *_losers(results, judge)]
    sentences += [*_other_judges(results, judge), *_lengths(results, judge), *_diversity(results), *_tax(results)]
    sentences += [_scope(results)]
    return [sentence for sentence in sentences if sentence]


def order(results: Results, judge: str) -> list[str]:
    """The methods but the baseline by win rate against it, best first."""
    rates = results["win_rates"].get(judge, {})
    base = results["baseline"]
    others = [method for method in results["methods"] if method != base and base in rates.get(method, {})]
    return sorted(others, key=lambda method: -rates[method][base]["mean"])


def title(method: str) -> str:
    """A method's name in a sentence."""
    return TITLES.get(method, method.upper())


def _listed(methods: Sequence[str]) -> str:
    *others, last = (title(method) for method in methods)
    return f"{', '.join(others)} and {last}" if others else last


def _significant(entry: Mapping[str, Any]) -> bool:
    return entry["p_holm"] is not None and entry["p_holm"] < SIGNIFICANT


def price(results: Results) -> list[str]:
    """What the best method cost beside the next one, in seconds: it differs from run to run, so it stands apart."""
    ranked = order(results, results["headline_judge"]) if results["headline_judge"] else []
    if len(ranked) < 2:
        return []
    first, second = (results["cost"][method] for method in ranked[:2])
    key = "cpu_seconds" if first["gpu_seconds"] is None or second["gpu_seconds"] is None else "gpu_seconds"
    unit = key.partition("_")[0].upper()
    times = first[key] / second[key]
    return [f"{title(ranked[0])} took {times:.1f} times the {unit} time of {title(ranked[1])}, the next by that judge."]


def _best(results: Results, judge: str) -> str:
    ranked = order(results, judge)
    if not ranked:
        return f"{judge} has compared nothing with {results['baseline']}."
    best, base = ranked[0], results["baseline"]
    entry = results["win_rates"][judge][best][base]
    if not _significant(entry) or entry["mean"] <= EVEN:
        return f"No method is clearly better than {base} by {judge}."
    won = f"it wins {entry['mean']:.0%} [{entry['low']:.0%}, {entry['high']:.0%}] of the comparisons with {base}"
    change = results["differences"].get(judge, {}).get(best)
    moved = f", a mean change of {change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]" if change else ""
    return f"{title(best)} gains most by {judge}: {won}{moved}."


def _ties(results: Results, judge: str) -> list[str]:
    """Methods that cannot be told from the best."""
    ranked = order(results, judge)
    rates = results["win_rates"].get(judge, {}).get(ranked[0], {}) if ranked else {}
    same = [other for other in ranked[1:] if other in rates and not _significant(rates[other])]
    if not same:
        return []
    return [f"There is no significant difference between {title(ranked[0])} and {_listed(same)} (Holm, 5%)."]


def _losers(results: Results, judge: str) -> list[str]:
    base, rates, ranked = results["baseline"], results["win_rates"].get(judge, {}), order(results, judge)
    unclear = [method for method in ranked if not _significant(rates[method][base])]
    worse = [method for method in ranked if _clearly(results, judge, method) < 0]
    said = []
    if worse:
        said.append(f"{_listed(worse)} {'fall' if len(worse) > 1 else 'falls'} behind {base}.")
    if unclear and len(unclear) < len(ranked):
        said.append(f"{_listed(unclear)} cannot be told from {base}.")
    return said


def _clearly(results: Results, judge: str, method: str) -> int:
    """1 where a method significantly wins against the baseline, -1 where it loses, else 0."""
    entry = results["win_rates"][judge][method][results["baseline"]]
    if not _significant(entry):
        return 0
    return 1 if entry["mean"] > EVEN else -1


def _other_judges(results: Results, judge: str) -> list[str]:
    """Which method the other judges put first; what the trained reward says of it is no judgement."""
    said, first = [], order(results, judge)[:1]
    for entry in results["judges"]:
        other = entry["name"]
        ranked = order(results, other)
        if other == judge or not ranked or not first:
            continue
        if entry["role"] == "trained_on":
            if ranked[0] != first[0]:
                said.append(f"{other}, which methods were trained on, puts {title(ranked[0])} first; it is no judge.")
        elif _clearly(results, other, ranked[0]) <= 0:
            said.append(f"{other} puts no method clearly before {results['baseline']}.")
        else:
            said.append(f"{other} {'too ' if ranked[0] == first[0] else ''}puts {title(ranked[0])} first.")
    return said


def _lengths(results: Results, judge: str) -> list[str]:
    """Methods whose clear win or loss is not clear, or turns round, once lengths are held equal."""
    base, said = results["baseline"], []
    for method in order(results, judge):
        entry, side = results["win_rates"][judge][method][base], _clearly(results, judge, method)
        controlled = entry["length_controlled"]
        if not side or controlled is None or controlled["low"] is None:
            continue
        rate, low, high = (controlled[key] for key in ("rate", "low", "high"))
        if low > EVEN if side > 0 else high < EVEN:
            continue
        turned = high < EVEN if side > 0 else low > EVEN
        what = f"{title(method)}'s {'lead over' if side > 0 else 'loss to'} {base}"
        said.append(
            f"At equal length {what} {'turns round' if turned else 'is not clear'}: {rate:.0%} [{low:.0%}, {high:.0%}] "
            f"instead of {entry['mean']:.0%}."
        )
    return said


def _diversity(results: Results) -> list[str]:
    measures, base = results["measures"], results["baseline"]
    start = measures[base]["distinct_2"]["mean"]
    poor = [m for m in results["methods"] if measures[m]["distinct_2"]["mean"] < POOR * start]
    listed = ", ".join(f"{title(m)} {measures[m]['distinct_2']['mean']:.2f}" for m in poor)
    return [f"Responses resemble each other more than {base}'s (distinct-2 {start:.2f}): {listed}."] if poor else []


def _tax(results: Results) -> list[str]:
    measures, base = results["measures"], results["baseline"]
    if "sft_perplexity" not in measures[base]:
        return []
    start = measures[base]["sft_perplexity"]["mean"]
    taxed = {m: measures[m]["sft_perplexity"]["mean"] for m in results["methods"] if m != base}
    worst = max(taxed, key=lambda m: taxed[m], default=None)
    if worst is None or taxed[worst] < TAXED * start:
        return []
    return [
        f"{title(worst)} pays the highest alignment tax: perplexity on SFT data {taxed[worst]:.1f} from {start:.1f}."
    ]


def _scope(results: Results) -> str:
    sampling, count = results["sampling"], len(results["seeds"])
    words = {
        "recipe": "Every method ran as its section of the recipe says; nothing was held equal",
        "steps": "Optimiser steps were held equal, as near as whole updates allow",
        "tokens": "Tokens trained on were held equal, as near as a pilot of each method foretold",
        "seconds": "Seconds of training were held equal, as near as a pilot of each method foretold",
    }[results["budget"]["kind"]]
    return (
        f"{words}. {count} training seed{'s' * (count != 1)}, {sampling['prompts']} held-out prompts x "
        f"{sampling['samples_per_prompt']} samples; intervals are 95%. On other data, models or settings the order may "
        "differ."
    )
