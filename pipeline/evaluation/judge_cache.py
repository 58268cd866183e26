"""Answers of a language-model judge, kept on disk: what was asked and paid for once is never asked again.

The file has one JSON object per line, written whole and synced to disk before the answer is used:
`{"key": ..., "text": ..., "finish": ..., "prompt_tokens": ..., "completion_tokens": ...}` and what the writer adds.
A key is the hash of the server's address and the whole request. No line holds the request, or the server's key.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.process import only_one


@dataclass(frozen=True)
class Reply:
    """A server's answer.

    Attributes:
        text: of the answer; "" where there is none.
        finish: why it ended, "stop" or "length" mostly.
        prompt_tokens: what the server counted; None where it does not tell.
        completion_tokens: likewise.
    """

    text: str
    finish: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


def cache_key(base_url: str, request: Mapping[str, Any]) -> str:
    """sha256 of the address and the request: model, messages, sampling settings and whatever else is sent."""
    content = json.dumps({"base_url": base_url.rstrip("/"), "request": request}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


class AnswerCache:
    """The answers in `file`, by key. To be used inside `open_cache` only, by one thread."""

    def __init__(self, file: Path, descriptor: int) -> None:
        self._descriptor = descriptor
        self._replies = _read(file)
        self._old = set(self._replies)

    def get(self, key: str) -> Reply | None:
        """The answer to a request, if there is one."""
        return self._replies.get(key)

    def was_there(self, key: str) -> bool:
        """Whether the answer is older than this opening of the file."""
        return key in self._old

    def put(self, key: str, reply: Reply, about: Mapping[str, str]) -> None:
        """Keeps an answer; on return it is on disk.

        Args:
            about: further fields of its line.
        """
        line = json.dumps({"key": key, **vars(reply), **about}, ensure_ascii=True) + "\n"
        rest = memoryview(line.encode())
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        os.fsync(self._descriptor)
        self._replies[key] = reply


@contextmanager
def open_cache(file: Path) -> Iterator[AnswerCache]:
    """Opens the cache for reading and appending; one process at a time may hold it.

    A last line that was cut off while it was written is dropped.

    Errors:
        UserError: another process holds it, or a line is damaged.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with only_one(file, f"{file}: another process asks this judge.") as descriptor:
        _drop_cut_line(file)
        yield AnswerCache(file, descriptor)


def _drop_cut_line(file: Path) -> None:
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)


def _read(file: Path) -> dict[str, Reply]:
    replies = {}
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            fields = (row["text"], row["finish"], row["prompt_tokens"], row["completion_tokens"])
            replies[row["key"]] = Reply(*fields)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{file}:{number}: this line is no answer of a judge ({type(error).__name__}: {error}).",
                mend="Remove the line; its question is then asked again.",
            ) from error
        if not isinstance(row["text"], str):
            raise UserError(f"{file}:{number}: `text` is no text.", mend="Remove the line; it is then asked again.")
    return replies
