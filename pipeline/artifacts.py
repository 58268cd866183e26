"""Artifact directories: written beside as `<stage>.partial`, renamed last, verified by hash when opened.

A directory without a complete `manifest.json` does not exist for the next stage. Paths inside a manifest are relative.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

MANIFEST = "manifest.json"
JOB = "job.json"
STATE = "state"
"""`job.json` and `state/` are a stage's while it is unfinished; neither is part of the artifact."""
VERSION = 1
_DESCRIBING = {".json", ".jinja", ".model", ".txt"}
_WEIGHTS = {".safetensors", ".bin"}
_WHOLE_BYTES = 1 << 30
_SAMPLES, _SAMPLE_BYTES = 1024, 1 << 16
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Artifact:
    """A verified input of a stage.

    Attributes:
        path: directory, or a hub id for models that are not ours.
        kind: the stage that made it; `model` for a foreign checkpoint.
        manifest: contents of `manifest.json`; empty for a foreign checkpoint.
    """

    path: str
    kind: str
    manifest: Mapping[str, Any] = field(default_factory=dict)


def open_artifact(path: str | Path, *, kinds: Collection[str], wanted_as: str, verify: bool = True) -> Artifact:
    """Opens the directory (or hub id) `path` after checking its kind and the hash of every file.

    Args:
        kinds: accepted kinds; `model` accepts any checkpoint without a manifest.
        wanted_as: the recipe key it is for, for the error text ("ppo.reward_model").
        verify: whether to read and hash the files; their kind is always checked.

    Errors:
        UserError: missing, half-written, corrupted or of another kind.
    """
    directory = Path(path)
    if not directory.exists():
        if "model" in kinds and may_be_hub_id(str(path)):
            return Artifact(str(path), "model")
        partial, _ = _beside(directory)
        hint = (
            f"{partial} is unfinished: run that stage again, it resumes."
            if partial.exists()
            else f"Set {wanted_as} to an existing directory, or run the stage that makes it first."
        )
        raise UserError(f"{wanted_as}: {directory} does not exist.", mend=hint)
    if not (directory / MANIFEST).exists():
        if "model" in kinds and (directory / "config.json").exists():
            return Artifact(str(path), "model")
        what = "a stage's directory without its manifest.json" if "model" not in kinds else "no model: no config.json"
        raise UserError(
            f"{wanted_as}: {directory} is {what}.",
            mend="Point it at a finished stage's directory, or run that stage again with --overwrite.",
        )
    manifest = read_manifest(directory)
    if manifest["kind"] not in kinds:
        raise UserError(
            f"{wanted_as}: {directory} holds a '{manifest['kind']}' artifact, wanted {' or '.join(sorted(kinds))}.",
            mend="Point it at the right stage's directory.",
        )
    if verify:
        _verify(directory, manifest, wanted_as)
    return Artifact(str(path), str(manifest["kind"]), manifest)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Parses `manifest.json`, refusing a damaged one."""
    file = directory / MANIFEST
    mend = "Run that stage again with --overwrite, or restore the file."
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is corrupted: {error}.", mend=mend) from error
    if not isinstance(manifest, dict) or "version" not in manifest:
        raise UserError(f"{file} is corrupted: it is no manifest of a stage.", mend=mend)
    if manifest["version"] != VERSION:
        raise UserError(f"{file} has version {manifest['version']}, this tristage reads {VERSION}.", mend=mend)
    fingerprint = manifest.get("fingerprint")
    sound = {
        "kind": isinstance(manifest.get("kind"), str),
        "files": isinstance(manifest.get("files"), dict),
        "fingerprint": isinstance(fingerprint, dict) and isinstance(fingerprint.get("sha256"), str),
    }
    if not all(sound.values()):
        wrong = ", ".join(f"'{key}'" for key, fine in sound.items() if not fine)
        raise UserError(f"{file} is corrupted: its {wrong} is missing or damaged.", mend=mend)
    return manifest


def refuse_missing_files(directory: Path) -> None:
    """Refuses a finished stage of which a file named by the manifest is gone; reads no file."""
    for name in read_manifest(directory)["files"]:
        if not (directory / name).is_file():
            raise UserError(
                f"{directory} is finished, but its file {name} is missing.",
                mend="Restore it, or run the stage again with --overwrite.",
            )


def _verify(directory: Path, manifest: Mapping[str, Any], wanted_as: str) -> None:
    for name, expected in manifest["files"].items():
        file = directory / name
        if not file.is_file() or sha256_file(file) != expected:
            state = "does not have the sha256 of its manifest" if file.is_file() else "is missing"
            raise UserError(
                f"{wanted_as}: {file} {state}: the artifact was changed or damaged after it was written.",
                mend="Restore it, or run that stage again with --overwrite.",
            )


def finish(partial: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    """Hashes the files of `partial`, writes its manifest and renames it to `final`.

    The order is what makes a kill or a power cut harmless: files reach the disk, then the manifest that speaks for
    them, and only then go `state/` and `job.json`, which could continue the stage. From the manifest on,
    `recover_replaced` completes what was cut off. An older `final` stands until the new directory is complete.
    """
    for leftover in partial.rglob(".*.tmp"):
        leftover.unlink()
    files = {
        file.relative_to(partial).as_posix(): sha256_file(file)
        for file in sorted(partial.rglob("*"))
        if file.is_file() and file.relative_to(partial).parts[0] not in (STATE, JOB, MANIFEST)
    }
    sync_tree(partial)
    write_json(partial / MANIFEST, {"version": VERSION, **json_safe(manifest), "files": files})
    recover_replaced(final)


def recover_replaced(final: Path) -> None:
    """Completes the renames at the end of a stage; also after a kill between any two of them.

    A `<stage>.partial` with a manifest is complete and becomes `final`; the older `final` goes to `<stage>.replaced`
    meanwhile and comes back when there is nothing newer.
    """
    partial, replaced = _beside(final)
    if (partial / MANIFEST).exists():
        shutil.rmtree(partial / STATE, ignore_errors=True)
        (partial / JOB).unlink(missing_ok=True)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        partial.rename(final)
        sync_directory(final.parent)
    if replaced.exists() and not final.exists():
        replaced.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)


def _beside(final: Path) -> tuple[Path, Path]:
    return final.with_name(final.name + ".partial"), final.with_name(final.name + ".replaced")


def write_json(file: Path, content: Any) -> None:
    """Writes JSON beside, syncs and renames: a reader sees the old file or the new one, never a part."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Writes a text file as `write_json` does."""
    beside = file.with_name(f".{file.name}.tmp")
    with beside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(file)
    sync_directory(file.parent)


