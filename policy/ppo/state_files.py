"""The directories of saved states: written beside, sealed, renamed; only whole ones have a final name.

`state/.update_000012.partial` becomes `state/update_000012`. What a kill can leave is removed or completed by `sweep`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifacts import sync_directory
from pipeline.seals import read_seal, write_seal
from pipeline.shards import METADATA

SEAL = "checkpoint.json"
REPLICATED = "replicated.pt"
SHARDS = "shards"
_NAME = re.compile(r"update_(\d+)")
_LEFT_BY_A_KILL = re.compile(r"\.(update_\d+)(?:\.damaged)?\.(partial|removed|replaced)")


def rank_file(rank: int) -> str:
    """The file of what is one rank's alone."""
    return f"rank_{rank}.pt"


def folder_of(directory: Path, update: int) -> Path:
    """Where the whole state after `update` updates lies."""
    return directory / f"update_{update:06d}"


def beside(directory: Path, update: int) -> Path:
    """Where that state is written."""
    return _hidden(folder_of(directory, update), "partial")


def begin(directory: Path, update: int) -> None:
    """Makes an empty folder to write the state in."""
    directory.mkdir(parents=True, exist_ok=True)
    sweep(directory)
    beside(directory, update).mkdir()


def written_by(folder: Path, rank: int) -> list[str]:
    """The files in `folder` that `rank` wrote; those of `shards` carry its number."""
    shards = [f"{SHARDS}/{file.name}" for file in sorted((folder / SHARDS).glob(f"__{rank}_*"))]
    if rank == 0:
        shards += [REPLICATED, *([f"{SHARDS}/{METADATA}"] if (folder / SHARDS).is_dir() else [])]
    return [rank_file(rank), *shards]


def commit(directory: Path, update: int, world: int, files: Mapping[str, str], keep: int) -> None:
    """Seals what lies in `beside`, gives it its final name, and keeps the newest `keep` states only."""
    partial, final = beside(directory, update), folder_of(directory, update)
    if (partial / SHARDS).is_dir():
        sync_directory(partial / SHARDS)
    write_seal(partial / SEAL, files, update=update, world=world)
    if final.exists():
        final.rename(_hidden(final, "replaced"))
    partial.rename(final)
    sync_directory(directory)
    sweep(directory)
    for old in [*(folder_of(directory, number) for number in updates(directory)[:-keep]), *directory.glob("*.damaged")]:
        hidden = _hidden(old, "removed")
        old.rename(hidden)
        shutil.rmtree(hidden)


def updates(directory: Path) -> list[int]:
    """The update numbers of the states that have a final name, in rising order."""
    if not directory.is_dir():
        return []
    return sorted(int(match[1]) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name)))


def sweep(directory: Path) -> None:
    """Removes what a kill left half-written or half-removed; a state that was to be replaced gets its name back."""
    if not directory.is_dir():
        return
    for path in list(directory.iterdir()):
        match = _LEFT_BY_A_KILL.fullmatch(path.name)
        if match is None:
            continue
        final = directory / match[1]
        if match[2] == "replaced" and not final.exists():
            path.rename(final)
        else:
            shutil.rmtree(path)


def read_state_seal(directory: Path, update: int) -> dict[str, Any] | None:
    """The seal of the state after `update` updates; None where it is missing, damaged or of another state."""
    seal = read_seal(folder_of(directory, update) / SEAL)
    return seal if seal is not None and seal["update"] == update else None


def set_aside(directory: Path, update: int) -> None:
    """Renames a damaged state to `update_<n>.damaged`, which nobody reads and the next complete state removes."""
    aside = directory / f"{folder_of(directory, update).name}.damaged"
    if aside.exists():
        shutil.rmtree(aside)
    folder_of(directory, update).rename(aside)


def _hidden(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")
