"""Token lengths of a data set: how long, how many dropped, how many cut; nothing in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any

from pipeline.errors import UserError
from pipeline.recipe import DataSection
from pipeline.records import Prompt

PERCENTILES = (50, 90, 99)
LISTED_SOURCES = 5


@dataclass(frozen=True, slots=True)
class LengthReport:
    """Token counts of one data set and what the limits did to it."""

    rows: int
    kept: int
    max_prompt_tokens: int
    max_response_tokens: int
    long_prompts: str
    """The policy for long prompts that was applied."""
    prompt_tokens: dict[str, int]
    """`min`, `p50`, `p90`, `p99`, `max` before any cut (nearest rank); empty without prompts."""
    response_tokens: dict[str, int]
    """The same of the responses with their EOS; a plain text row counts whole, BOS included."""
    prompts_dropped: int
    prompts_truncated: int
    responses: int
    responses_truncated: int
    """Responses that lost tokens, their EOS among them."""
    warnings: dict[str, int]
    """Other things worth a look, by how often they were met."""
    dropped_sources: tuple[str, ...]
    """Rows of the first dropped prompts."""

    def lines(self) -> list[str]:
        """The report in a few lines for people."""
        lines = []
        if self.prompt_tokens:
            lines.append(
                f"prompt tokens: {_spread(self.prompt_tokens)} (limit {self.max_prompt_tokens}: "
                f"{self.prompts_dropped} dropped, {self.prompts_truncated} truncated "
                f"of {self.rows})"
            )
        if self.dropped_sources:
            more = " ..." if self.prompts_dropped > len(self.dropped_sources) else ""
            lines.append(f"  dropped: {', '.join(self.dropped_sources)}{more}")
        if self.response_tokens:
            ending = ", these end without EOS" if self.responses_truncated else ""
            lines.append(
                f"response tokens: {_spread(self.response_tokens)} (limit {self.max_response_tokens}: "
                f"{self.responses_truncated} truncated of {self.responses}{ending})"
            )
        lines += [f"warning: {count} {text}" for text, count in self.warnings.items()]
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The report for the manifest; JSON-able."""
        return asdict(self) | {"dropped_sources": list(self.dropped_sources)}


@dataclass(slots=True)
class LengthTally:
    """Collects lengths while a data set is encoded and applies the policy for long prompts."""

    data: DataSection
    max_prompt_tokens: int
    max_response_tokens: int
    bos: tuple[int, ...] = ()
    """Leading tokens that a cut on the left keeps."""
    prompt_lengths: list[int] = field(default_factory=list)
    response_lengths: list[int] = field(default_factory=list)
    rows: int = 0
    dropped: int = 0
    prompts_truncated: int = 0
    responses_truncated: int = 0
    warnings: Counter[str] = field(default_factory=Counter)
    dropped_sources: list[str] = field(default_factory=list)

    def admit(self, prompt: Prompt, ids: list[int]) -> list[int] | None:
        """The prompt's tokens within the limit, or None where the row is dropped.

        Raises UserError for a prompt without tokens and a long one under `long_prompts: error`.
        """
        self.rows += 1
        self.prompt_lengths.append(len(ids))
        if not ids:
            raise UserError(
                f"{prompt.source}: the tokenizer makes no token of this prompt.",
                mend="Take the row out or use another tokenizer.",
            )
        if isinstance(prompt.content, str) and prompt.content[-1].isspace():
            self.warnings["prompts end in a space, which most tokenizers put on the next word"] += 1
        limit = self.max_prompt_tokens
        if len(ids) <= limit:
            return ids
        if self.data.long_prompts == "error":
            raise UserError(
                f"{prompt.source}: the prompt has {len(ids)} tokens, over data.max_prompt_tokens = {limit}.",
                mend="Raise the limit, or set data.long_prompts to drop or truncate_left.",
            )
        if self.data.long_prompts == "truncate_left":
            self.prompts_truncated += 1
            kept = self.bos if tuple(ids[: len(self.bos)]) == self.bos else ()
            return [*kept, *ids[len(ids) - limit + len(kept) :]]
        self.dropped += 1
        if len(self.dropped_sources) < LISTED_SOURCES:
            self.dropped_sources.append(prompt.source)
        return None

    def response(self, length: int, truncated: bool) -> None:
        """Count one response of `length` tokens before any cut."""
        self.response_lengths.append(length)
        self.responses_truncated += truncated

    def report(self, kept: int) -> LengthReport:
        """The finished report; UserError when no row is left."""
        if self.rows and not kept:
            raise UserError(
                f"all {self.rows} prompts are over data.max_prompt_tokens = {self.max_prompt_tokens} and were dropped.",
                mend="Raise the limit or set data.long_prompts: truncate_left.",
            )
        return LengthReport(
            rows=self.rows,
            kept=kept,
            max_prompt_tokens=self.max_prompt_tokens,
            max_response_tokens=self.max_response_tokens,
            long_prompts=self.data.long_prompts,
            prompt_tokens=percentiles(self.prompt_lengths),
            response_tokens=percentiles(self.response_lengths),
            prompts_dropped=self.dropped,
            prompts_truncated=self.prompts_truncated,
            responses=len(self.response_lengths),
            responses_truncated=self.responses_truncated,
            warnings=dict(self.warnings),
            dropped_sources=tuple(self.dropped_sources),
        )


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Minimum, nearest-rank percentiles (the ceil(p n / 100)-th smallest) and maximum."""
    if not lengths:
        return {}
    ordered = sorted(lengths)
    middle = {f"p{p}": ordered[ceil(p * len(ordered) / 100) - 1] for p in PERCENTILES}
    return {"min": ordered[0], **middle, "max": ordered[-1]}


def _spread(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
