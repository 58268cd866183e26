"""Seals: a JSON file, written last, that holds the sha256 of every other file of a directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.artifacts import sha256_file, sync_directory, write_json
from pipeline.errors import UserError
from pipeline.ranks import ALONE, Ranks

VERSION = 1


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """A block that every rank enters: where it fails on one of them, it fails on all, once all have left it.

    The block holds either no collective, or nothing that can fail on some ranks alone.

    Errors:
        UserError, RuntimeError: what went wrong on another rank, with its number; on that rank, the error itself.
    """
    try:
        yield
    except (OSError, RuntimeError, UserError) as error:
        ranks.gather((type(error).__name__, str(error)))
        raise
    failures: list[tuple[str, str] | None] = ranks.gather(None)
    for rank, failure in enumerate(failures):
        if failure is not None:
            kind, text = failure
            raise UserError(text) if kind == UserError.__name__ else RuntimeError(f"rank {rank}: {kind}: {text}")


def hash_files(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """Flushes the files `names` of `directory` to disk and returns the sha256 of each."""
    for name in names:
        sync_directory(directory / name)
    return {name: sha256_file(directory / name) for name in names}


def write_seal(file: Path, files: Mapping[str, str], **entries: Any) -> None:
    """Writes the seal of a directory whose files have the hashes `files`; it holds a hash of itself too."""
    body = {"version": VERSION, **entries, "files": dict(sorted(files.items()))}
    write_json(file, {**body, "sha256": _own_hash(body)})


def read_seal(file: Path) -> dict[str, Any] | None:
    """What `write_seal` wrote, or None where it is missing or damaged.

    Errors:
        UserError: another version of tristage wrote it.
    """
    try:
        seal = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(seal, dict) or seal.pop("sha256", None) != _own_hash(seal):
        return None
    if seal["version"] != VERSION:
        raise UserError(
            f"{file} has version {seal['version']}, this tristage reads {VERSION}.",
            mend="Resume with the tristage that wrote it, or run the stage again with --overwrite: it starts anew.",
        )
    return seal


def find_damage(directory: Path, files: Mapping[str, str], ranks: Ranks = ALONE) -> str | None:
    """The first of `files` that does not have its hash, in words, or None; the ranks share the reading.

    All ranks call it and get the same answer. The file is named from the folder that `directory` lies in.

    Errors:
        OSError: a file may not be read, which does not say that it is damaged.
    """
    names = sorted(files)
    with together(ranks):
        own = {
            index: damage
            for index in ranks.share(range(len(names)))
            if (damage := _damage(directory / names[index], files[names[index]])) is not None
        }
    found = {index: damage for part in ranks.gather(own) for index, damage in part.items()}
    if not found:
        return None
    first = min(found)
    return f"{shown(directory / names[first], directory)} {found[first]}"


def shown(file: Path, directory: Path) -> str:
    """The path of a file of the checkpoint `directory` as a message names it: state/update_000012/replicated.pt."""
    return file.relative_to(directory.parent.parent).as_posix()


def _damage(file: Path, expected: str) -> str | None:
    try:
        return None if sha256_file(file) == expected else "does not have its sha256"
    except PermissionError:
        raise
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _own_hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
