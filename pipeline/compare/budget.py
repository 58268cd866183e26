"""What every method may use: a budget of steps, tokens or seconds as each method's number of optimiser steps.

Tokens and seconds per step are measured by a pilot, a short run of the method with the first seed. Schedules of the
learning rate end with the last step, so a method is never cut off in the middle of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import read_manifest
from pipeline.compare.arms import Step, folder, method_steps, placed, with_keys
from pipeline.compare.spent import seconds_of, seconds_per_step
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.recipe_compare import BASELINE

PILOT_STEPS = 12
"""Optimiser steps of a pilot, at least; PPO makes whole updates."""
PILOT_UPDATES = 2


@dataclass(frozen=True)
class Budgeted:
    """A method's recipe under the budget.

    Attributes:
        steps: optimiser steps of the policy; None where the recipe says.
        note: how the steps were found, and what is off.
    """

    recipe: Recipe
    steps: int | None
    note: str = ""


def budgeted(recipe: Recipe, run: Callable[[Step], Path]) -> dict[str, Budgeted]:
    """The recipe of every method under `compare.budget`; `run` makes a stage unless it is done.

    Errors:
        UserError: the budget is too small for a method.
    """
    kind, amount = recipe.compare.held_equal
    found = {}
    for method in recipe.compare.methods:
        if amount is None or method == BASELINE:
            found[method] = Budgeted(recipe, None)
        elif kind == "steps":
            found[method] = with_steps(recipe, method, amount)
        else:
            found[method] = _measured(recipe, method, amount, run)
    return found


def with_steps(recipe: Recipe, method: str, steps: float) -> Budgeted:
    """The recipe in which `method` makes `steps` optimiser steps; PPO as many whole updates as come nearest.

    Errors:
        UserError: no step is left.
    """
    if steps < 1:
        raise UserError(
            f"compare.budget: {recipe.compare.budget} leaves no optimiser step for {method}.", mend="Raise it."
        )
    if method != "ppo":
        count = round(steps)
        trainer = {**recipe.model_dump()[method]["trainer"], "max_steps": count}
        return Budgeted(with_keys(recipe, method, trainer=trainer), count)
    per_update = recipe.ppo.num_ppo_epochs * recipe.ppo.num_minibatches
    updates = max(1, round(steps / per_update))
    if updates <= recipe.ppo.critic_warmup_updates:
        raise UserError(
            f"compare.budget: {recipe.compare.budget} gives ppo {updates} updates, and ppo.critic_warmup_updates "
            f"({recipe.ppo.critic_warmup_updates}) leaves none of them for the policy.",
            mend="Raise the budget, or lower ppo.critic_warmup_updates.",
        )
    off = updates * per_update - round(steps)
    note = f"ppo makes whole updates of {per_update} steps: {updates * per_update} steps" if off else ""
    return Budgeted(with_keys(recipe, "ppo", updates=updates), updates * per_update, note)


def _measured(recipe: Recipe, method: str, amount: float, run: Callable[[Step], Path]) -> Budgeted:
    kind = recipe.compare.held_equal.kind
    done: list[tuple[Step, Path]] = [(step, run(step)) for step in _pilot(recipe, method)]
    *before, (_, pilot) = done
    manifest = read_manifest(pilot)
    if kind == "tokens":
        each = manifest["metrics"]["trained_tokens"] / manifest["metrics"]["optimizer_steps"]
        return _with_note(with_steps(recipe, method, amount / each), f"{each:.0f} tokens per step")
    spent = sum(seconds_of(read_manifest(out)) for _, out in before)
    if spent >= amount:
        raise UserError(
            f"compare.budget: {recipe.compare.budget}, and {method}'s reward model alone took {spent:.0f} s.",
            mend="Raise it, or make the rm stage shorter.",
        )
    each = seconds_per_step(pilot)
    found = with_steps(recipe, method, (amount - spent) / each)
    return _with_note(found, f"{each:.3g} s per step" + (f" after {spent:.0f} s of the reward model" if spent else ""))


def _with_note(found: Budgeted, how: str) -> Budgeted:
    return Budgeted(found.recipe, found.steps, "; ".join(filter(None, (how, found.note))))


def _pilot(recipe: Recipe, method: str) -> list[Step]:
    """The shared stages that the method reads, and a short run of it which judges nothing."""
    changes: Mapping[str, Any]
    if method == "ppo":
        changes = {"updates": PILOT_UPDATES, "critic_warmup_updates": 0}
    else:
        trainer = recipe.model_dump()[method]["trainer"]
        changes = {"trainer": {**trainer, "max_steps": PILOT_STEPS, "eval_strategy": "no"}}
    short = with_keys(with_keys(recipe, method, **changes), "eval", prompts=1, samples_per_prompt=1, judges={})
    own = placed(short, folder(recipe), "pilot", recipe.seed)
    return [Step("sft", recipe, {}), *method_steps(recipe, own, method, recipe.seed)]
