"""Locates, hashes and reads a source of rows: a file, a folder, a saved data set or a hub id.

`datasets` is imported only for saved data sets and hub ids.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import UserError
from pipeline.formats import READ_BATCH, READERS, ReadTally, Rows, arrow_rows, is_data_file, read_file
from pipeline.recipe import DataSource

if TYPE_CHECKING:
    import datasets

SPLIT_WORDS = {
    "train": ("train",),
    "eval": ("test", "eval", "evaluation", "validation", "valid", "val", "dev"),
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
NOT_DATA = re.compile(r"(cache|tmp)-?.*\.arrow|.*\.lock")


@dataclass(frozen=True, slots=True)
class Location:
    """Where a source's rows lie: `files` are read by us, `saved` and `hub` through `datasets`."""

    kind: Literal["files", "saved", "hub"]
    source: DataSource
    root: Path
    files: tuple[Path, ...] = ()


def locate(source: str | DataSource, key: str = "data") -> Location:
    """Resolve a source to local files, a saved data set or a hub id, without reading any row.

    Raises UserError, naming the recipe key, for a missing file, an unknown kind of file or a
    folder without data.
    """
    source = DataSource(path=source) if isinstance(source, str) else source
    root = Path(source.path).expanduser()
    if root.is_file():
        return Location("files", source, root, (_known_file(root, key),))
    if root.is_dir():
        if any((root / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return Location("saved", source, root)
        return Location("files", source, root, _folder_files(root, source, key))
    if may_be_hub_id(source.path) and not is_data_file(root):
        return Location("hub", source, root)
    near = _near_names(root)
    raise UserError(
        f"{key}: {source.path} does not exist.",
        mend=f"Did you mean {near}?" if near else "Give a path relative to the working directory, or a hub id.",
    )


def may_be_hub_id(path: str) -> bool:
    """Whether a path that is not there may name something on the hub: `name` or `owner/name`.

    Not when its parent is a local directory: then it is a missing file, and asking the hub for it
    would only cost a minute of retries where there is no network.
    """
    is_new_local_path = "/" in path and Path(path).parent.is_dir()
    return HUB_ID.fullmatch(path) is not None and not is_new_local_path


def read_rows(location: Location, tally: ReadTally, key: str = "data") -> Rows:
    """Yield every row of the source in order; an unreadable one comes as the RowError it causes.

    Raises UserError where the file as a whole cannot be read.
    """
    if location.kind != "files":
        yield from _through_datasets(location, tally, key)
        return
    for path in location.files:
        try:
            yield from read_file(path, tally)
        except OSError as error:
            raise UserError(
                f"{key}: {path} cannot be read: {error.strerror or error}.",
                mend="Check the file and its permissions.",
            ) from error


def fingerprint(location: Location) -> dict[str, Any]:
    """Identity of a source: sha256 of local files; id, configuration and split on the hub."""
    source = location.source
    if location.kind == "hub":
        return {"hub": source.path, "config": source.config, "split": source.split}
    files = location.files or tuple(
        path for path in sorted(location.root.rglob("*")) if path.is_file() and not NOT_DATA.fullmatch(path.name)
    )
    root = location.root if location.root.is_dir() else location.root.parent
    digests = {path.relative_to(root).as_posix(): _file_sha256(path) for path in files}
    whole = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    sha256 = next(iter(digests.values())) if location.root.is_file() else whole
    entry = {"path": source.path, "sha256": sha256, "files": digests}
    return entry | {"split": source.split} if location.kind == "saved" else entry


def _file_sha256(path: Path) -> str:
    try:
        status = path.stat()
        return _sha256_of(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}.", mend="Check the file and its permissions."
        ) from error


@lru_cache(maxsize=4096)
def _sha256_of(path: Path, size: int, modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _near_names(root: Path) -> str:
    if not root.parent.is_dir():
        return ""
    names = [path.name for path in root.parent.iterdir()]
    near = difflib.get_close_matches(root.name, names, n=1)
    return str(root.parent / near[0]) if near else ""


def _known_file(path: Path, key: str) -> Path:
    if is_data_file(path):
        return path
    raise UserError(
        f"{key}: {path} is no kind of data file that can be read.",
        mend=f"Use one of {', '.join(READERS)}, a data set directory or a hub id.",
    )


def _folder_files(root: Path, source: DataSource, key: str) -> tuple[Path, ...]:
    """Data files below a folder; where names say train, test, ..., only those of `source.split`."""
    folder = root / source.config if source.config else root
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and is_data_file(path) and not path.name.startswith((".", "_"))
    ]
    if not files:
        raise UserError(
            f"{key}: {folder} holds no data file.",
            mend=f"It needs at least one of {', '.join('*' + suffix for suffix in READERS)}.",
        )
    sides = {path: _split_words(path.relative_to(folder)) for path in files}
    if not any(sides.values()):
        return tuple(files)
    wanted = source.split.lower()
    same = next((words for words in SPLIT_WORDS.values() if wanted in words), (wanted,))
    exact = [path for path in files if wanted in sides[path]]
    chosen = exact or [path for path in files if set(same) & sides[path]]
    if not chosen:
        raise UserError(
            f"{key}: {folder} has no file of the split {source.split!r}; "
            f"its files are {', '.join(path.name for path in files[:6])}.",
            mend="Set `split` of this source to one that is there.",
        )
    return tuple(chosen)


def _split_words(path: Path) -> set[str]:
    known = {word for words in SPLIT_WORDS.values() for word in words}
    return known & set(re.split(r"[^a-z]+", path.as_posix().lower()))


def _through_datasets(location: Location, tally: ReadTally, key: str) -> Rows:
    data = _open_dataset(location, key)
    for address in data.info.download_checksums or {}:
        revision = re.search(r"@([0-9a-f]{40})/", str(address))
        if revision:
            tally.hub["revision"] = revision[1]
    batches = data.with_format("arrow").iter(batch_size=READ_BATCH)
    yield from arrow_rows(batches, location.source.path)


def _open_dataset(location: Location, key: str) -> datasets.Dataset:
    import datasets
    from datasets.exceptions import DatasetsError

    source = location.source
    try:
        if location.kind == "hub":
            return datasets.load_dataset(source.path, source.config, split=source.split)
        loaded = datasets.load_from_disk(source.path)
    except (DatasetsError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        mend = "Check the hub id, `split`, `config` and the network, or give the path of a local file."
        raise UserError(
            f"{key}: {source.path} could not be loaded as a "
            f"{'hub data set' if location.kind == 'hub' else 'saved data set'} ({reason}).",
            mend=mend if location.kind == "hub" else "Save it again with `save_to_disk`.",
        ) from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if source.split not in loaded:
        there = ", ".join(map(str, loaded))
        raise UserError(
            f"{key}: {source.path} has no split {source.split!r}; it has {there}.",
            mend="Set `split` of this source to one that is there.",
        )
    return loaded[source.split]
