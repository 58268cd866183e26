"""Rollout batches of a run: which prompts and seeds, sampled when, by which weights."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pipeline.ranks import ALONE
from pipeline.recipe import ModelSection, PpoSection, Recipe
from pipeline.recipe_rollout import RolloutSection
from pipeline.records import Prompt
from pipeline.tokens import EncodedPrompt
from policy.ppo.rollouts import Rollouts
from rollout.batch import Completion
from rollout.engine import SamplingOptions
from rollout.split import SharedEngine

PROMPTS = [EncodedPrompt(Prompt(f"p{n}"), [1, n + 3]) for n in range(6)]


class Echo:
    """An engine whose responses are the prompt's last token and the version of its weights."""

    name, version = "echo", "1"

    def __init__(self) -> None:
        self.policy_version = 0
        self.asked: list[tuple[int, list[int]]] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingOptions, seeds: Sequence[int]
    ) -> list[Completion]:
        self.asked.append((self.policy_version, list(seeds)))
        return [Completion((ids[-1], 2), (-1.0, -0.5), True, self.policy_version) for ids in prompts]

    def load_weights(self, named: object, *, version: int | None = None) -> None:
        self.policy_version = self.policy_version + 1 if version is None else version

    def rest(self) -> None: ...

    def close(self) -> None: ...


def recipe_of(async_steps: int) -> Recipe:
    ahead = {"mode": "server", "async_steps": 1} if async_steps else {}
    ppo = PpoSection(updates=4, rollout_batch_size=4, importance_level="token" if async_steps else "off")
    return Recipe(name="x", model=ModelSection(name_or_path="m"), ppo=ppo, rollout=RolloutSection(**ahead))


def rollouts_of(async_steps: int, engine: Echo) -> Rollouts:
    return Rollouts(SharedEngine(engine, ALONE), PROMPTS, recipe_of(async_steps), pad_id=0)


def versions_learnt_from(rollouts: Rollouts, engine: Echo, first: int, last: int) -> list[list[int]]:
    """What the loop of the stage does with them."""
    seen = []
    for update in range(first, last + 1):
        batch, records = rollouts.take(update)
        rollouts.begin(update + 1)
        seen.append(batch.policy_versions.tolist())
        assert [record.content for record in records] == [f"p{ids[0] - 3}" for ids in batch.response_ids.tolist()]
        rollouts.end()
        engine.load_weights((), version=update)
    return seen


@pytest.mark.parametrize(("async_steps", "versions"), [(0, [0, 1, 2, 3]), (1, [0, 0, 1, 2])])
def test_each_update_learns_from_the_weights_that_it_should(async_steps: int, versions: list[int]) -> None:
    engine = Echo()
    seen = versions_learnt_from(rollouts_of(async_steps, engine), engine, 1, 4)
    assert seen == [[version] * 4 for version in versions]
    assert len(engine.asked) == 4, "nothing is sampled for an update after the last"


def test_prompts_and_seeds_depend_on_the_update_alone() -> None:
    asked = []
    for async_steps in (0, 1):
        engine = Echo()
        versions_learnt_from(rollouts_of(async_steps, engine), engine, 1, 4)
        asked.append([seeds for _, seeds in engine.asked])
    assert asked[0] == asked[1]
    assert len({seed for seeds in asked[0] for seed in seeds}) == 16


def test_what_was_sampled_ahead_is_part_of_the_state() -> None:
    engine = Echo()
    rollouts = rollouts_of(1, engine)
    versions_learnt_from(rollouts, engine, 1, 2)
    state = rollouts.state_dict()
    again = Echo()
    fresh = rollouts_of(1, again)
    fresh.load_state_dict(state)
    again.policy_version = 2
    assert versions_learnt_from(fresh, again, 3, 4) == [[1] * 4, [2] * 4]
    assert [version for version, _ in again.asked] == [2], "update 3's responses were not sampled again"


def test_responses_of_weights_that_are_too_old_are_refused() -> None:
    for async_steps, update in ((0, 2), (1, 3)):
        rollouts = rollouts_of(async_steps, Echo())
        with pytest.raises(RuntimeError, match=r"sampled by weights of version 0"):
            rollouts.take(update)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rollout": {"async_steps": 1}, "ppo": {"importance_level": "token"}}, "set rollout.mode: server"),
        ({"rollout": {"async_steps": 1, "mode": "server"}}, "ppo.importance_level is off"),
    ],
)
def test_a_recipe_that_cannot_sample_ahead_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Recipe.model_validate({"name": "x", "model": {"name_or_path": "m"}, **change})
