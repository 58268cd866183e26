"""Pairs and labelled answers as token ids, in the rendering of `pipeline.tokens`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.lengths import LengthReport
from pipeline.preferences import Pair
from pipeline.recipe import DataSection
from pipeline.records import LabelledResponse
from pipeline.tokens import Encoder

SAME_TOKENS = "pairs left out because their answers are the same tokens, as a rule once truncated"


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A pair and the tokens of its prompt and of both answers, each with EOS unless it was cut."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    pair: Pair


@dataclass(frozen=True, slots=True)
class EncodedLabelled:
    """A labelled answer and the tokens of its prompt and of itself, with EOS unless it was cut."""

    prompt_ids: list[int]
    response_ids: list[int]
    row: LabelledResponse


def encode_pairs(pairs: Sequence[Pair], encoder: Encoder, data: DataSection) -> tuple[list[EncodedPair], LengthReport]:
    """Tokens of the pairs; a dropped prompt takes its answers with it.

    Pairs whose answers are the same tokens are left out and counted; UserError when no pair remains.
    """
    tally = encoder.tally(data)
    prompts_ids = encoder.prompts_ids([pair.prompt for pair in pairs])
    chosen_ids = encoder.whole_responses_ids([pair.chosen for pair in pairs])
    rejected_ids = encoder.whole_responses_ids([pair.rejected for pair in pairs])
    encoded = []
    for pair, ids, chosen, rejected in zip(pairs, prompts_ids, chosen_ids, rejected_ids, strict=True):
        prompt = tally.admit(pair.prompt, ids)
        if prompt is None:
            continue
        answers = encoder.cut_response(chosen, tally), encoder.cut_response(rejected, tally)
        if answers[0] == answers[1]:
            tally.warnings[SAME_TOKENS] += 1
        else:
            encoded.append(EncodedPair(prompt, *answers, pair))
    if tally.warnings[SAME_TOKENS] and not encoded:
        raise UserError(
            f"data.preferences: no pair has two answers that differ within data.max_response_tokens = "
            f"{encoder.max_response_tokens}.",
            mend="Raise the limit.",
        )
    return encoded, tally.report(len(encoded))


def encode_labelled(
    rows: Sequence[LabelledResponse], encoder: Encoder, data: DataSection
) -> tuple[list[EncodedLabelled], LengthReport]:
    """Tokens of the labelled answers; a dropped prompt takes its answer with it."""
    tally = encoder.tally(data)
    prompts_ids = encoder.prompts_ids([row.prompt for row in rows])
    responses_ids = encoder.whole_responses_ids([row.response for row in rows])
    encoded = []
    for row, ids, response in zip(rows, prompts_ids, responses_ids, strict=True):
        prompt = tally.admit(row.prompt, ids)
        if prompt is not None:
            encoded.append(EncodedLabelled(prompt, encoder.cut_response(response, tally), row))
    return encoded, tally.report(len(encoded))
