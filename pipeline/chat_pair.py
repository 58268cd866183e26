"""Two policies side by side in the terminal: the same input, the same random numbers, a conversation each."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.conversation import Conversation, Reply, printable

WIDE = 100
"""Columns of a terminal from which on the answers stand side by side; below, and in a pipe, one under the other."""


def reply_pair(message: str, conversations: Sequence[Conversation]) -> list[Reply | str]:
    """What each policy answers, or why it cannot (a message over its context).

    Both sample with the seed of the same turn. When one is interrupted, neither remembers the message.
    """
    turn = max(conversation.turns for conversation in conversations)
    before = [list(conversation.messages) for conversation in conversations]
    replies: list[Reply | str] = []
    try:
        for conversation in conversations:
            conversation.turns = turn
            try:
                replies.append(conversation.reply(message))
            except ValueError as error:
                replies.append(str(error))
    except KeyboardInterrupt:
        for conversation, messages in zip(conversations, before, strict=True):
            conversation.messages = messages
        raise
    return replies


def show_pair(
    console: Console, message: str, conversations: Sequence[Conversation], replies: Sequence[Reply | str]
) -> None:
    """Print the answers in columns on a wide terminal, else stacked, each under its policy's name."""
    parts = [
        (Text(conversation.name, "underline"), *_answer(message, conversation, reply))
        for conversation, reply in zip(conversations, replies, strict=True)
    ]
    if console.width < WIDE or not console.is_terminal:
        for name, answer, note in parts:
            for text in (name, answer, note):
                console.print(text, soft_wrap=True)
        return
    table = Table.grid(expand=True, padding=(0, 4, 0, 0))
    for _ in parts:
        table.add_column(ratio=1, overflow="fold")
    for row in zip(*parts, strict=True):
        table.add_row(*row)
    console.print(table)


def reply_text(message: str, conversation: Conversation, reply: Reply) -> Text:
    """The answer as it is shown; a model that completes has what was typed in front of it."""
    lead = "" if conversation.is_chat else message
    return Text.assemble((lead, "dim"), (printable(reply.text), "bold"))


def _answer(message: str, conversation: Conversation, reply: Reply | str) -> tuple[Text, Text]:
    if isinstance(reply, str):
        return Text(""), Text(f"({reply})", "dim")
    return reply_text(message, conversation, reply), Text(f"({reply.summary()})", "dim")
