"""What a comparison consists of: for every method and seed a recipe, the stages that make its policy, its evaluation.

The first seed's SFT stage and reward model, and under the recipe's own budget its methods too, are those of
`runs/<name>` itself, so that a comparison goes on from what `make sft rm ppo dpo` made. All others lie below.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.recipe import Recipe
from pipeline.recipe_compare import BASELINE
from pipeline.stages import run_directory, stage_inputs

FOLDER = "compare"
"""Of the run directory: what a comparison writes."""


@dataclass(frozen=True)
class Step:
    """A stage to run: its recipe and the inputs that are not where the recipe says."""

    stage: str
    recipe: Recipe
    inputs: Mapping[str, str]

    @property
    def out(self) -> Path:
        """The directory that it makes."""
        return run_directory(self.recipe) / self.stage


@dataclass(frozen=True)
class Arm:
    """One method with one seed.

    Attributes:
        steps: what makes the policy, in order; shared stages stand in several arms.
        evaluation: measures it beside the SFT policy that it started from.
    """

    method: str
    seed: int
    steps: tuple[Step, ...]
    evaluation: Step

    @property
    def policy(self) -> Path:
        """The directory of the finished policy."""
        return self.steps[-1].out


def folder(recipe: Recipe) -> Path:
    """Where the comparison is written: `compare`, or `compare-steps-400` under a budget."""
    budget = recipe.compare.budget
    return run_directory(recipe) / (FOLDER if budget == "recipe" else f"{FOLDER}-{budget.replace('=', '-')}")


def seeds(recipe: Recipe) -> list[int]:
    """The training seeds."""
    return [recipe.seed + place for place in range(recipe.compare.seeds)]


def placed(recipe: Recipe, output_dir: Path, name: str, seed: int) -> Recipe:
    """The recipe of another run: its directory `output_dir/name` and its seed."""
    return recipe.model_copy(update={"output_dir": output_dir.as_posix(), "name": name, "seed": seed})


def with_keys(recipe: Recipe, section: str, **keys: Any) -> Recipe:
    """The recipe with keys of one section replaced, checked anew."""
    dumped = recipe.model_dump(mode="json")
    dumped[section] = {**dumped[section], **keys}
    return Recipe.model_validate(dumped)


def make_arms(recipe: Recipe, methods: Mapping[str, Recipe]) -> list[Arm]:
    """All arms, seed by seed; `methods` are the recipes as the budget has them, by method."""
    return [_arm(recipe, changed, method, seed) for seed in seeds(recipe) for method, changed in methods.items()]


def all_steps(arms: Sequence[Arm]) -> list[Step]:
    """Every stage once, in an order in which they can run: what trains, then what evaluates."""
    training = {step.out: step for arm in arms for step in arm.steps}
    return [*training.values(), *(arm.evaluation for arm in arms)]


def shared_recipe(recipe: Recipe, seed: int) -> Recipe:
    """The recipe of the stages that a seed's methods share."""
    if seed == recipe.seed or recipe.compare.shared_stages == "once":
        return recipe
    return placed(recipe, run_directory(recipe), f"seed{seed}", seed)


def _method_recipe(recipe: Recipe, changed: Recipe, seed: int) -> Recipe:
    """The recipe of a method's own stage, in a directory of its own where seed or budget differ from the recipe's."""
    free = recipe.compare.held_equal.kind == "recipe"
    if seed == recipe.seed and free:
        return recipe
    return placed(changed, run_directory(recipe) if free else folder(recipe), f"seed{seed}", seed)


def _arm(recipe: Recipe, changed: Recipe, method: str, seed: int) -> Arm:
    shared = shared_recipe(recipe, seed)
    start = Step("sft", shared, {})
    steps = [start]
    if method != BASELINE:
        steps += method_steps(recipe, _method_recipe(recipe, changed, seed), method, seed)
    evaluated = placed(recipe, folder(recipe) / "evaluations", f"{method}-seed{seed}", seed)
    inputs = {"policy": str(steps[-1].out), "reference": str(start.out)}
    scored = reward_model(recipe, seed)
    if scored is not None:
        evaluated = with_keys(evaluated, "eval", reward_model=scored)
    return Arm(method, seed, tuple(steps), Step("evaluate", evaluated, inputs))


def method_steps(recipe: Recipe, own: Recipe, method: str, seed: int) -> list[Step]:
    """The stages that `method` needs after SFT: the reward model where it reads one, then its own."""
    shared = shared_recipe(recipe, seed)
    made_by = {
        role: entry.made_by
        for role, entry in stage_inputs(own, method).items()
        if entry.made_by and not _named(own, entry.key)
    }
    inputs = {role: str(run_directory(shared) / stage) for role, stage in made_by.items()}
    needs = [Step(stage, shared, {}) for stage in made_by.values() if stage != BASELINE]
    return [*needs, Step(method, own, inputs)]


def reward_model(recipe: Recipe, seed: int) -> str | None:
    """The reward model whose scores are reported: the recipe's, or that of the RM stage which `ppo` has run."""
    if recipe.eval.reward_model or recipe.ppo.reward_model:
        return recipe.eval.reward_model or recipe.ppo.reward_model
    if "ppo" not in recipe.compare.methods or "reward_model" not in stage_inputs(recipe, "ppo"):
        return None
    return str(run_directory(shared_recipe(recipe, seed)) / "rm")


def _named(recipe: Recipe, key: str) -> bool:
    """Whether the recipe names the input itself."""
    tree: Any = functools.reduce(operator.getitem, key.split(".")[:-1], recipe.model_dump())
    return bool(tree.get(key.rpartition(".")[2]))
