"""The one error that a person is meant to read: what is wrong, where, and how to mend it."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a refused set-up: printed as one paragraph, exit code 2, no traceback.

    Args:
        message: what is wrong, naming the file and line, the recipe key or the directory.
        mend: what to do about it, as an instruction.
    """

    def __init__(self, message: str, *, mend: str = "") -> None:
        super().__init__(f"{message} {mend}".strip())
        self.message = message
        self.mend = mend
