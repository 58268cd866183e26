"""Where each update's responses come from: sampled when they are wanted, or while the update before is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from pipeline.recipe import Recipe
from pipeline.records import Prompt
from pipeline.tokens import EncodedPrompt
from policy.ppo.order import pass_indices
from rollout.batch import Completion, RolloutBatch, refuse_stale
from rollout.engine import RolloutEngine, SamplingOptions
from rollout.split import start


@dataclass
class Rollouts:
    """The rollout batches of a run, whose prompts, order and seeds depend on the number of the update alone.

    With `rollout.async_steps: 1` the responses of update n + 1 are sampled by the weights that update n starts from,
    while it is computed: `begin` after `take`, `end` before weights are loaded. What has been sampled ahead is part of
    the state that a resumed run goes on with.
    """

    engine: RolloutEngine
    prompts: Sequence[EncodedPrompt]
    recipe: Recipe
    pad_id: int
    _ahead: dict[int, list[Completion]] = field(default_factory=dict)
    _begun: tuple[int, Callable[[], list[Completion]]] | None = None

    def take(self, update: int) -> tuple[RolloutBatch, list[Prompt]]:
        """The responses for `update`, with the records of their prompts.

        Raises:
            RuntimeError: they were sampled by other weights than those that the update may learn from.
        """
        prompts = self._prompts(update)
        completions = self._ahead.pop(update, None) or self._start(update)()
        batch = RolloutBatch.from_completions([prompt.ids for prompt in prompts], completions, self.pad_id)
        refuse_stale(batch, update - 1, lag=self.recipe.rollout.async_steps)
        return batch, [prompt.prompt for prompt in prompts]

    def begin(self, update: int) -> None:
        """Begins to sample the responses for `update`, where that is to be done ahead."""
        if self.recipe.rollout.async_steps and update <= self.recipe.ppo.updates:
            self._begun = update, self._start(update)

    def end(self) -> None:
        """Waits for the responses that were begun."""
        if self._begun is not None:
            (update, wait), self._begun = self._begun, None
            self._ahead[update] = wait()

    def state_dict(self) -> dict[str, Any]:
        """The responses that were sampled ahead."""
        return {
            "ahead": {
                update: [(list(c.token_ids), list(c.logprobs), c.finished, c.policy_version) for c in completions]
                for update, completions in self._ahead.items()
            }
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`."""
        self._ahead = {
            update: [Completion(tuple(ids), tuple(logprobs), *rest) for ids, logprobs, *rest in completions]
            for update, completions in state["ahead"].items()
        }

    def _prompts(self, update: int) -> list[EncodedPrompt]:
        recipe = self.recipe
        chosen = pass_indices(len(self.prompts), recipe.ppo.rollout_batch_size, update, recipe.seed)
        return [self.prompts[index] for index in chosen]

    def _start(self, update: int) -> Callable[[], list[Completion]]:
        recipe = self.recipe
        seeds = numpy.random.SeedSequence((recipe.seed, update)).generate_state(recipe.ppo.rollout_batch_size).tolist()
        sampling = SamplingOptions(recipe.data.max_response_tokens, recipe.rollout.temperature)
        return start(self.engine, [prompt.ids for prompt in self._prompts(update)], sampling, seeds)
