"""What torch.distributed.checkpoint writes: `__<rank>_<n>.distcp`, and `.metadata`, which says where in them what is.

torch reads `.metadata` with a plain `pickle.load`; here nothing is read but the classes that it is made of, so that a
checkpoint cannot run code.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as parts
from torch.distributed.checkpoint.filesystem import FileSystemReader

METADATA = ".metadata"
SUFFIX = ".distcp"
_NAMES = {
    *((parts.__name__, name) for name, value in vars(parts).items() if isinstance(value, type)),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


def read_metadata(folder: Path) -> parts.Metadata:
    """The metadata of the shards in `folder`.

    Errors:
        pickle.UnpicklingError: it holds what has no place in it.
    """
    with (folder / METADATA).open("rb") as stream:
        return _Unpickler(stream).load()


def shards_whole(folder: Path) -> bool:
    """Whether `.metadata` is there, which is written last, and every file is as long as it says."""
    try:
        places = read_metadata(folder).storage_data.values()
        return all((folder / place.relative_path).stat().st_size >= place.offset + place.length for place in places)
    except (OSError, EOFError, AttributeError, ImportError, IndexError, pickle.UnpicklingError):
        return False


class ShardReader(FileSystemReader):
    """Reads shards for `torch.distributed.checkpoint.load`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> parts.Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or parts.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        is_dtype = module_name == "torch" and isinstance(vars(torch).get(global_name), torch.dtype)
        if not is_dtype and (module_name, global_name) not in _NAMES:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} has no place in {METADATA}")
        return super().find_class(module_name, global_name)
