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
from pipeline.compare.spent import training_seconds
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
    """The recipe in which `method` makes `steps` optimiser steps of the policy; PPO as many whole updates as come
    nearest, after those that warm up its critic alone.

    Errors:
        UserError: no step, or no whole update, is left.
    """
    if method == "ppo":
        return _with_updates(recipe, steps / _steps_per_update(recipe))
    if steps < 1:
        raise _too_small(recipe, method, "no optimiser step")
    count = round(steps)
    trainer = {**recipe.model_dump()[method]["trainer"], "max_steps": count}
    return Budgeted(with_keys(recipe, method, trainer=trainer), count)


def _with_updates(recipe: Recipe, updates: float) -> Budgeted:
    count, each = round(updates), _steps_per_update(recipe)
    if not count:
        raise _too_small(recipe, "ppo", f"less than half an update of {each} steps")
    note = "" if count == updates else f"whole updates of {each} steps: {count * each} steps"
    changed = with_keys(recipe, "ppo", updates=recipe.ppo.critic_warmup_updates + count)
    return Budgeted(changed, count * each, note)


def _steps_per_update(recipe: Recipe) -> int:
    return recipe.ppo.num_ppo_epochs * recipe.ppo.num_minibatches


def _too_small(recipe: Recipe, method: str, what: str) -> UserError:
    return UserError(f"compare.budget: {recipe.compare.budget} leaves {what} for {method}.", mend="Raise it.")


def _measured(recipe: Recipe, method: str, amount: float, run: Callable[[Step], Path]) -> Budgeted:
    """Tokens or seconds of a pilot's optimiser step, or of its update for PPO, divide the amount."""
    *before, pilot = [run(step) for step in _pilot(recipe, method)]
    metrics = read_manifest(pilot)["metrics"]
    made, unit = (metrics["updates"], "update") if method == "ppo" else (metrics["optimizer_steps"], "step")
    if recipe.compare.held_equal.kind == "tokens":
        each, spent, how = metrics["trained_tokens"] / made, 0.0, "{:.0f} tokens per {}"
    else:
        each, how = training_seconds(pilot) / made, "{:.3g} s per {}"
        spent = sum(training_seconds(out) for out in before if out.name != BASELINE)
        if method == "ppo":
            spent += each * recipe.ppo.critic_warmup_updates
    if spent >= amount:
        raise UserError(
            f"compare.budget: {recipe.compare.budget}, and {method}'s reward model and critic alone train for "
            f"{spent:.0f} s.",
            mend="Raise it, or make the rm stage shorter.",
        )
    count = (amount - spent) / each
    found = _with_updates(recipe, count) if method == "ppo" else with_steps(recipe, method, count)
    return _with_note(found, how.format(each, unit) + (f" after {spent:.0f} s before the policy" if spent else ""))


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
