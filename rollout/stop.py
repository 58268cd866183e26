"""Texts that end a response beside the EOS (`rollout.stop`), for every engine that a recipe opens.

A text that is one token of the tokenizer is a stop token of the engine. Every text, that one included, is also looked
for in what was sampled: a token such as two line breaks contains one without being it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.tokens import Encoder
from rollout.batch import Completion
from rollout.engine import RolloutEngine, SamplingOptions

if TYPE_CHECKING:
    import torch

Decode = Callable[[Sequence[int]], str]


def stop_tokens(stops: Sequence[str], encoder: Encoder) -> tuple[int, ...]:
    """The ids of those `stops` that the tokenizer encodes as exactly one token, which decodes back to the text.

    Errors:
        UserError: a stop is the EOS, which ends every response anyway.
    """
    found = []
    for stop, ids in zip(stops, encoder.raw_ids(stops), strict=True):
        if ids == [encoder.eos_token_id]:
            raise UserError(
                f"rollout.stop: {stop!r} is the tokenizer's EOS, which ends every response.", mend="Leave it out."
            )
        if len(ids) == 1 and encoder.decode(ids, special=True) == stop:
            found.append(ids[0])
    return tuple(found)


def cut_at_stop(completion: Completion, decode: Decode, stops: Sequence[str]) -> Completion:
    """The completion up to and including the first token after which its text contains one of `stops`.

    The sampled tokens are kept as they are and never tokenised again; text that the last one carries beyond the stop
    stays. Such a completion is finished; one without a stop is returned unchanged. `decode` gives the text of tokens;
    that of a longer prefix must contain what that of a shorter one does.
    """
    ids = completion.token_ids

    def ended(size: int) -> bool:
        text = decode(ids[:size])
        return any(stop in text for stop in stops)

    if not ended(len(ids)):
        return completion
    size = 1 + bisect_left(range(1, len(ids)), True, key=ended)
    return replace(completion, token_ids=ids[:size], logprobs=completion.logprobs[:size], finished=True)


@dataclass(frozen=True)
class StoppingEngine:
    """An engine whose completions are cut at the first of `stops`; see `RolloutEngine`."""

    engine: RolloutEngine
    decode: Decode
    stops: Sequence[str]

    @property
    def name(self) -> str:
        """The engine's."""
        return self.engine.name

    @property
    def version(self) -> str:
        """The engine's."""
        return self.engine.version

    @property
    def policy_version(self) -> int:
        """The engine's."""
        return self.engine.policy_version

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingOptions, seeds: Sequence[int]
    ) -> list[Completion]:
        """What the engine samples, cut."""
        completions = self.engine.generate(prompts, sampling, seeds)
        return [cut_at_stop(completion, self.decode, self.stops) for completion in completions]

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]], *, version: int | None = None) -> None:
        """Of the engine."""
        self.engine.load_weights(named, version=version)

    def rest(self) -> None:
        """Of the engine."""
        self.engine.rest()

    def close(self) -> None:
        """Of the engine."""
        self.engine.close()


def with_stops(engine: RolloutEngine, stops: Sequence[str], encoder: Encoder) -> RolloutEngine:
    """The engine whose completions end at the first of `stops`; the same one where there is none."""
    return StoppingEngine(engine, partial(encoder.decode, special=True), stops) if stops else engine
