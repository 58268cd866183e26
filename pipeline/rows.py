"""Turns rows into records, field by field; every refusal is a `RowError`."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pipeline.fields import (
    other_columns,
    read_answer,
    read_messages,
    read_number,
    read_numbers,
    read_prompt,
    read_text,
    refuse,
)
from pipeline.formats import Row, excerpt
from pipeline.records import ASSISTANT, HUMAN, LabelledResponse, Prompt, Ranking, RowError, SftExample

Record = TypeVar("Record")

ALIASES = {
    "completions": ("responses", "response"),
    "answer": ("response",),
    "answers": ("responses",),
    "output": ("response",),
    "outputs": ("responses",),
    "instruction": ("prompt",),
    "question": ("prompt",),
    "query": ("prompt",),
    "input": ("prompt",),
    "conversation": ("messages",),
    "conversations": ("messages",),
    "dialogue": ("messages",),
    "content": ("text",),
    "document": ("text",),
    "accepted": ("chosen",),
    "preferred": ("chosen",),
    "refused": ("rejected",),
    "ranking": ("ranks",),
    "desirable": ("label",),
}
"""Columns of other tools and the ones they probably mean here."""
PAIR_COLUMNS = ("chosen", "rejected")
PAIR_RATINGS = ("margin", "score_chosen", "score_rejected")
TURN = re.compile(f"({HUMAN}|{ASSISTANT})")


@dataclass(frozen=True, slots=True)
class Form(Generic[Record]):
    """One accepted set of columns and the function that makes records of such a row."""

    needs: tuple[str, ...]
    parse: Callable[[Row, Counter[str]], list[Record]]
    takes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "/".join(self.needs)


@dataclass(slots=True)
class RowParser(Generic[Record]):
    """Parses the rows of one source, all of which must have the same form.

    `tally` counts what is worth reporting; `unused` are columns that no form of this kind reads.
    """

    kind: str
    forms: tuple[Form[Record], ...]
    form: Form[Record] | None = None
    tally: Counter[str] = field(default_factory=Counter)
    unused: set[str] = field(default_factory=set)
    _known: dict[tuple[str, ...], Form[Record]] = field(default_factory=dict)

    def parse(self, row: Row) -> list[Record]:
        """Records of the row; RowError names the field that is wrong."""
        columns = tuple(row.values)
        form = self._known.get(columns)
        if form is None:
            form = self._known[columns] = self._recognise(row.where, columns)
        if self.form is None:
            self.form = form
        elif form is not self.form:
            raise RowError(
                row.where,
                f"is a {form.name} row, but the rows before it are {self.form.name}.",
                "Keep one form per data set.",
            )
        return form.parse(row, self.tally)

    def _recognise(self, where: str, columns: tuple[str, ...]) -> Form[Record]:
        fitting = [form for form in self.forms if set(form.needs) <= set(columns)]
        fitting = [a for a in fitting if not any(set(a.needs) < set(b.needs) for b in fitting)]
        accepted = f"Accepted forms for data.{self.kind}: {', '.join(f.name for f in self.forms)}."
        found = f"has the columns {', '.join(columns) or '(none)'}"
        if len(fitting) > 1:
            mixed = " and ".join(form.name for form in fitting)
            raise RowError(where, f"{found}, which mix the forms {mixed}.", f"Keep one. {accepted}")
        if not fitting:
            hint = self._hint(columns)
            raise RowError(where, f"{found}, which is no accepted form.", f"{hint}{accepted}")
        read = {*fitting[0].needs, *fitting[0].takes, "split"}
        self.unused |= set(columns) - read
        return fitting[0]

    def _hint(self, columns: tuple[str, ...]) -> str:
        known = {name for form in self.forms for name in (*form.needs, *form.takes)}
        for column in columns:
            if column in known:
                continue
            meant = [name for name in ALIASES.get(column.lower(), ()) if name in known]
            near = meant or difflib.get_close_matches(column.lower(), known, n=1, cutoff=0.75)
            if near:
                return f"Did you mean `{near[0]}` by `{column}`? "
        for kind, forms in FORMS.items():
            if kind != self.kind and any(set(form.needs) <= set(columns) for form in forms):
                return f"It looks like rows for data.{kind}. "
        return ""


def parse_text(row: Row, tally: Counter[str]) -> list[SftExample]:
    """`text`: one example without a prompt."""
    return [SftExample(None, read_text(row, "text", row.values["text"]), row.where)]


def parse_prompt_response(row: Row, tally: Counter[str]) -> list[SftExample]:
    """`prompt` and `response` (or TRL's `completion`), each text or messages: one example."""
    prompt, response = _prompt_and_response(row)
    return [SftExample(prompt, response, row.where)]


def _prompt_and_response(row: Row, *used: str) -> tuple[Prompt, str]:
    name = "response" if "response" in row.values else "completion"
    prompt = read_prompt(row, row.values["prompt"], other_columns(row, "prompt", name, *used))
    return prompt, read_answer(row, name, row.values[name], prompt)


def parse_messages(row: Row, tally: Counter[str]) -> list[SftExample]:
    """`messages`: one example per answer of the assistant; its prompt is all that stands before."""
    messages = read_messages(row, "messages", row.values["messages"])
    columns = other_columns(row, "messages")
    examples = []
    asked = False
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and asked:
            response = read_text(row, f"messages[{i}].content", message["content"])
            prompt = read_prompt(row, list(messages[:i]), columns, "messages")
            examples.append(SftExample(prompt, response, row.where))
        asked = asked or message["role"] == "user"
    if not examples:
        refuse(
            row,
            "messages",
            f"has no assistant message that answers a user: {excerpt(messages[-1])}.",
            "Add the answer or take the row out.",
        )
    tally["conversations"] += 1
    tally["conversations_with_several_answers"] += len(examples) > 1
    tally["unanswered_last_messages"] += messages[-1]["role"] != "assistant"
    return examples


def parse_pair(row: Row, tally: Counter[str]) -> list[Ranking]:
    """`prompt`, `chosen`, `rejected`, perhaps with ratings; chat answers may repeat the prompt."""
    values = row.values
    columns = other_columns(row, "prompt", *PAIR_COLUMNS, *PAIR_RATINGS)
    prompt = read_prompt(row, values["prompt"], columns)
    chosen = values["chosen"]
    if isinstance(prompt.content, str) and isinstance(chosen, list) and len(chosen) > 1:
        prompt = _prompt_inside(row, chosen, columns, prompt.content)
    return [_pair(row, prompt, *(read_answer(row, name, values[name], prompt) for name in PAIR_COLUMNS))]


def parse_implicit_pair(row: Row, tally: Counter[str]) -> list[Ranking]:
    """`chosen` and `rejected` alone: two conversations, or transcripts, that differ in the last answer."""
    values = row.values
    columns = other_columns(row, *PAIR_COLUMNS, *PAIR_RATINGS)
    chosen = values["chosen"]
    if isinstance(chosen, str) and TURN.search(chosen):
        return [_transcript_pair(row, columns)]
    if not isinstance(chosen, list) or len(chosen) < 2:
        refuse(
            row,
            "chosen",
            f"must be a conversation when there is no `prompt` column, not {excerpt(chosen)}.",
            "Add a `prompt` column, or give both answers with the prompt in front: as message lists, or as transcripts "
            r"of `\n\nHuman:` and `\n\nAssistant:` turns.",
        )
    prompt = _prompt_inside(row, chosen, columns)
    return [_pair(row, prompt, *(read_answer(row, name, values[name], prompt) for name in PAIR_COLUMNS))]


def _prompt_inside(row: Row, chosen: list[object], columns: Mapping[str, Any], text: str | None = None) -> Prompt:
    prompt = read_prompt(row, chosen[:-1], columns, "chosen")
    asked = prompt.content[-1]
    if text is not None and isinstance(asked, Mapping) and asked["content"].strip() != text.strip():
        refuse(
            row,
            "chosen",
            f"does not begin with the prompt {excerpt(text)}: before the answer stands {excerpt(asked)}.",
            "Give the prompt as messages, or the answers without it.",
        )
    return prompt


def _transcript_pair(row: Row, columns: Mapping[str, Any]) -> Ranking:
    """Two whole transcripts, as in Anthropic/hh-rlhf: text of Human and Assistant turns.

    They stay plain text, exactly as in the data: the prompt is all up to and with the last `Assistant:`, and an answer
    keeps its leading space, so prompt + answer is the transcript again. That needs no chat template, suits base models,
    and a model with a chat template learns the same text.
    """
    (asked, chosen), (other, rejected) = (_last_turn(row, name) for name in PAIR_COLUMNS)
    if asked != other:
        apart = (i for i, (a, b) in enumerate(zip(asked, other, strict=False)) if a != b)
        same = next(apart, min(len(asked), len(other)))
        refuse(
            row,
            "rejected",
            f"differs from `chosen` before the last Assistant turn: {excerpt(other[same:])} where `chosen` has "
            f"{excerpt(asked[same:])}.",
            "Only the last answer may differ; take the row out.",
        )
    return _pair(row, Prompt(asked, row.where, columns), chosen, rejected)


def _last_turn(row: Row, name: str) -> tuple[str, str]:
    """A transcript up to and with its last `Assistant:`, and the answer behind it."""
    transcript = read_text(row, name, row.values[name])
    turns = TURN.findall(transcript)
    if not transcript.startswith(HUMAN) or turns != [HUMAN, ASSISTANT] * (len(turns) // 2):
        refuse(
            row,
            name,
            f"is no transcript of Human and Assistant in turn: it begins {excerpt(transcript)} and its turns are "
            f"{excerpt(''.join(turns))}.",
            r"Begin it with `\n\nHuman:`, end it with an `\n\nAssistant:` turn, or take the row out.",
        )
    head, turn, answer = transcript.rpartition(ASSISTANT)
    return head + turn, read_text(row, f"{name} (last turn)", answer)


def _pair(row: Row, prompt: Prompt, chosen: str, rejected: str) -> Ranking:
    if chosen == rejected:
        refuse(
            row,
            "rejected",
            f"is the same answer as `chosen`: {excerpt(chosen)}.",
            "Take the row out: it prefers nothing.",
        )
    return Ranking(prompt, (chosen, rejected), (0.0, 1.0), _pair_ratings(row), row.where)


def _pair_ratings(row: Row) -> tuple[float, float] | None:
    """A pair's `margin` m as (m, 0), else `score_chosen` and `score_rejected`; None without either."""
    margin, *scores = (row.values.get(name) for name in PAIR_RATINGS)
    if margin is not None:
        value = read_number(row, "margin", margin)
        if value < 0:
            refuse(
                row,
                "margin",
                f"is negative ({margin}): it says the rejected answer is the better one.",
                "Swap the answers or take the margin out.",
            )
        return value, 0.0
    if scores == [None, None]:
        return None
    return read_number(row, "score_chosen", scores[0]), read_number(row, "score_rejected", scores[1])


def parse_label(row: Row, tally: Counter[str]) -> list[LabelledResponse]:
    """`prompt`, `response` (or TRL's `completion`) and `label`: one answer, desirable or not."""
    prompt, response = _prompt_and_response(row, "label")
    label = row.values["label"]
    if label not in (0, 1):
        shown = f"the text {excerpt(label)}" if isinstance(label, str) else excerpt(label)
        refuse(
            row,
            "label",
            f"must be the boolean true or false, not {shown}.",
            "Write true or false without quotes, or 1 or 0; CSV files cannot hold labels.",
        )
    tally["desirable_answers" if label else "undesirable_answers"] += 1
    return [LabelledResponse(prompt, response, bool(label), row.where)]


def parse_ranking(row: Row, tally: Counter[str]) -> list[Ranking]:
    """`prompt`, `responses`, `ranks` (lower is better, equal is a tie) and perhaps `scores`."""
    values = row.values
    prompt = read_prompt(row, values["prompt"], other_columns(row, "prompt", "responses", "ranks", "scores"))
    answers = values["responses"]
    if not isinstance(answers, list) or len(answers) < 2:
        refuse(row, "responses", f"must be a list of two or more answers, not {excerpt(answers)}.")
    responses = tuple(read_answer(row, f"responses[{i}]", a, prompt) for i, a in enumerate(answers))
    ranks = read_numbers(row, "ranks", values["ranks"], len(responses))
    given = values.get("scores")
    ratings = None if given is None else read_numbers(row, "scores", given, len(responses))
    rank_of: dict[str, float] = {}
    for response, rank in zip(responses, ranks, strict=True):
        if rank_of.setdefault(response, rank) != rank:
            refuse(
                row,
                "responses",
                f"holds one answer with two ranks ({rank_of[response]:g} and {rank:g}): {excerpt(response)}.",
                "Keep it once or give both the same rank.",
            )
    return [Ranking(prompt, responses, ranks, ratings, row.where)]


def parse_prompt(row: Row, tally: Counter[str]) -> list[Prompt]:
    """`prompt`, text or messages; the other columns are kept."""
    return [read_prompt(row, row.values["prompt"], other_columns(row, "prompt"))]


SFT_FORMS = (
    Form(("text",), parse_text),
    Form(("prompt", "response"), parse_prompt_response),
    Form(("prompt", "completion"), parse_prompt_response),
    Form(("messages",), parse_messages),
)
PREFERENCE_FORMS = (
    Form(("prompt", *PAIR_COLUMNS), parse_pair, takes=PAIR_RATINGS),
    Form(PAIR_COLUMNS, parse_implicit_pair, takes=PAIR_RATINGS),
    Form(("prompt", "responses", "ranks"), parse_ranking, takes=("scores",)),
    Form(("prompt", "completion", "label"), parse_label),
    Form(("prompt", "response", "label"), parse_label),
)
PROMPT_FORMS = (Form(("prompt",), parse_prompt),)
FORMS: dict[str, tuple[Form[Any], ...]] = {
    "sft": SFT_FORMS,
    "preferences": PREFERENCE_FORMS,
    "prompts": PROMPT_FORMS,
}
