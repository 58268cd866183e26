"""A comparison in a few sentences, made from its results: who gains, at what cost, what cannot be told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SIGNIFICANT = 0.05
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
    if not _significant(entry) or entry["mean"] <= 0.5:
        return f"No method is clearly better than {base} by {judge}."
    won = f"it wins {entry['mean']:.0%} [{entry['low']:.0%}, {entry['high']:.0%}] of the comparisons with {base}"
    change = results["differences"].get(judge, {}).get(best)
    moved = f", a mean of {change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]" if change else ""
    return f"{title(best)} gains most by {judge}: {won}{moved}."


def _ties(results: Results, judge: str) -> list[str]:
    """Neighbours of the best that are within noise."""
    ranked = order(results, judge)
    rates = results["win_rates"][judge]
    same = [other for other in ranked[1:] if other in rates[ranked[0]] and not _significant(rates[ranked[0]][other])]
    if not same:
        return []
    names = _listed(same)
    return [f"There is no significant difference between {title(ranked[0])} and {names} (Holm, 5%)."]


def _losers(results: Results, judge: str) -> list[str]:
    base, rates = results["baseline"], results["win_rates"].get(judge, {})
    unclear = [m for m in order(results, judge) if not _significant(rates[m][base])]
    worse = [m for m in order(results, judge) if _significant(rates[m][base]) and rates[m][base]["mean"] < 0.5]
    said = []
    if worse:
        said.append(f"{_listed(worse)} fall behind {base}.")
    if unclear and len(unclear) < len(order(results, judge)):
        said.append(f"{_listed(unclear)} cannot be told from {base}.")
    return said


def _other_judges(results: Results, judge: str) -> list[str]:
    """Whether the other gold judges name the same best method; what the reward model says of it."""
    said, best = [], order(results, judge)[:1]
    for entry in results["judges"]:
        other = entry["name"]
        ranked = order(results, other)
        if other == judge or not ranked or not best:
            continue
        if entry["role"] == "trained_on":
            if ranked[0] != best[0]:
                said.append(f"The reward that PPO is trained on puts {title(ranked[0])} first; it is no judge of it.")
            continue
        agrees = "agrees" if ranked[0] == best[0] else f"puts {title(ranked[0])} first"
        said.append(f"{other} {agrees}.")
    return said


def _lengths(results: Results, judge: str) -> list[str]:
    """Methods whose win rate changes its side, or loses its significance, once lengths are held equal."""
    base, said = results["baseline"], []
    for method in order(results, judge):
        entry = results["win_rates"][judge][method][base]
        controlled = entry["length_controlled"]
        if controlled is None or not _significant(entry):
            continue
        low, high = controlled["low"], controlled["high"]
        if low is not None and high is not None and low <= 0.5 <= high:
            said.append(
                f"At equal length {title(method)}'s lead over {base} is not clear: {controlled['rate']:.0%} "
                f"[{low:.0%}, {high:.0%}] instead of {entry['mean']:.0%}."
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
        "steps": "Every method made the same number of optimiser steps",
        "tokens": "Every method trained on the same number of tokens",
        "seconds": "Every method had the same seconds",
    }[results["budget"]["kind"]]
    return (
        f"{words}. {count} training seed{'s' * (count != 1)}, {sampling['prompts']} held-out prompts x "
        f"{sampling['samples_per_prompt']} samples; intervals are 95%. On other data, models or settings the order may "
        "differ."
    )
