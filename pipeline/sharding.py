"""Models whose weights lie in parts on the ranks (FSDP2), gathered layer by layer where they are used.

Source: torch.distributed.fsdp.fully_shard; Zhao et al., arXiv:2304.11277.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from pipeline.errors import UserError
from pipeline.ranks import Ranks

T = TypeVar("T")
UNKNOWN = {
    "fsdp_offload_params": "use more GPUs",
    "fsdp_activation_checkpointing": "set ppo.gradient_checkpointing, or gradient_checkpointing of the stage's trainer",
}
"""Settings of accelerate's file that the stages do not have, and what to do instead."""


def wanted(role: str, roles: Collection[str], ranks: Ranks) -> bool:
    """Whether the model `role`, if it is among `roles`, is to be sharded: as accelerate's configuration file says.

    Its words are in the environment, see `pipeline.accelerate_file`.

    Errors:
        UserError: it asks for the first version of FSDP, or for what the stages do not do.
    """
    if ranks.world == 1 or role not in roles:
        return False
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "launch.accelerate: the file asks for FSDP 1.", mend="Set fsdp_config.fsdp_version: 2, as in fsdp2.yaml."
        )
    for name, mend in UNKNOWN.items():
        if os.environ.get(name.upper(), "false").lower() == "true":
            raise UserError(f"launch.accelerate: the stages do not know {name}.", mend=f"Set it to false and {mend}.")
    return True


def load_in_turn(load: Callable[[], PreTrainedModel], ranks: Ranks, dtype: str) -> PreTrainedModel:
    """The model that `load` reads into main memory, sharded; the ranks of a machine read one after another.

    So one whole model lies in a machine's memory at a time.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    loaded: list[PreTrainedModel] = []
    for turn in range(ranks.per_machine):
        if turn == ranks.local:
            loaded.append(load())
            shard(loaded[0], mesh, dtype)
        ranks.barrier()
    return loaded[0]


def shard(model: PreTrainedModel, mesh: DeviceMesh, dtype: str) -> None:
    """Leaves each rank its part of every weight of `model`; a forward gathers one layer at a time.

    Gradients are sums over the ranks, in float32. With the dtype bfloat16 layers are gathered and run in it.
    """
    policy = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    kinds = set(model._no_split_modules or ())
    for module in [m for m in model.modules() if type(m).__name__ in kinds] + [model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def is_sharded(module: nn.Module) -> bool:
    """Whether a weight of the module lies in parts on the ranks."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def through(wrapper: nn.Module, model: nn.Module, function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)` in the place of `model`'s forward, called through `wrapper`: the model itself, or DDP's.

    What uses a model's parts by themselves, its trunk and its head, runs between the hooks that gather weights and
    sum gradients only this way. Tensors that need a gradient must be returned, alone or in tuples, lists or dicts.
    Source: Lightning, strategies/strategy.py, `_ForwardRedirection`.
    """
    if wrapper is model and not isinstance(model, FSDPModule):
        return function(*arguments)
    own = vars(model).get("forward")

    def restored(_: None) -> T:
        _restore(model, own)
        return function(*arguments)

    model.forward = restored
    try:
        return wrapper(None)  # DDP on a GPU cannot be called without an argument, and looks into all that it gets
    finally:
        _restore(model, own)


def _restore(model: nn.Module, own: Any) -> None:
    if own is None:
        vars(model).pop("forward", None)
    else:
        model.forward = own


def whole(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same weights, each gathered when its turn comes: one whole weight exists at a time.

    All ranks must go through them, in the same order.
    """
    for name, tensor in named:
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_norm(norm: Tensor) -> Tensor:
    """A norm over sharded gradients as a plain number []."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def own_part(tensor: Tensor) -> Tensor:
    """What of a weight lies on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
