"""From the recipe's preferences to the rows of a method: converted to its kind of data, encoded and counted."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from pipeline.data import Split, load_sft
from pipeline.encoding import encode_labelled, encode_pairs
from pipeline.errors import UserError
from pipeline.preferences import Pair, convert, load_preferences
from pipeline.recipe_direct import ContrastSection
from pipeline.records import Prompt, SftExample
from pipeline.stage import Stage
from pipeline.tokens import EncodedExample, Encoder, encode_sft
from policy.answers import Group
from policy.losses import METHODS
from policy.losses.contrast_sft import TEMPLATES, ContrastTemplate
from policy.preference_data import Row, label_rows, pair_rows


@dataclass(frozen=True)
class MethodData:
    """Training and held-out rows of a method, and their size in words."""

    train: list[Row]
    held_out: list[Row]
    size: str


def load_rows(stage: Stage, encoder: Encoder) -> MethodData:
    """The rows of the stage's method; what was converted, cut and dropped is said and recorded.

    Errors:
        UserError: data that cannot be read or converted, or of which the length limits leave nothing.
    """
    kind = METHODS[stage.name].data
    data = stage.recipe.data
    if kind == "targets" and data.preferences is None:
        split: Split[Any] = load_sft(data)
    else:
        split = convert(load_preferences(data), kind, data.ranking_pairs)
    for line in split.lines():
        stage.say(line)
    sides, lengths = {}, {}
    for name, records in (("train", split.train), ("eval", split.eval)):
        sides[name], lengths[name] = _encode(stage, encoder, records)
    stage.record(data={"preferences": split.report}, lengths=lengths)
    units = {"pairs": "pairs", "labels": "labelled answers", "targets": "answers"}[kind]
    size = f"{len(split.train)} {units} of {len(sides['train'])} rows"
    if kind == "pairs" and stage.name != "contrast":
        pairs = sum(len(row.pairs) for row in sides["train"])
        size = f"{pairs} pairs of {len(sides['train'])} prompts"
    return MethodData(sides["train"], sides["eval"], size)


def _encode(stage: Stage, encoder: Encoder, records: Sequence[Any]) -> tuple[list[Row], dict[str, Any]]:
    data, recipe = stage.recipe.data, stage.recipe
    if stage.name == "contrast":
        texts = contrast_examples(records, recipe.contrast, recipe.seed)
        wide = Encoder(encoder.tokenizer, data.max_prompt_tokens + data.max_response_tokens, data.max_response_tokens)
        examples, report = encode_sft(texts, wide, data)
        rows = [_target_row(example) for example in examples]
    elif METHODS[stage.name].data == "pairs":
        pairs, report = encode_pairs(records, encoder, data)
        rows = pair_rows(pairs)
    elif METHODS[stage.name].data == "labels":
        labelled, report = encode_labelled(records, encoder, data)
        if len(labelled) == 1:
            raise UserError(
                "data.preferences: KTO compares each answer with another row's, and one side of the split has one row.",
                mend="Add rows, or change data.eval_fraction.",
            )
        rows = label_rows(labelled, recipe.seed) if labelled else []
    else:
        examples, report = encode_sft(records, encoder, data)
        rows = [_target_row(example) for example in examples]
    for line in report.lines():
        stage.say(line)
    if not rows:
        raise UserError(
            f"data.preferences: data.long_prompts: {data.long_prompts} leaves no example for {stage.name}.",
            mend="Raise data.max_prompt_tokens.",
        )
    return rows, report.as_dict()


def _target_row(example: EncodedExample) -> Row:
    """A demonstration as a group of one answer; of a plain text without a BOS the first token is the prompt."""
    start = max(1, example.response_start)
    return Row(Group(example.ids[:start], [example.ids[start:]]))


def contrast_template(section: ContrastSection) -> ContrastTemplate:
    """The template that the recipe names or spells out; UserError where a slot is missing."""
    if isinstance(section.template, str):
        return TEMPLATES[section.template]
    try:
        return ContrastTemplate(section.template.training, section.template.inference)
    except ValueError as error:
        raise UserError(f"contrast.template: {error}.", mend="Mend that text of the recipe.") from error


def contrast_examples(pairs: Sequence[Pair], section: ContrastSection, seed: int) -> list[SftExample]:
    """The better answers behind their prompt and, but for a share of them, the worse answer.

    Under `curriculum` clear pairs come first: those of large margin, or, where a margin is missing, of unlike texts.
    """
    template, draw = contrast_template(section), random.Random(seed)
    if section.curriculum:
        rated = all(pair.margin is not None for pair in pairs)
        pairs = sorted(pairs, key=lambda pair: -(pair.margin or 0.0) if rated else _likeness(pair))
    examples = []
    for pair in pairs:
        plain = draw.random() < section.plain_share

        def wrap(text: str, pair: Pair = pair, plain: bool = plain) -> str:
            if plain:
                return template.inference_prompt(section.instruction, text)
            return template.training_prompt(section.instruction, text, pair.rejected)

        examples.append(SftExample(_wrapped(pair.prompt, wrap), pair.chosen, pair.source))
    return examples


def _likeness(pair: Pair) -> float:
    return SequenceMatcher(None, pair.chosen, pair.rejected, autojunk=False).ratio()


def _wrapped(prompt: Prompt, wrap: Callable[[str], str]) -> Prompt:
    """The prompt with its text, or its last message's, put into a template."""
    if isinstance(prompt.content, str):
        return Prompt(wrap(prompt.content), prompt.source)
    *before, last = prompt.content
    return Prompt((*before, {**last, "content": wrap(last["content"])}), prompt.source)
