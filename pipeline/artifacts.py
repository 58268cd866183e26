"""Artifact directories: written beside as `<stage>.partial`, renamed last, verified by hash when opened.

A directory without a complete `manifest.json` does not exist for the next stage. Paths inside a manifest are relative.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

MANIFEST = "manifest.json"
VERSION = 1
_MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


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


def open_artifact(path: str | Path, *, kinds: Collection[str], wanted_as: str) -> Artifact:
    """Opens the directory (or hub id) `path` after checking its kind and the hash of every file.

    Args:
        kinds: accepted kinds; `model` accepts any checkpoint without a manifest.
        wanted_as: what it is for, for the error text ("ppo.reward_model").

    Errors:
        UserError: missing, half-written, corrupted or of another kind.
    """
    directory = Path(path)
    if not directory.exists():
        if "model" in kinds and _looks_like_hub_id(str(path)):
            return Artifact(str(path), "model")
        partial = directory.with_name(directory.name + ".partial")
        hint = (
            f"{partial} is unfinished: run that stage again, it resumes."
            if partial.exists()
            else f"Run the stage that makes it first, or set {wanted_as} to an existing directory."
        )
        raise UserError(f"{wanted_as}: {directory} does not exist.", mend=hint)
    if not (directory / MANIFEST).exists():
        if "model" in kinds and (directory / "config.json").exists():
            return Artifact(str(path), "model")
        what = (
            "a stage's directory without its manifest.json"
            if "model" not in kinds
            else "no model: no config.json"
        )
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
    needed = {"kind", "files", "fingerprint", "version"}
    if not isinstance(manifest, dict) or not needed <= manifest.keys():
        raise UserError(f"{file} is corrupted: it lacks {', '.join(sorted(needed))}.", mend=mend)
    if manifest["version"] != VERSION:
        raise UserError(
            f"{file} has version {manifest['version']}, this tristage reads {VERSION}.", mend=mend
        )
    return manifest


def _verify(directory: Path, manifest: Mapping[str, Any], wanted_as: str) -> None:
    for name, expected in manifest["files"].items():
        file = directory / name
        if not file.exists() or sha256_file(file) != expected:
            state = (
                "is missing" if not file.exists() else "does not have the sha256 of its manifest"
            )
            raise UserError(
                f"{wanted_as}: {file} {state}: the artifact was changed or damaged after it was written.",
                mend="Restore it, or run that stage again with --overwrite.",
            )


def finish(partial: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    """Hashes the files of `partial`, writes its manifest, syncs to disk and renames it to `final`.

    An older `final` is kept aside until the new one stands, then removed.
    """
    files = {
        str(file.relative_to(partial)): sha256_file(file)
        for file in sorted(partial.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    write_json(partial / MANIFEST, {"version": VERSION, **manifest, "files": files})
    sync_tree(partial)
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    sync_directory(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover_replaced(final: Path) -> None:
    """Puts back an artifact that a kill between the two renames of `finish` left as `<stage>.replaced`."""
    replaced = final.with_name(final.name + ".replaced")
    if replaced.exists() and not final.exists():
        partial = final.with_name(final.name + ".partial")
        if (partial / MANIFEST).exists():
            partial.rename(final)
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)
    elif replaced.exists():
        shutil.rmtree(replaced)


def write_json(file: Path, content: Any) -> None:
    """Writes JSON beside, syncs and renames: a reader sees the old file or the new one, never a part."""
    beside = file.with_name(f".{file.name}.tmp")
    with beside.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2, ensure_ascii=False, allow_nan=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(file)


def sync_tree(directory: Path) -> None:
    """Flushes every file and folder below `directory` to disk."""
    for item in (directory, *directory.rglob("*")):
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

    A foreign directory is identified by its configuration, its tokenizer, and name and size of its weight files.
    A hub id stands for itself.
    """
    directory = Path(path)
    if (directory / MANIFEST).exists():
        return {"manifest": sha256_file(directory / MANIFEST)}
    if not directory.is_dir():
        return {"hub": str(path)}
    digest = hashlib.sha256()
    for name in _MODEL_FILES:
        if (directory / name).exists():
            digest.update(name.encode() + (directory / name).read_bytes())
    for file in sorted(directory.glob("*.safetensors")) + sorted(directory.glob("*.bin")):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, file.stat().st_size - (1 << 20)))
            digest.update(stream.read())
    return {"model": digest.hexdigest()}


def _looks_like_hub_id(text: str) -> bool:
    parts = text.split("/")
    return len(parts) == 2 and all(part and part[0] not in "./~" for part in parts)
