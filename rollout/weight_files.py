"""Weights on disk: how they go from the trainer to a server that shares a file system with it.

A set of weights is a directory of safetensors files as `save_pretrained` lays them out: one `model.safetensors`, or
several and `model.safetensors.index.json`. It is written beside its place, flushed and renamed, so that a directory
with the final name is complete.

Every engine writes below a directory of its own, so that no two engines can take each other's weights for their own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.artifacts import sync_directory
from rollout.engine import one_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 1 << 30
_LOCK = ".lock"


class UnusableWeights(Exception):
    """A directory that does not hold the weights of the model: which one and why.

    Attributes:
        passing: the directory or a file of it is not there; on a shared file system it may yet appear.
    """

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class WeightsPlace:
    """The directory of one engine below one that several may share; a lock beside it is held while the engine lives.

    Making it removes what engines that were killed have left there, told by locks that nobody holds. Where the file
    system has no locks, nothing of others is removed.

    Args:
        shared: made when it is not there.
        token: the engine's name, like no other's.

    Attributes:
        directory: the engine's own, not made yet.

    Errors:
        OSError: `shared` cannot be made or written.
    """

    def __init__(self, shared: Path, token: str) -> None:
        self.directory = shared / token
        self._file = shared / f"{token}{_LOCK}"
        self._lock = _held(self._file)
        for file in shared.glob(f"*{_LOCK}"):
            if file != self._file:
                _remove_unless_held(file)

    def remove(self) -> None:
        """Removes the directory, and the shared one where nothing else is in it."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self._file.unlink(missing_ok=True)
        self._lock.close()
        with contextlib.suppress(OSError):
            self.directory.parent.rmdir()


def write_weights(
    named: Iterable[tuple[str, torch.Tensor]], directory: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> int:
    """Writes weights as `directory` and returns their bytes; memory holds `shard_bytes` or one tensor at a time.

    Floating-point weights are written in `dtype`. A directory of that name is replaced.

    Errors:
        OSError, SafetensorError: the disk is full or forbidden; nothing of the name `directory` is left behind then.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    for old in (partial, directory):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        weight_map: dict[str, str] = {}
        total = 0
        for number, shard in enumerate(_shards(named, dtype, shard_bytes)):
            name = f"model-{number:05d}.safetensors"
            save_file(shard, partial / name, metadata={"format": "pt"})
            sync_directory(partial / name)
            weight_map |= dict.fromkeys(shard, name)
            total += sum(tensor.nbytes for tensor in shard.values())
        with (partial / INDEX).open("w", encoding="utf-8") as stream:
            json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, stream)
        sync_directory(partial / INDEX)
        sync_directory(partial)
        partial.rename(directory)
        sync_directory(directory.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return total


def weight_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by the names of the weights, read from the heads of the files.

    Errors:
        UnusableWeights: a file is missing or cut short, or is not what the index says.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file, names in _files(directory).items():
        with _opened(directory / file) as stream:
            held = set(stream.keys())
            if names and not names <= held:
                raise UnusableWeights(f"{directory / file} lacks {min(names - held)!r}, which {INDEX} places there")
            shapes |= {name: tuple(stream.get_slice(name).get_shape()) for name in names or held}
    return shapes


def check_shapes(directory: Path, expected: dict[str, torch.Size]) -> None:
    """Refuses a directory that lacks a weight of the model or holds one of another shape.

    Errors:
        UnusableWeights
    """
    found = weight_shapes(directory)
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise UnusableWeights(f"{directory} lacks {len(missing)} weights of the model, first {missing[0]!r}")
    for name, shape in expected.items():
        if found[name] != tuple(shape):
            raise UnusableWeights(
                f"{directory}: weight {name!r} has shape {found[name]}, but the model's has {tuple(shape)}"
            )


def read_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights one by one, on the CPU.

    Errors:
        UnusableWeights: see `weight_shapes`.
    """
    for file, names in _files(directory).items():
        with _opened(directory / file) as stream:
            for name in sorted(names or stream.keys()):
                yield name, stream.get_tensor(name)


def _shards(
    named: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, shard_bytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    size = 0
    for name, tensor in named:
        tensor = tensor.detach()
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        tensor = tensor.cpu().contiguous()
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, storages, size = {}, set(), 0
        if tensor.untyped_storage().data_ptr() in storages:  # safetensors takes no two names of the same memory
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _files(directory: Path) -> dict[str, set[str]]:
    """File names and the weights that the index places in each; the empty set where there is no index: all."""
    if not directory.is_dir():
        raise UnusableWeights(f"{directory} does not exist here", passing=True)
    index = directory / INDEX
    if not index.is_file():
        if not (directory / SINGLE).is_file():
            raise UnusableWeights(f"{directory} has neither {SINGLE} nor {INDEX}", passing=True)
        return {SINGLE: set()}
    files: dict[str, set[str]] = {}
    try:
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(file, set()).add(name)
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise UnusableWeights(f"{index} cannot be read: {one_line(error)}") from error
    return files


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    if not file.is_file():
        raise UnusableWeights(f"{file} does not exist", passing=True)
    try:
        stream = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UnusableWeights(f"{file} cannot be read: {one_line(error)}") from error
    with stream:
        yield stream


def _held(file: Path) -> TextIO:
    """The lock `file`, made and held; made again where another engine took it for left over before it was held."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            stream = file.open("a", encoding="utf-8")
        except FileNotFoundError:  # another engine has removed the empty directory meanwhile
            continue
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        if os.fstat(stream.fileno()).st_nlink:
            return stream
        stream.close()


def _remove_unless_held(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("r+", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(stream.fileno()).st_nlink:
            shutil.rmtree(file.with_suffix(""), ignore_errors=True)
            file.unlink()
