"""Turns rows into records, field by field; every refusal is a `RowError`."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NoReturn, TypeVar

from pipeline.formats import Row, excerpt
from pipeline.records import ROLES, Message, Prompt, Ranking, RowError, SftExample

Record = TypeVar("Record")

ALIASES = {
    "completions": ("response", "responses"),
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
}
"""Columns of other tools and the ones they probably mean here."""
ROLE_ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
UNSUPPORTED_KEYS = ("tool_calls", "function_call", "weight")
"""Message keys that would change what is learnt; other extra keys of a message are left out."""


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


def _refuse(row: Row, name: str, problem: str, mend: str = "") -> NoReturn:
    raise RowError(row.where, f"`{name}` {problem}", mend)


def _text(row: Row, name: str, value: object) -> str:
    if value is None:
        _refuse(row, name, "is null.", "Give it text or take the row out.")
    if not isinstance(value, str):
        _refuse(row, name, f"must be text, not {excerpt(value)}.", "Write it as a string.")
    if not value.strip():
        _refuse(row, name, f"is empty ({value!r}).", "Give it text or take the row out.")
    return _encodable(row, name, value)


def _encodable(row: Row, name: str, value: str) -> str:
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            shown = excerpt(value.encode("utf-8", "backslashreplace").decode())
            _refuse(row, name, f"holds half a surrogate pair: {shown}.", "Remove that character.")
    return value


def _messages(row: Row, name: str, value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        _refuse(
            row,
            name,
            f"must be a list of messages, not {excerpt(value)}.",
            'Write [{"role": "user", "content": "..."}, ...].',
        )
    return tuple(_message(row, f"{name}[{i}]", item) for i, item in enumerate(value))


def _message(row: Row, name: str, item: object) -> Message:
    if not isinstance(item, Mapping) or "role" not in item or "content" not in item:
        extra = ""
        if isinstance(item, Mapping) and "from" in item and "value" in item:
            extra = "Rename `from` to role and `value` to content. "
        _refuse(
            row,
            name,
            f"must have the keys role and content, not {excerpt(item)}.",
            f'{extra}Write {{"role": "user", "content": "..."}}.',
        )
    for key in UNSUPPORTED_KEYS:
        if item.get(key) is not None:
            _refuse(row, name, f"has {key} ({excerpt(item[key])}), which no stage reads.")
    role, content = item["role"], item["content"]
    if role not in ROLES:
        meant = ROLE_ALIASES.get(str(role).lower())
        hint = f"Did you mean {meant}? " if meant else ""
        _refuse(row, name, f"has the role {excerpt(role)}.", f"{hint}Roles are {', '.join(ROLES)}.")
    if not isinstance(content, str):
        _refuse(row, f"{name}.content", f"must be text, not {excerpt(content)}.", "Write a string.")
    return {"role": role, "content": _encodable(row, f"{name}.content", content)}


def _prompt(row: Row, value: object, columns: Mapping[str, Any], name: str = "prompt") -> Prompt:
    if not isinstance(value, list):
        return Prompt(_text(row, name, value), row.where, columns)
    messages = _messages(row, name, value)
    if messages[-1]["role"] == "assistant":
        _refuse(
            row,
            name,
            f"ends with an assistant message, {excerpt(messages[-1]['content'])}.",
            "End it with the message to be answered.",
        )
    if not any(message["content"].strip() for message in messages):
        _refuse(row, name, "holds only empty messages.", "Give it text or take the row out.")
    return Prompt(messages, row.where, columns)


def _others(row: Row, *used: str) -> dict[str, Any]:
    return {name: value for name, value in row.values.items() if name not in (*used, "split")}


def _answer(row: Row, name: str, value: object, prompt: Prompt) -> str:
    """An answer as text; a message list must be the answer alone or begin with the prompt."""
    if not isinstance(value, list):
        return _text(row, name, value)
    *context, last = _messages(row, name, value)
    if last["role"] != "assistant":
        _refuse(row, name, f"ends with a {last['role']} message.", "End it with the assistant's answer.")
    if context and tuple(context) != prompt.content:
        _refuse(
            row,
            name,
            f"does not begin with the prompt: before the answer stands {excerpt(context[-1])}.",
            "Only the last message may differ from the prompt.",
        )
    return _text(row, f"{name}[{len(context)}].content", last["content"])


def _numbers(row: Row, name: str, value: object, count: int) -> tuple[float, ...]:
    if not isinstance(value, list):
        _refuse(row, name, f"must be a list of numbers, not {excerpt(value)}.")
    if len(value) != count:
        _refuse(
            row,
            name,
            f"has {len(value)} entries for {count} responses: {excerpt(value)}.",
            "Give one per response, in the same order.",
        )
    return tuple(_number(row, f"{name}[{i}]", item) for i, item in enumerate(value))


def _number(row: Row, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        _refuse(row, name, f"must be a finite number, not {excerpt(value)}.")
    return float(value)


def parse_text(row: Row, tally: Counter[str]) -> list[SftExample]:
    """`text`: one example without a prompt."""
    return [SftExample(None, _text(row, "text", row.values["text"]), row.where)]


def parse_prompt_response(row: Row, tally: Counter[str]) -> list[SftExample]:
    """`prompt` and `response` (or TRL's `completion`), each text or messages: one example."""
    name = "response" if "response" in row.values else "completion"
    prompt = _prompt(row, row.values["prompt"], _others(row, "prompt", name))
    return [SftExample(prompt, _answer(row, name, row.values[name], prompt), row.where)]


def parse_messages(row: Row, tally: Counter[str]) -> list[SftExample]:
    """`messages`: one example per answer of the assistant; its prompt is all that stands before."""
    messages = _messages(row, "messages", row.values["messages"])
    columns = _others(row, "messages")
    examples = []
    asked = False
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and asked:
            response = _text(row, f"messages[{i}].content", message["content"])
            prompt = _prompt(row, list(messages[:i]), columns, "messages")
            examples.append(SftExample(prompt, response, row.where))
        asked = asked or message["role"] == "user"
    if not examples:
        _refuse(
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
    """`prompt`, `chosen`, `rejected`, perhaps `margin`; chat answers may repeat the prompt."""
    values = row.values
    columns = _others(row, "prompt", "chosen", "rejected", "margin")
    prompt = _prompt(row, values["prompt"], columns)
    chosen = values["chosen"]
    if isinstance(prompt.content, str) and isinstance(chosen, list) and len(chosen) > 1:
        prompt = _prompt_inside(row, chosen, columns, prompt.content)
    return [_pair(row, prompt)]


def parse_implicit_pair(row: Row, tally: Counter[str]) -> list[Ranking]:
    """`chosen` and `rejected` alone: two conversations that differ in the last message."""
    chosen = row.values["chosen"]
    if not isinstance(chosen, list) or len(chosen) < 2:
        _refuse(
            row,
            "chosen",
            f"must be a conversation when there is no `prompt` column, not {excerpt(chosen)}.",
            "Add a `prompt` column or give both answers as message lists with the prompt in front.",
        )
    return [_pair(row, _prompt_inside(row, chosen, _others(row, "chosen", "rejected", "margin")))]


def _prompt_inside(row: Row, chosen: list[object], columns: Mapping[str, Any], text: str | None = None) -> Prompt:
    prompt = _prompt(row, chosen[:-1], columns, "chosen")
    asked = prompt.content[-1]
    if text is not None and isinstance(asked, Mapping) and asked["content"].strip() != text.strip():
        _refuse(
            row,
            "chosen",
            f"does not begin with the prompt {excerpt(text)}: before the answer stands {excerpt(asked)}.",
            "Give the prompt as messages, or the answers without it.",
        )
    return prompt


def _pair(row: Row, prompt: Prompt) -> Ranking:
    chosen = _answer(row, "chosen", row.values["chosen"], prompt)
    rejected = _answer(row, "rejected", row.values["rejected"], prompt)
    if chosen == rejected:
        _refuse(
            row,
            "rejected",
            f"is the same answer as `chosen`: {excerpt(chosen)}.",
            "Take the row out: it prefers nothing.",
        )
    margin = row.values.get("margin")
    ratings = None
    if margin is not None:
        ratings = (_number(row, "margin", margin), 0.0)
        if ratings[0] < 0:
            _refuse(
                row,
                "margin",
                f"is negative ({margin}): it says the rejected answer is the better one.",
                "Swap the answers or take the margin out.",
            )
    return Ranking(prompt, (chosen, rejected), (0.0, 1.0), ratings, row.where)


def parse_ranking(row: Row, tally: Counter[str]) -> list[Ranking]:
    """`prompt`, `responses`, `ranks` (lower is better, equal is a tie) and perhaps `scores`."""
    values = row.values
    prompt = _prompt(row, values["prompt"], _others(row, "prompt", "responses", "ranks", "scores"))
    answers = values["responses"]
    if not isinstance(answers, list) or len(answers) < 2:
        _refuse(row, "responses", f"must be a list of two or more answers, not {excerpt(answers)}.")
    responses = tuple(_answer(row, f"responses[{i}]", a, prompt) for i, a in enumerate(answers))
    ranks = _numbers(row, "ranks", values["ranks"], len(responses))
    given = values.get("scores")
    ratings = None if given is None else _numbers(row, "scores", given, len(responses))
    rank_of: dict[str, float] = {}
    for response, rank in zip(responses, ranks, strict=True):
        if rank_of.setdefault(response, rank) != rank:
            _refuse(
                row,
                "responses",
                f"holds one answer with two ranks ({rank_of[response]:g} and {rank:g}): {excerpt(response)}.",
                "Keep it once or give both the same rank.",
            )
    return [Ranking(prompt, responses, ranks, ratings, row.where)]


def parse_prompt(row: Row, tally: Counter[str]) -> list[Prompt]:
    """`prompt`, text or messages; the other columns are kept."""
    return [_prompt(row, row.values["prompt"], _others(row, "prompt"))]


SFT_FORMS = (
    Form(("text",), parse_text),
    Form(("prompt", "response"), parse_prompt_response),
    Form(("prompt", "completion"), parse_prompt_response),
    Form(("messages",), parse_messages),
)
PREFERENCE_FORMS = (
    Form(("prompt", "chosen", "rejected"), parse_pair, takes=("margin",)),
    Form(("chosen", "rejected"), parse_implicit_pair, takes=("margin",)),
    Form(("prompt", "responses", "ranks"), parse_ranking, takes=("scores",)),
)
PROMPT_FORMS = (Form(("prompt",), parse_prompt),)
FORMS: dict[str, tuple[Form[Any], ...]] = {
    "sft": SFT_FORMS,
    "preferences": PREFERENCE_FORMS,
    "prompts": PROMPT_FORMS,
}
