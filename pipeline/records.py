"""The row types that every stage speaks: prompts, demonstrations, ranked and labelled answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, str]
"""One chat message: exactly the keys `role` and `content`."""

ROLES = ("system", "user", "assistant", "tool")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
"""What begins a turn in a transcript, which is a conversation as plain text (Anthropic/hh-rlhf)."""


class RowError(Exception):
    """One row that cannot be used: `pipeline.data` makes it a `UserError` or counts it.

    Args:
        where: place of the row, `file:line` or `file:row n`.
        problem: what is wrong, naming the field.
        mend: what to do about it.
    """

    def __init__(self, where: str, problem: str, mend: str = "") -> None:
        super().__init__(f"{where}: {problem}")
        self.where = where
        self.problem = problem
        self.mend = mend


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a policy answers: plain text, or chat messages of which the last is not the assistant's.

    Two prompts are equal when their content is; where they came from does not matter.

    Example:
        >>> Prompt("this film is").key
        'this film is'
        >>> Prompt(({"role": "user", "content": "Hello"},)).key
        '[{"content": "Hello", "role": "user"}]'
    """

    content: str | tuple[Message, ...]
    source: str = field(default="", compare=False)
    """`file:line` of the row it came from."""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The row's other columns, as read."""

    @property
    def key(self) -> str:
        """Canonical text of the content: the text, or the messages as JSON with sorted keys."""
        return self.content if isinstance(self.content, str) else _canonical(self.content)

    @property
    def split_key(self) -> str:
        """The part of the content that decides train or eval; a function of the content alone.

        It is `key`, except that a conversation, or a transcript, counts only up to its first
        answered turn: all prompts cut from one conversation fall on the same side, so no answer
        held out for evaluation stands inside a training prompt.
        """
        if isinstance(self.content, str):
            asked, turn, _ = self.content.partition(ASSISTANT)
            return asked + turn if asked.startswith(HUMAN) else self.content
        asked = False
        for position, message in enumerate(self.content):
            if message["role"] == "assistant" and asked:
                return _canonical(self.content[:position])
            asked = asked or message["role"] == "user"
        return self.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True, slots=True)
class SftExample:
    """A demonstration: the response to imitate; `prompt` is None for plain `text` rows."""

    prompt: Prompt | None
    response: str
    source: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Ranking:
    """K answers to one prompt in order of preference; a pair is K = 2 with ranks (0, 1).

    Example: `Ranking(Prompt("2+2="), ("4", "four", "5"), ranks=(0.0, 0.0, 1.0))` prefers both `4`
    and `four` to `5` and says nothing about `4` against `four`.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    ranks: tuple[float, ...]
    """[K] finite; lower is better, equal is a tie."""
    ratings: tuple[float, ...] | None = None
    """[K] finite, higher is better, in the data's own unit; a pair's margin m reads (m, 0)."""
    source: str = field(default="", compare=False)

    def ordered_pairs(self) -> int:
        """Number of answer pairs with different ranks: what a pairwise loss learns from."""
        ranks = self.ranks
        return sum(a != b for i, a in enumerate(ranks) for b in ranks[i + 1 :])

    def tied_pairs(self) -> int:
        """Number of answer pairs with equal ranks, which a pairwise loss drops."""
        k = len(self.ranks)
        return k * (k - 1) // 2 - self.ordered_pairs()


@dataclass(frozen=True, slots=True)
class LabelledResponse:
    """One answer with a verdict of its own, not against another answer: KTO's kind of data."""

    prompt: Prompt
    response: str
    desirable: bool
    source: str = field(default="", compare=False)


def _canonical(messages: tuple[Message, ...]) -> str:
    return json.dumps([dict(m) for m in messages], ensure_ascii=False, sort_keys=True)
