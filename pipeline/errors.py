"""Errors that a person is meant to read: what is wrong, where, and how to mend it."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than the system allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "the operation is not permitted",
    errno.EIO: "the disk reports an input/output error",
    errno.ENOTDIR: "a part of the path is a file, not a directory",
    errno.EISDIR: "it is a directory",
    errno.ENAMETOOLONG: "the name is too long",
}
_TORCH_WRITE_ERROR = re.compile(r"PytorchStreamWriter failed|inline_container.*unexpected pos|iostream error")
_FULL_BELOW_BYTES = 16 << 20
_OS_ERROR = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")


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


def disk_message(error: OSError, out: Path) -> str:
    """One paragraph for a full, read-only or forbidden disk."""
    reason = _DISK_ERRORS[error.errno or 0]
    return (
        f"cannot write or read {error.filename or out}: {reason}. Free space or permissions there, or set output_dir "
        "to another place, and run the same command again: it resumes from the last complete checkpoint."
    )


def is_disk_error(error: OSError) -> bool:
    """Whether `error` is one that `disk_message` explains."""
    return error.errno in _DISK_ERRORS


def disk_error_in(error: BaseException, out: Path) -> OSError | None:
    """The disk error behind `error`: itself, what it was raised from, or what its text says.

    safetensors reports a full disk as an error class of its own ("... (os error 28)"), torch.save as a RuntimeError
    about its stream and without the reason; then the space that is left below `out` decides what to call it.
    """
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        if isinstance(current, OSError) and is_disk_error(current):
            return current
        found = _OS_ERROR.search(str(current))
        if found and int(found[1] or found[2]) in _DISK_ERRORS:
            return OSError(int(found[1] or found[2]), str(current))
        if isinstance(current, RuntimeError) and _TORCH_WRITE_ERROR.search(str(current)):
            full = shutil.disk_usage(out).free < _FULL_BELOW_BYTES
            return OSError(errno.ENOSPC if full else errno.EIO, str(current))
        current = current.__cause__ or current.__context__
    return None