def json_safe(value: Any) -> Any:
    """`value` with non-finite numbers as strings ("nan", "inf"), which JSON cannot hold as numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return value


def sync_tree(directory: Path) -> None:
    """Flushes every file and folder below `directory` to disk."""
    for item in (directory, *directory.rglob("*")):
        if not item.is_symlink():
            sync_directory(item)


def sync_directory(path: Path) -> None:
    """fsync of one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(file: Path) -> str:
    """sha256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def identity(path: str | Path) -> dict[str, str]:
    """What a stage's fingerprint holds about a model input: the manifest's hash, or the hash of a foreign checkpoint.

    A foreign directory is identified by its configuration and tokenizer files and by its weights: the whole of a
    file up to 1 GiB, size and 1024 evenly spaced samples of a larger one. A hub id stands for itself.
    """
    directory = Path(path)
    if (directory / MANIFEST).exists():
        return {"manifest": sha256_file(directory / MANIFEST)}
    if not directory.is_dir():
        return {"hub": str(path)}
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.is_file() and file.suffix in _DESCRIBING | _WEIGHTS:
            sha256 = sha256_file(file) if file.stat().st_size <= _WHOLE_BYTES else _sampled_sha256(file)
            digest.update(f"{file.name}:{sha256}\n".encode())
    return {"model": digest.hexdigest()}


def _sampled_sha256(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for index in range(_SAMPLES):
            stream.seek((size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def may_be_hub_id(text: str) -> bool:
    """Whether a path that is not there may name a model on the hub: `name`, or `owner/name` where no folder `owner` is.

    In a local folder it is a missing file, and asking the hub for it would only hide that.
    """
    return _HUB_ID.fullmatch(text) is not None and not ("/" in text and Path(text).parent.is_dir())
