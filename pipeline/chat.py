"""`tristage chat`: a conversation with a policy in the terminal, or with two side by side.

A model with a chat template answers turn by turn; one without completes what is typed, each time
afresh.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from pipeline.chat_pair import reply_pair, reply_text, show_pair
from pipeline.conversation import Conversation, open_conversation

if TYPE_CHECKING:
    from rollout.engine import EngineKind

BLOCK = '"""'
HELP = f"""\
/reset      forget the conversation
/temp 0.7   sampling temperature; 0 takes the most likely token every time
/help       this text
/quit       leave (so does Ctrl-D); Ctrl-C stops a response
Several lines: put {BLOCK} on a line of its own before and after them. A line that starts with // is sent with one /."""


def chat(
    policy: str | Path,
    *,
    against: str | Path | None = None,
    temperature: float = 1.0,
    max_new_tokens: int = 128,
    engine: EngineKind = "transformers",
    seed: int | None = None,
) -> None:
    """Talk to the policy at `policy` (a stage's directory, a model directory or a hub id) until
    /quit.

    With a policy `against`, both get what is typed and answer side by side; each remembers its own
    conversation, and both sample with the same random numbers. The transformers engine is the
    default because it starts at once. Without a `seed` every conversation differs. Raises UserError
    for a path that holds no policy, or options that do not fit it.
    """
    console = Console(highlight=False)
    start = random.SystemRandom().randrange(2**31) if seed is None else seed
    policies = [policy] if against is None else [policy, against]
    with ExitStack() as opened:
        conversations = []
        for path in policies:
            conversation = open_conversation(
                path, temperature=temperature, max_new_tokens=max_new_tokens, engine=engine, seed=start
            )
            opened.callback(conversation.engine.close)
            conversations.append(conversation)
        _greet(conversations, console)
        for message in _messages(console):
            if message.startswith("/") and not message.startswith("//"):
                if _obey(message, conversations, console):
                    break
            elif message:
                _answer(message.removeprefix("/") if message[:2] == "//" else message, conversations, console)


def _greet(conversations: Sequence[Conversation], console: Console) -> None:
    kinds = {True: "answers turn by turn", False: "completes what you type"}
    said = [f"{conversation.name} {kinds[conversation.is_chat]}." for conversation in conversations]
    hint = "/help lists the commands" + (", which act on both." if len(said) > 1 else ".")
    console.print(" ".join([*said, hint]), markup=False, style="dim", soft_wrap=True)


def _messages(console: Console) -> Iterator[str]:
    """What the person types, message by message, until the end of the input.

    On a terminal, pasted lines arrive as one message (bracketed paste of readline).
    """
    terminal = sys.stdin.isatty()
    if terminal:
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")
    while True:
        line = _line("> " if terminal else "")
        if line is None:
            break
        if line.strip() != BLOCK:
            yield line.rstrip()
            continue
        lines = list(iter(lambda: _block_line("| " if terminal else ""), None))
        yield "\n".join(lines).rstrip()
    if terminal:
        console.print()


def _line(prompt: str) -> str | None:
    """One line, or None at the end of the input and at Ctrl-C."""
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        return None


def _block_line(prompt: str) -> str | None:
    line = _line(prompt)
    return None if line is None or line.strip() == BLOCK else line


def _obey(message: str, conversations: Sequence[Conversation], console: Console) -> bool:
    """Carry out a command on every conversation; True when they are over."""
    command, _, argument = message.partition(" ")
    if command == "/quit":
        return True
    if command == "/help":
        console.print(HELP, markup=False)
    elif command == "/reset":
        for conversation in conversations:
            conversation.reset()
        console.print("(nothing is remembered)", style="dim")
    elif command == "/temp":
        try:
            for conversation in conversations:
                conversation.set_temperature(argument.strip())
        except ValueError as error:
            console.print(f"({error})", markup=False, style="dim")
        console.print(f"(temperature {conversations[0].temperature:g})", style="dim")
    else:
        console.print(f"(there is no {command}; /help lists the commands)", markup=False, style="dim")
    return False


def _answer(message: str, conversations: Sequence[Conversation], console: Console) -> None:
    try:
        if len(conversations) > 1:
            show_pair(console, message, conversations, reply_pair(message, conversations))
        else:
            _answer_alone(message, conversations[0], console)
    except KeyboardInterrupt:
        console.print("(stopped)", style="dim")


def _answer_alone(message: str, conversation: Conversation, console: Console) -> None:
    try:
        reply = conversation.reply(message)
    except ValueError as error:
        console.print(f"({error})", markup=False, style="dim")
        return
    console.print(reply_text(message, conversation, reply), soft_wrap=True)
    console.print(f"({reply.summary()})", style="dim")
