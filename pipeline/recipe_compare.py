"""The section of `tristage compare`: which methods, how many seeds, what is held equal."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, field_validator

from pipeline.recipe_base import Count, NonNegative, Section

BASELINE = "sft"
"""What every method starts from and is compared with."""
Method = Literal["sft", "ppo", "dpo", "ipo", "kto", "simpo", "orpo", "ift", "contrast"]
BudgetKind = Literal["recipe", "steps", "tokens", "seconds"]
_BUDGET = re.compile(r"(steps|tokens|seconds)=(\d+(?:\.\d+)?(?:e\d+)?)")


class Budget(NamedTuple):
    """What every method may use: the `amount` of `kind`; None under `recipe`, where each section says it."""

    kind: BudgetKind
    amount: float | None


class CompareSection(Section):
    """The comparison of several methods on one split, one start and one set of prompts."""

    methods: Annotated[tuple[Method, ...], Field(min_length=1)] = ("sft", "ppo", "dpo", "kto", "simpo")
    """Policies that are compared; `sft`, their start, is always one of them."""
    seeds: Count = 3
    """Training seeds: `seed` and those after it."""
    shared_stages: Literal["per_seed", "once"] = "per_seed"
    """Whether every seed trains its own SFT policy and reward model, or all start from those of the first seed."""
    budget: str = "recipe"
    """What is held equal: `steps=N` (optimiser steps of the policy), `tokens=N` (tokens that the policy is trained on),
    `seconds=N` (CPU seconds, or GPU seconds where there is a GPU, in optimiser steps and rollouts, the reward model's
    steps included), or `recipe`: nothing, every method as its section says."""
    headline_judge: str | None = None
    """The judge that the summary speaks of; default: the first of `eval.judges`."""
    price_per_hour: NonNegative = 0.0
    """Money per hour of this machine, in your currency; 0 leaves money out."""

    @field_validator("methods")
    @classmethod
    def _each_once_and_baseline_first(cls, methods: tuple[Method, ...]) -> tuple[Method, ...]:
        twice = sorted({name for name in methods if methods.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]!r} is named twice; name every method once")
        return (BASELINE, *(name for name in methods if name != BASELINE))

    @field_validator("budget")
    @classmethod
    def _is_a_budget(cls, text: str) -> str:
        if text != "recipe" and not (_BUDGET.fullmatch(text) and 0.0 < float(text.partition("=")[2]) < math.inf):
            raise ValueError("write it as steps=400, tokens=2e6 or seconds=120, or as recipe")
        return text

    @property
    def held_equal(self) -> Budget:
        """`budget`, read."""
        match = _BUDGET.fullmatch(self.budget)
        if match is None:
            return Budget("recipe", None)
        kind: BudgetKind = "steps" if match[1] == "steps" else "tokens" if match[1] == "tokens" else "seconds"
        return Budget(kind, float(match[2]))
