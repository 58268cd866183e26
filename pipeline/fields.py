"""One field of a row at a time: text, messages, prompts, answers, numbers; every refusal is a `RowError`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from pipeline.formats import Row, excerpt
from pipeline.records import ROLES, Message, Prompt, RowError

ROLE_ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
UNSUPPORTED_KEYS = ("tool_calls", "function_call", "weight")
"""Message keys that would change what is learnt; other extra keys of a message are left out."""


def refuse(row: Row, name: str, problem: str, mend: str = "") -> NoReturn:
    """Raise the RowError that names the row, the field, the problem and its mend."""
    raise RowError(row.where, f"`{name}` {problem}", mend)


def read_text(row: Row, name: str, value: object) -> str:
    """Text that is not blank."""
    if value is None:
        refuse(row, name, "is null.", "Give it text or take the row out.")
    if not isinstance(value, str):
        refuse(row, name, f"must be text, not {excerpt(value)}.", "Write it as a string.")
    if not value.strip():
        refuse(row, name, f"is empty ({value!r}).", "Give it text or take the row out.")
    return _encodable(row, name, value)


def _encodable(row: Row, name: str, value: str) -> str:
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            shown = excerpt(value.encode("utf-8", "backslashreplace").decode())
            refuse(row, name, f"holds half a surrogate pair: {shown}.", "Remove that character.")
    return value


def read_messages(row: Row, name: str, value: object) -> tuple[Message, ...]:
    """Chat messages, one or more, of known roles and without tool calls."""
    if not isinstance(value, list) or not value:
        refuse(
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
        refuse(
            row,
            name,
            f"must have the keys role and content, not {excerpt(item)}.",
            f'{extra}Write {{"role": "user", "content": "..."}}.',
        )
    for key in UNSUPPORTED_KEYS:
        if item.get(key) is not None:
            refuse(row, name, f"has {key} ({excerpt(item[key])}), which no stage reads.")
    role, content = item["role"], item["content"]
    if role not in ROLES:
        meant = ROLE_ALIASES.get(str(role).lower())
        hint = f"Did you mean {meant}? " if meant else ""
        refuse(row, name, f"has the role {excerpt(role)}.", f"{hint}Roles are {', '.join(ROLES)}.")
    if not isinstance(content, str):
        refuse(row, f"{name}.content", f"must be text, not {excerpt(content)}.", "Write a string.")
    return {"role": role, "content": _encodable(row, f"{name}.content", content)}


def read_prompt(row: Row, value: object, columns: Mapping[str, Any], name: str = "prompt") -> Prompt:
    """A prompt: text, or messages of which the last is not the assistant's."""
    if not isinstance(value, list):
        return Prompt(read_text(row, name, value), row.where, columns)
    messages = read_messages(row, name, value)
    if messages[-1]["role"] == "assistant":
        refuse(
            row,
            name,
            f"ends with an assistant message, {excerpt(messages[-1]['content'])}.",
            "End it with the message to be answered.",
        )
    if not any(message["content"].strip() for message in messages):
        refuse(row, name, "holds only empty messages.", "Give it text or take the row out.")
    return Prompt(messages, row.where, columns)


def other_columns(row: Row, *used: str) -> dict[str, Any]:
    """The columns beside those used, which go with the prompt."""
    return {name: value for name, value in row.values.items() if name not in (*used, "split")}


def read_answer(row: Row, name: str, value: object, prompt: Prompt) -> str:
    """An answer as text; a message list must be the answer alone or begin with the prompt."""
    if not isinstance(value, list):
        return read_text(row, name, value)
    *context, last = read_messages(row, name, value)
    if last["role"] != "assistant":
        refuse(row, name, f"ends with a {last['role']} message.", "End it with the assistant's answer.")
    if context and tuple(context) != prompt.content:
        refuse(
            row,
            name,
            f"does not begin with the prompt: before the answer stands {excerpt(context[-1])}.",
            "Only the last message may differ from the prompt.",
        )
    return read_text(row, f"{name}[{len(context)}].content", last["content"])


def read_numbers(row: Row, name: str, value: object, count: int) -> tuple[float, ...]:
    """Finite numbers, one per response."""
    if not isinstance(value, list):
        refuse(row, name, f"must be a list of numbers, not {excerpt(value)}.")
    if len(value) != count:
        refuse(
            row,
            name,
            f"has {len(value)} entries for {count} responses: {excerpt(value)}.",
            "Give one per response, in the same order.",
        )
    return tuple(read_number(row, f"{name}[{i}]", item) for i, item in enumerate(value))


def read_number(row: Row, name: str, value: object) -> float:
    """A finite number; a truth value is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        refuse(row, name, f"must be a finite number, not {excerpt(value)}.")
    return float(value)
