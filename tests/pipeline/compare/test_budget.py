from __future__ import annotations

import pytest

from pipeline.compare.budget import budgeted, with_steps
from pipeline.errors import UserError
from pipeline.load import load_recipe


def test_steps_of_a_direct_method_are_its_trainers() -> None:
    recipe = load_recipe("recipes/demo.yaml")
    found = with_steps(recipe, "dpo", 40)
    assert found.steps == 40
    assert found.recipe.dpo.trainer == {**recipe.dpo.trainer, "max_steps": 40}
    assert found.recipe.kto == recipe.kto


def test_ppo_makes_whole_updates() -> None:
    recipe = load_recipe("recipes/demo.yaml")  # 2 epochs x 2 minibatches = 4 steps an update
    exact, nearest = with_steps(recipe, "ppo", 40), with_steps(recipe, "ppo", 42.4)
    assert (exact.recipe.ppo.updates, exact.steps, exact.note) == (10, 40, "")
    assert (nearest.recipe.ppo.updates, nearest.steps) == (11, 44)
    assert "44 steps" in nearest.note
    with pytest.raises(UserError, match="less than half an update of 4 steps for ppo"):
        with_steps(recipe, "ppo", 1.9)


def test_updates_that_warm_the_critic_up_are_no_steps_of_the_policy() -> None:
    recipe = load_recipe("recipes/demo.yaml", ["--ppo.critic_warmup_updates", "5"])
    found = with_steps(recipe, "ppo", 8)
    assert (found.recipe.ppo.updates, found.steps) == (7, 8)


def test_every_method_but_the_baseline_gets_the_steps() -> None:
    recipe = load_recipe("recipes/demo.yaml", ["--compare.methods", "[ppo,dpo]", "--compare.budget", "steps=20"])
    found = budgeted(recipe, lambda step: pytest.fail(f"{step.stage} is run"))
    assert {method: each.steps for method, each in found.items()} == {"sft": None, "ppo": 20, "dpo": 20}
    assert found["sft"].recipe == recipe


def test_without_a_budget_the_recipe_is_left_alone() -> None:
    recipe = load_recipe("recipes/demo.yaml")
    found = budgeted(recipe, lambda step: pytest.fail(f"{step.stage} is run"))
    assert all(each.recipe == recipe for each in found.values())


def test_a_budget_without_a_step_is_refused() -> None:
    recipe = load_recipe("recipes/demo.yaml", ["--compare.budget", "tokens=10"])
    with pytest.raises(UserError, match="tokens=10 leaves no optimiser step for kto"):
        with_steps(recipe, "kto", 0.4)
