"""How a stage's process ends: its exit codes, and what a person reads then."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75
"""The stage saved its state because it was told to, and wants to be started again."""


def interrupted_message(name: str) -> str:
    """What a person reads after Ctrl-C."""
    return f"{name} was interrupted. Run the same command again: it resumes from the last complete checkpoint."


def killed_message(who: str, number: int, out: Path) -> str:
    """What a person reads after a signal ended a process of the stage in `out`."""
    return (
        f"{who} was ended by signal {number}; {out} is kept. Run the same command again: it resumes. "
        "Signal 9 without anybody sending it is the kernel's when memory runs out: then lower the batch sizes."
    )


def print_error(text: str) -> None:
    """Prints one error paragraph on stderr."""
    Console(stderr=True, highlight=False).print(Text.assemble(("error:", "bold red"), " ", text), soft_wrap=True)
