from __future__ import annotations

import pytest

from pipeline.compare.arms import folder, make_arms, reward_model, seeds
from pipeline.errors import UserError
from pipeline.load import load_recipe
from pipeline.recipe import Recipe


def demo(*overrides: str) -> Recipe:
    return load_recipe("recipes/demo.yaml", ["--compare.methods", "[sft,ppo,dpo]", "--compare.seeds", "2", *overrides])


def outs(recipe: Recipe) -> dict[tuple[str, int], list[str]]:
    arms = make_arms(recipe, dict.fromkeys(recipe.compare.methods, recipe))
    return {(arm.method, arm.seed): [str(step.out) for step in arm.steps] for arm in arms}


def test_the_first_seed_is_the_run_itself_and_others_lie_below() -> None:
    assert outs(demo()) == {
        ("sft", 0): ["runs/demo/sft"],
        ("ppo", 0): ["runs/demo/sft", "runs/demo/rm", "runs/demo/ppo"],
        ("dpo", 0): ["runs/demo/sft", "runs/demo/dpo"],
        ("sft", 1): ["runs/demo/seed1/sft"],
        ("ppo", 1): ["runs/demo/seed1/sft", "runs/demo/seed1/rm", "runs/demo/seed1/ppo"],
        ("dpo", 1): ["runs/demo/seed1/sft", "runs/demo/seed1/dpo"],
    }


def test_seeds_count_from_the_recipes_and_every_stage_has_its_own() -> None:
    recipe = demo("--seed", "5")
    assert seeds(recipe) == [5, 6]
    for arm in make_arms(recipe, dict.fromkeys(recipe.compare.methods, recipe)):
        assert {step.recipe.seed for step in (*arm.steps, arm.evaluation)} == {arm.seed}


def test_shared_stages_once_are_those_of_the_first_seed() -> None:
    found = outs(demo("--compare.shared_stages", "once"))
    assert found["ppo", 1] == ["runs/demo/sft", "runs/demo/rm", "runs/demo/seed1/ppo"]
    assert found["dpo", 1] == ["runs/demo/sft", "runs/demo/seed1/dpo"]


def test_a_method_reads_the_stages_of_its_seed_and_the_evaluation_compares_with_its_sft() -> None:
    recipe = demo()
    arms = make_arms(recipe, dict.fromkeys(recipe.compare.methods, recipe))
    ppo = next(arm for arm in arms if (arm.method, arm.seed) == ("ppo", 1))
    assert ppo.steps[-1].inputs == {"policy": "runs/demo/seed1/sft", "reward_model": "runs/demo/seed1/rm"}
    assert ppo.evaluation.inputs == {"policy": "runs/demo/seed1/ppo", "reference": "runs/demo/seed1/sft"}
    assert ppo.evaluation.recipe.eval.reward_model == "runs/demo/seed1/rm"
    assert str(ppo.evaluation.out) == "runs/demo/compare/evaluations/ppo-seed1/evaluate"


def test_a_checkpoint_that_the_recipe_names_stays_the_methods_start() -> None:
    recipe = demo("--dpo.policy", "somewhere/else", "--ppo.reward_model", "my/rm")
    arms = {arm.method: arm for arm in make_arms(recipe, dict.fromkeys(recipe.compare.methods, recipe))}
    assert "policy" not in arms["dpo"].steps[-1].inputs
    assert [step.stage for step in arms["ppo"].steps] == ["sft", "ppo"]
    assert arms["dpo"].evaluation.recipe.eval.reward_model == "my/rm"


def test_without_ppo_no_reward_model_is_trained_and_nothing_is_scored() -> None:
    recipe = demo("--compare.methods", "[dpo]")
    assert recipe.compare.methods == ("sft", "dpo")
    assert reward_model(recipe, 0) is None
    assert all(step.stage != "rm" for arm in make_arms(recipe, {"dpo": recipe}) for step in arm.steps)


def test_a_budget_has_directories_of_its_own_but_shares_sft_and_rm() -> None:
    recipe = demo("--compare.budget", "steps=400")
    assert str(folder(recipe)) == "runs/demo/compare-steps-400"
    assert outs(recipe)["ppo", 0] == ["runs/demo/sft", "runs/demo/rm", "runs/demo/compare-steps-400/seed0/ppo"]


@pytest.mark.parametrize(
    "budget", ["steps", "steps=0", "epochs=3", "steps=-1", "tokens=1e", "seconds=ten", "tokens=1e999"]
)
def test_a_budget_that_cannot_be_read_is_refused(budget: str) -> None:
    with pytest.raises(UserError, match=r"compare\.budget: write it as steps=400"):
        demo("--compare.budget", budget)


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [("recipe", "recipe", None), ("tokens=2e6", "tokens", 2e6), ("seconds=1.5", "seconds", 1.5)],
)
def test_budgets_are_read(text: str, kind: str, amount: float | None) -> None:
    assert demo("--compare.budget", text).compare.held_equal == (kind, amount)


def test_a_method_named_twice_is_refused() -> None:
    with pytest.raises(UserError, match="'dpo' is named twice"):
        demo("--compare.methods", "[dpo,sft,dpo]")
