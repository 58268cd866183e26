"""Sharded tensors of a saved state: each rank writes its shards, and any number of ranks reads them back.

A state is a tree of dictionaries, lists and tuples. A `DTensor` in it is written by torch.distributed.checkpoint under
the path that leads to it ("policy/lm_head.weight", "policy_optimizer/state/3/exp_avg"), and an empty tensor on the
`meta` device, which holds shape and dtype, stands for it in the tree. When it is read, what the tensor becomes depends
on the part that takes it: a shard where that one is sharded now, else the whole tensor. torch's own
`get_optimizer_state_dict` is not used: it makes an optimiser that has not stepped yet take a step.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from pipeline.errors import UserError
from pipeline.ranks import Ranks
from pipeline.shards import ShardReader

Place = tuple[Any, ...]
"""The keys and indices that lead to a tensor."""


class Stateful(Protocol):
    """A model, an optimiser or anything else whose state a resumed run needs."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


def split(state: Mapping[str, Any]) -> tuple[Any, dict[str, DTensor]]:
    """The state with an empty tensor in place of each sharded one, and the sharded ones by name."""
    shards: dict[str, DTensor] = {}

    def take_out(place: Place, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        shards[_name(place)] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    return _mapped(state, take_out), shards


def repeated(shards: Mapping[str, DTensor]) -> dict[str, str]:
    """Names of tensors that another name shares the memory of (tied weights), and that name.

    A rank without rows of a tensor cannot tell; rank 0 has rows of all.
    """
    first: dict[Place, str] = {}
    same: dict[str, str] = {}
    for name, tensor in shards.items():
        local = tensor.to_local()
        memory = (local.untyped_storage().data_ptr(), local.storage_offset(), tensor.shape)
        if first.setdefault(memory, name) != name:
            same[name] = first[memory]
    return same


def write_shards(folder: Path, shards: Mapping[str, DTensor]) -> None:
    """Writes this rank's shards below `folder`; a collective, in which a failure of one rank is one of all.

    Errors:
        RuntimeError: what failed, and on which rank.
    """
    with _plain_errors():
        save(dict(shards), storage_writer=FileSystemWriter(folder))


def filled(
    saved: Mapping[str, Any], parts: Mapping[str, Stateful], same: Mapping[str, str], folder: Path, ranks: Ranks
) -> dict[str, Any]:
    """The state `saved` of every part with all its tensors, sharded where the part is sharded now.

    All ranks call it. `same` and `folder` are those of `repeated` and `write_shards`.
    """
    wanted: dict[str, Tensor] = {}
    shardings = {name: _sharding_of(part) for name, part in parts.items()}

    def fill(place: Place, tensor: Tensor) -> Tensor:
        like = shardings[place[0]](place[1:], tensor)
        if not tensor.is_meta:
            return tensor if like is None else _distributed(tensor, like)
        name = same.get(_name(place), _name(place))
        if name not in wanted:
            wanted[name] = _empty_like(tensor, like)
        return wanted[name]

    state = _mapped({name: saved[name] for name in parts}, fill)
    if wanted:
        with _plain_errors(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(wanted, storage_reader=ShardReader(folder), no_dist=ranks.world == 1)
    return state


def _mapped(tree: Any, change: Callable[[Place, Tensor], Tensor], place: Place = ()) -> Any:
    """The tree with `change` of every tensor in it; dictionaries keep their class and attributes."""
    if isinstance(tree, Tensor):
        return change(place, tree)
    if isinstance(tree, dict):
        mapped = copy.copy(tree)
        mapped.update({key: _mapped(value, change, (*place, key)) for key, value in tree.items()})
        return mapped
    if isinstance(tree, list | tuple):
        return type(tree)([_mapped(value, change, (*place, index)) for index, value in enumerate(tree)])
    return tree


def _name(place: Place) -> str:
    return "/".join(map(str, place))


def _sharding_of(part: Stateful) -> Callable[[Place, Tensor], DTensor | None]:
    """A function that gives the sharded tensor which a tensor of the part's state must be sharded like, if any.

    An optimiser's moments are sharded as the weight that they belong to; a new optimiser has none yet.
    """
    if isinstance(part, Optimizer):
        weights = [weight for group in part.param_groups for weight in group["params"]]

        def of_weight(place: Place, tensor: Tensor) -> DTensor | None:
            weight = weights[place[1]] if place[0] == "state" else None
            return weight if isinstance(weight, DTensor) and weight.shape == tensor.shape else None

        return of_weight
    own = part.state_dict()

    def at_the_same_place(place: Place, tensor: Tensor) -> DTensor | None:
        found = own
        for key in place:
            if not isinstance(found, dict) or key not in found:
                return None
            found = found[key]
        return found if isinstance(found, DTensor) else None

    return at_the_same_place


def _empty_like(tensor: Tensor, like: DTensor | None) -> Tensor:
    if like is None:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    if like.shape != tensor.shape:
        raise UserError(f"a saved tensor has the shape {tuple(tensor.shape)}, the model's is {tuple(like.shape)}.")
    return torch.empty_like(like, dtype=tensor.dtype, requires_grad=False)


def _distributed(tensor: Tensor, like: DTensor) -> DTensor:
    """A whole tensor, of which this rank keeps a copy of its own shard; the ranks exchange nothing."""
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """torch's CheckpointException is no Exception; it tells every rank what failed on each."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise RuntimeError(f"rank {rank}: {type(cause).__name__}: {cause}") from cause
