"""Every method against every other: differences from the baseline, win rates, rankings; p-values after Holm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from pipeline.compare.gather import Gathered
from pipeline.evaluation.bradley_terry import rank
from pipeline.evaluation.contests import EQUAL, Contest, Decision
from pipeline.evaluation.intervals import Tested, crossed_interval, holm
from pipeline.evaluation.length_control import length_controlled_interval
from pipeline.evaluation.winrates import mirrored, outcomes, says, says_difference, win_rate
from pipeline.recipe_compare import BASELINE

Pair = tuple[str, str]
Cell = tuple[int, int]
"""A seed and the number of a prompt."""


@dataclass(frozen=True)
class Won:
    """What one judge says of two methods, the first against the second.

    Attributes:
        prompts: numbers of the prompts that were compared, rising.
        outcome: [seeds, prompts] share of the first one's wins, ties half.
        preferences, lengths: [seeds, prompts, answers] the same answer by answer, and characters of the first one's
            answer minus the second one's, for the length control.
    """

    prompts: tuple[int, ...]
    outcome: np.ndarray
    preferences: np.ndarray
    lengths: np.ndarray


def by_scores(gathered: Gathered, judge: str) -> dict[Pair, Won]:
    """Every two methods under a judge that scores answers one by one.

    The outcome of a prompt is over all pairs of the two methods' samples; the length control compares the samples that
    were drawn with the same random numbers.
    """
    scores = {method: gathered.column(method, judge) for method in gathered.of}
    characters = {method: gathered.characters(method) for method in gathered.of}
    found = {}
    for a, b in combinations(gathered.of, 2):
        preferences = (np.sign(scores[a] - scores[b]) + 1) / 2
        prompts = tuple(range(gathered.prompts))
        found[a, b] = Won(prompts, outcomes(scores[a], scores[b]), preferences, characters[a] - characters[b])
    return found


def by_decisions(decisions: Sequence[Decision], seeds: Sequence[int], *, as_one_seed: bool) -> dict[Pair, Won]:
    """Every two methods under a judge that compared answers, from the contests that have an outcome.

    Prompts that lack one with some seed are left out. With `as_one_seed` all outcomes of a prompt count together
    instead, whichever seed they are of: people vote on some of the answers. Where not every differing pair of answers
    was decided, equal ones, which are ties without asking, are left out: they would count for more than their share.
    """
    partly = as_one_seed and any(decision.outcome is None for decision in decisions)
    of_pair: dict[Pair, dict[Cell, list[Decision]]] = {}
    for decision in decisions:
        if decision.outcome is None or (partly and decision.reason == EQUAL):
            continue
        contest = decision.contest
        cells = of_pair.setdefault((contest.a, contest.b), {})
        cells.setdefault((0 if as_one_seed else contest.seed, contest.prompt_index), []).append(decision)
    rows = [0] if as_one_seed else list(seeds)
    return {pair: _won(cells, rows) for pair, cells in of_pair.items() if _complete(cells, rows)}


def _complete(cells: Mapping[Cell, Any], rows: Sequence[int]) -> list[int]:
    """The prompts that were decided for every row."""
    return sorted({prompt for _, prompt in cells if all((row, prompt) in cells for row in rows)})


def _won(cells: Mapping[Cell, Sequence[Decision]], rows: Sequence[int]) -> Won:
    """The table of a pair; where cells hold different numbers of decisions, each cell is their mean."""
    prompts = _complete(cells, rows)
    table = [[cells[row, prompt] for prompt in prompts] for row in rows]
    won = [[[_outcome(d) for d in cell] for cell in row] for row in table]
    lengths = [[[_lead(d.contest) for d in cell] for cell in row] for row in table]
    if len({len(cell) for row in table for cell in row}) > 1:
        won, lengths = ([[[float(np.mean(cell))] for cell in row] for row in each] for each in (won, lengths))
    preferences = np.array(won, dtype=np.float64)
    return Won(tuple(prompts), preferences.mean(2), preferences, np.array(lengths, dtype=np.float64))


def _outcome(decision: Decision) -> float:
    assert decision.outcome is not None
    return decision.outcome


def _lead(contest: Contest) -> float:
    return float(len(contest.response_a) - len(contest.response_b))


def differences(gathered: Gathered, judges: Sequence[str], seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Method - baseline of every judge that scores, paired by prompt; Holm over the methods."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    others = [method for method in gathered.of if method != BASELINE]
    for judge in judges:
        start = gathered.column(BASELINE, judge).mean(2)
        changes = {method: gathered.column(method, judge).mean(2) - start for method in others}
        tested = {method: crossed_interval(change, seed) for method, change in changes.items()}
        adjusted = dict(zip(others, holm([tested[method].p for method in others]), strict=True))
        found[judge] = {
            method: {
                **finite(tested[method]),
                "p_holm": number(adjusted[method]),
                "per_seed": changes[method].mean(1).tolist(),
                "says": says_difference(tested[method], adjusted[method], method, BASELINE, judge),
            }
            for method in others
        }
    return found


def win_rates(won: Mapping[Pair, Won], judge: str, seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Both directions of every pair; Holm over the pairs of the judge."""
    tested = {pair: win_rate(each.outcome, seed) for pair, each in won.items()}
    adjusted = dict(zip(tested, holm([each.p for each in tested.values()]), strict=True))
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (a, b), one in tested.items():
        controlled = _controlled(won[a, b], seed)
        turned = {"rate": _less(controlled["rate"]), "low": _less(controlled["high"]), "high": _less(controlled["low"])}
        for first, second, each, lengths in ((a, b, one, controlled), (b, a, mirrored(one), turned)):
            found.setdefault(first, {})[second] = {
                **finite(each),
                "p_holm": number(adjusted[a, b]),
                "says": says(each, adjusted[a, b], first, second, judge),
                "length_controlled": lengths,
            }
    return found


def _controlled(won: Won, seed: int) -> dict[str, float | None]:
    found = length_controlled_interval(won.preferences, won.lengths, seed)
    return {"rate": found.mean, "low": number(found.low), "high": number(found.high)}


def _less(value: float | None) -> float | None:
    return None if value is None else 1 - value


def ranking(won: Mapping[Pair, Won], methods: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Bradley-Terry strengths and Elo, best first; [] where the judge's comparisons do not link every method."""
    linked = {BASELINE}
    for _ in methods:
        linked |= {name for pair in won for name in pair if linked & set(pair)}
    if linked != set(methods):
        return []
    prompts = sorted({prompt for each in won.values() for prompt in each.prompts})
    ranked = rank({pair: _spread(each, prompts) for pair, each in won.items()}, list(methods), BASELINE, seed)
    return [{key: number(value) for key, value in each._asdict().items()} for each in ranked]


def _spread(won: Won, prompts: Sequence[int]) -> np.ndarray:
    """The outcomes [seeds, prompts] with NaN for prompts that this pair has not."""
    table = np.full((len(won.outcome), len(prompts)), math.nan)
    table[:, np.searchsorted(prompts, won.prompts)] = won.outcome
    return table


def finite(tested: Tested) -> dict[str, float | None]:
    """mean, low, high and p as JSON has them: null where there is no interval."""
    return {key: number(value) for key, value in tested._asdict().items()}


def number(value: Any) -> Any:
    """The value; None for a float that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
