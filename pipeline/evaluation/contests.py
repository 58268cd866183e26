"""Contests: two methods' answers to one prompt, which a pairwise judge decides; who judges what, and how it is told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, Protocol

Answers = Mapping[str, Mapping[int, Sequence[Sequence[str]]]]
"""answers[method][seed][prompt_index][sample] -> response."""
EQUAL = "the two answers are equal"
"""Reason of a decision that nobody was asked for."""


@dataclass(frozen=True)
class Contest:
    """Two answers to one prompt, by method `a` and method `b`, trained with the same seed.

    Attributes:
        prompt_index: row of the held-out prompt.
        sample: which of the samples of that prompt; the same for both methods.
        seed: of the training runs.
    """

    prompt_index: int
    sample: int
    seed: int
    a: str
    b: str
    prompt: str
    response_a: str
    response_b: str

    @property
    def id(self) -> str:
        """16 hex digits of a hash of prompt, names and responses; which of the two is `a` does not count."""
        sides = sorted([(self.a, self.response_a), (self.b, self.response_b)])
        return hashlib.sha256(json.dumps([self.prompt, sides]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Decision:
    """What a judge says about a contest.

    Attributes:
        outcome: 1 when `contest.a` wins, 0 when `contest.b` does, 0.5 for a tie; the mean over both orders or over all
            raters. None where the judge came to no verdict: a missing value, and no tie.
        orders: "a", "b" or "tie" as the verdict with `a` shown first, then with `b` shown first; None where a judge
            is not asked in two orders, or was not asked at all.
        reason: why there is no outcome, or no question was asked; "" otherwise.
    """

    contest: Contest
    outcome: float | None
    orders: tuple[str, str] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Selection:
    """Which contests a judge decides.

    Attributes:
        pairs: every method against the baseline, or every two methods.
        prompts: the first so many held-out prompts; None: all.
        samples_per_prompt: the first so many samples of each.
    """

    pairs: Literal["baseline", "all"] = "baseline"
    prompts: int | None = None
    samples_per_prompt: int = 1


class PairwiseJudge(Protocol):
    """Compares two answers.

    Attributes:
        name: key of `eval.judges`.
        kind: "llm" or "votes".
        about: one sentence for the report.
        selection: which contests it is to decide.
    """

    name: str
    kind: str
    about: str
    selection: Selection

    def decide(self, contests: Sequence[Contest]) -> list[Decision]:
        """One decision per contest, in their order. To be called once, with all contests that it is to decide."""
        ...

    def details(self) -> dict[str, Any]:
        """What it is and what its decisions so far rest on: the same for the same decisions, whatever is cached."""
        ...

    def costs(self) -> dict[str, Any]:
        """What the decisions cost, and what of it this process paid."""
        ...


def contests_between(prompts: Sequence[str], answers: Answers, baseline: str, selection: Selection) -> list[Contest]:
    """The contests of a selection, by pair of methods, seed, prompt and sample in this order.

    The baseline is always `b`; of two other methods, `b` is the one that stands first in `answers`. Only seeds and
    samples that both have are compared.

    Args:
        prompts: [P] held-out prompts, as people read them.
        answers: every method's responses to all P prompts; a method may have more samples of a prompt than another.

    Errors:
        ValueError: `baseline` is no method of `answers`, or a method has not P prompts.
    """
    if baseline not in answers:
        raise ValueError(f"baseline {baseline} is none of {', '.join(answers)}")
    for method, seeds in answers.items():
        for seed, rows in seeds.items():
            if len(rows) != len(prompts):
                raise ValueError(f"{method}, seed {seed}: responses to {len(rows)} prompts, not to {len(prompts)}")
    methods = [baseline, *(method for method in answers if method != baseline)]
    pairs = [pair for pair in combinations(methods, 2) if selection.pairs == "all" or baseline in pair]
    return [contest for b, a in pairs for contest in _contests(prompts, a, b, answers, selection)]


def _contests(prompts: Sequence[str], a: str, b: str, answers: Answers, selection: Selection) -> Iterator[Contest]:
    for seed in (seed for seed in answers[a] if seed in answers[b]):
        for index, prompt in enumerate(prompts[: selection.prompts]):
            pairs = zip(answers[a][seed][index], answers[b][seed][index], strict=False)
            for sample, (ours, theirs) in enumerate(pairs):
                if sample < selection.samples_per_prompt:
                    yield Contest(index, sample, seed, a, b, prompt, ours, theirs)
