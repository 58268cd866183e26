"""What results.json says, in the words the report needs: judges and their roles, estimates, colours of methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.errors import UserError
from pipeline.report.wording import ALPHA, count, decimals_for, finite, number, percent

VERSION = 1
"""Version of results.json that this package reads."""
SCORE = "score"
KL = "kl_per_sequence"
LENGTH = "length"
_SLOTS = ("sft", "ppo", "dpo", "kto", "simpo", "orpo", "ipo", "ift", "contrast", "generate")
SLOTS = len(_SLOTS)
"""Colours, markers and line styles that methods can have; a method that tristage ships always has the same."""
_RATES = {"eos_rate", "truncation_rate"}
_COUNTS = {"trained_tokens", "generated_tokens", "optimizer_steps", "models_in_memory"}
_TITLES = {
    SCORE: "reward-model score",
    KL: "KL to the reference, per response",
    "kl_per_token": "KL to the reference, per token",
    LENGTH: "response length",
    "eos_rate": "ends with EOS",
    "truncation_rate": "cut off at the limit",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "self_bleu": "self-BLEU",
    "entropy": "entropy",
    "likelihood_length_spearman": "likelihood-length Spearman",
    "reward_accuracy": "accuracy of the implicit reward",
    "ranking_accuracy": "ranking accuracy by likelihood",
    "reward_likelihood_agreement": "agreement of implicit reward and likelihood",
    "sft_perplexity": "perplexity on the SFT set",
    "trained_tokens": "trained tokens",
    "generated_tokens": "generated tokens",
    "optimizer_steps": "optimiser steps",
    "models_in_memory": "models in memory",
}


class Estimate(NamedTuple):
    """A mean with its 95% interval; None for an end that does not exist."""

    mean: float
    low: float | None
    high: float | None
    per_seed: Sequence[float | None]


class Facts:
    """Read-only view of one results.json.

    Args:
        results: the parsed file.
    Raises:
        UserError: the file has another version.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        if results.get("version") != VERSION:
            raise UserError(
                f"results.json has version {results.get('version')}, this report reads {VERSION}.",
                mend="Write it again with this tristage: tristage compare.",
            )
        self.results = results
        self.methods: list[str] = list(results["methods"])
        self.baseline: str = results["baseline"]
        self.seeds: list[int] = list(results["seeds"])
        self.headline: str | None = results.get("headline_judge")
        self.judges: dict[str, Mapping[str, Any]] = {judge["name"]: judge for judge in results["judges"]}
        self.slots = _slots(self.methods)

    @property
    def others(self) -> list[str]:
        """Every method but the baseline."""
        return [method for method in self.methods if method != self.baseline]

    @property
    def gold(self) -> list[str]:
        """Judges that no method was trained on, the headline first."""
        names = [name for name, judge in self.judges.items() if judge["role"] == "gold"]
        return sorted(names, key=lambda name: name != self.headline)

    def section(self, key: str) -> Mapping[str, Any]:
        """A part of results.json; empty where it is absent or null."""
        return self.results.get(key) or {}

    def is_trained_on(self, name: str) -> bool:
        """Whether a judge, or the measure `score`, is what a method was optimised for."""
        return name == SCORE or (name in self.judges and self.judges[name]["role"] == "trained_on")

    def judge_title(self, name: str) -> str:
        """A judge's name, marked where methods were trained on it."""
        return f"{name} (trained on)" if self.is_trained_on(name) else name

    def title(self, measure: str) -> str:
        """A measure in words."""
        named = self.note(measure).get("title") or _TITLES.get(measure, measure)
        marked = self.is_trained_on(measure) and "trained on" not in named
        return f"{named} (trained on)" if marked else named

    def note(self, measure: str) -> Mapping[str, Any]:
        """The note of a measure: title, unit, better, explains; empty where there is none."""
        return self.section("measure_notes").get(measure) or {}

    def estimate(self, method: str, measure: str) -> Estimate | None:
        """A measure of a method; None where it was not measured."""
        found = self.section("measures").get(method, {}).get(measure)
        mean = finite(found.get("mean")) if found else None
        if not found or mean is None:
            return None
        per_seed = [finite(value) for value in found.get("per_seed") or []]
        return Estimate(mean, finite(found.get("low")), finite(found.get("high")), per_seed)

    def measured(self, measure: str) -> bool:
        """Whether any method has this measure."""
        return any(self.estimate(method, measure) for method in self.methods)

    @property
    def measures(self) -> list[str]:
        """Every measure that some method has: gold judges, the trained reward, then the order of the contract."""
        named: dict[str, None] = {}
        for method in self.methods:
            named |= dict.fromkeys(self.section("measures").get(method, {}))
        first = [*self.gold, *(name for name in self.judges if self.is_trained_on(name)), *_TITLES]
        ordered = [name for name in first if name in named] + [name for name in named if name not in first]
        return [name for name in dict.fromkeys(ordered) if self.measured(name)]

    def form(self, measure: str) -> Callable[[float], str]:
        """How numbers of a measure are written, the same for all methods."""
        if measure in _RATES:
            return percent
        if measure in _COUNTS:
            return count
        known = [self.estimate(method, measure) for method in self.methods]
        places = decimals_for(value for found in known if found for value in (found.mean, found.low, found.high))
        return lambda value: number(value, places)

    def win_rate(self, judge: str, ours: str, theirs: str) -> Mapping[str, Any]:
        """The contest of two methods before a judge; empty where there was none."""
        return self.section("win_rates").get(judge, {}).get(ours, {}).get(theirs) or {}

    def verdict(self, method: str) -> str:
        """What the headline judge says of a method against the baseline, as results.json words it."""
        if method == self.baseline:
            return "baseline"
        if self.headline is None:
            return "no verdict: no independent judge"
        difference = self.section("differences").get(self.headline, {}).get(method) or {}
        contest = self.win_rate(self.headline, method, self.baseline)
        return contest.get("says") or difference.get("says") or f"not compared by {self.headline}"

    def points(self, method: str) -> Iterator[Mapping[str, Any]]:
        """The frontier's points of a method that have a KL, seed by seed in order of steps."""
        rows = self.section("frontier").get(method) or []
        known = [row for row in rows if finite(row.get("kl")) is not None]
        return iter(sorted(known, key=lambda row: (row["seed"], row["step"])))


def significance(tested: Mapping[str, Any], null: float) -> int:
    """1 above `null`, -1 below, 0 no significant difference: p after Holm below `ALPHA`."""
    mean = finite(tested.get("mean"))
    p = finite(tested.get("p_holm")) if tested.get("p_holm") is not None else finite(tested.get("p"))
    if mean is None or p is None or p >= ALPHA or mean == null:
        return 0
    return 1 if mean > null else -1


def _slots(methods: Sequence[str]) -> dict[str, int]:
    known = {method: _SLOTS.index(method) for method in methods if method in _SLOTS}
    free = [slot for slot in range(SLOTS) if slot not in known.values()] or list(range(SLOTS))
    unknown = [method for method in methods if method not in known]
    return known | {method: free[place % len(free)] for place, method in enumerate(unknown)}
