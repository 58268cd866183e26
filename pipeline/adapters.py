"""LoRA adapters over one frozen model, by peft: added, switched, merged, saved and read back.

Several adapters can stand on one model; one of them, or none, acts at a time (`using`). Adapters are injected, so that
the model keeps its class and its attributes. Source: Hu et al., arXiv:2106.09685.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.recipe import LoraSection

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

FOLDER = "adapter"
"""Folder of an artifact that holds the adapter whose merged weights lie beside it, in peft's own format."""
WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


def add_adapter(model: PreTrainedModel, name: str, lora: LoraSection, *, seed: int) -> None:
    """Freezes `model` and adds the acting adapter `name`, whose delta is zero to begin with.

    Errors:
        UserError: `model.lora.target_modules` names no linear layer of the model's trunk.
    """
    from peft import LoraConfig

    linear = linear_names(model)
    unknown = sorted(set(lora.target_modules or ()) - linear)
    if unknown:
        raise UserError(
            f"model.lora.target_modules: {type(model).__name__} has no linear layer named {unknown[0]!r}.",
            mend=f"Name some of {', '.join(sorted(linear))}, or leave the key out for all of them.",
        )
    targets = sorted(lora.target_modules or linear)
    alpha: Any = lora.alpha  # peft takes a fraction too
    _inject(model, name, LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=targets), seed)


def linear_names(model: PreTrainedModel) -> set[str]:
    """Last parts of the names of the linear layers in the model's trunk."""
    from transformers.pytorch_utils import Conv1D

    found = (name for name, module in model.base_model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return {name.removesuffix(".base_layer").rpartition(".")[2] for name in found if ".lora_" not in name}


def adapter_layers(model: nn.Module) -> list[LoraLayer]:
    """The layers that carry adapters; none where the model has no adapter, for which peft is not imported."""
    if not any("lora_A" in name for name, _ in model.named_modules()):
        return []
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@contextmanager
def using(model: nn.Module, name: str | None) -> Iterator[None]:
    """The adapter `name` acts inside, none for None; a backward pass belongs inside as well as its forward.

    peft marks the acting adapter alone as trainable, and a gradient reaches no other.
    """
    layers = adapter_layers(model)
    before = (layers[0].active_adapters[0], layers[0].disable_adapters) if layers else ("", True)
    _switch(layers, name)
    try:
        yield
    finally:
        _switch(layers, None if before[1] else before[0])


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The weights of the adapter `name`."""
    return [parameter for key, parameter in model.named_parameters() if _is_of(key, name)]


def adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The weights of the adapter `name` under the names of peft's files."""
    state = {key: tensor for key, tensor in model.state_dict().items() if _is_of(key, name)}
    return {_PEFT_PREFIX + key.replace(f".{name}.", "."): tensor for key, tensor in state.items()}


def load_adapter_state(model: nn.Module, name: str, state: dict[str, Tensor]) -> None:
    """Copies what `adapter_state` gave into the adapter `name`; a missing or foreign weight raises ValueError."""
    own = adapter_state(model, name)
    if own.keys() != state.keys():
        raise ValueError(f"the weights of adapter {name!r} do not fit: {sorted(own.keys() ^ state.keys())[:4]}")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])


def merged_weights(model: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """The model's weights, W + alpha / rank * B A in place of each adapted W, under the names of a plain model.

    One merged weight exists at a time, and the base is never written to, so nothing drifts.
    """
    for key, tensor in model.state_dict().items():
        if ".lora_" in key:
            continue
        owner, adapted, leaf = key.rpartition(".base_layer.")
        if not adapted:
            yield key, tensor
            continue
        if leaf == "weight":
            layer: Any = model.get_submodule(owner)
            tensor = tensor + layer.get_delta_weight(name).to(tensor.dtype)
        yield f"{owner}.{leaf}", tensor


def save_adapter(model: PreTrainedModel, name: str, directory: Path, *, base: str) -> None:
    """Writes the adapter `name` as `PeftModel.from_pretrained(model at base, directory)` reads it."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in adapter_state(model, name).items()}
    save_file(state, directory / WEIGHTS)
    config = _config(model, name)
    config.base_model_name_or_path = base
    config.save_pretrained(str(directory))


def save_merged(model: PreTrainedModel, name: str, directory: Path, *, base: str) -> dict[str, str]:
    """Writes the model with the adapter `name` merged, as any other is saved, and the adapter beside it.

    Returns what the manifest says of it under `adapter`.
    """
    model.save_pretrained(directory, state_dict=dict(merged_weights(model, name)))
    save_adapter(model, name, directory / FOLDER, base=base)
    return {"base_sha256": base_sha256(model)}


def load_adapter(model: PreTrainedModel, name: str, directory: Path) -> None:
    """Adds the adapter saved in `directory` to `model` as `name`.

    Errors:
        UserError: there is none, or it was made for another architecture.
    """
    from peft import LoraConfig
    from safetensors.torch import load_file

    try:
        config: Any = LoraConfig.from_pretrained(str(directory))
        _inject(model, name, config, seed=0)
        load_adapter_state(model, name, load_file(directory / WEIGHTS))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory}: no adapter for {type(model).__name__} could be loaded from here: {error}",
            mend="Give the `adapter` folder of a reward model that was trained with rm.lora from the same policy.",
        ) from error


def copy_adapter(model: PreTrainedModel, name: str, source: str) -> None:
    """Adds the adapter `name`, equal to `source`."""
    _inject(model, name, _config(model, source), seed=0)
    load_adapter_state(model, name, adapter_state(model, source))


def base_sha256(model: PreTrainedModel) -> str:
    """sha256 of the trunk's weights without adapters, each as bfloat16: tells whether two models share a base."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.base_model.state_dict().items()):
        if ".lora_" not in key:
            digest.update(key.replace(".base_layer", "").encode())
            digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _inject(model: PreTrainedModel, name: str, config: LoraConfig, seed: int) -> None:
    """The first adapter of a model acts from then on; a later one only inside `using`."""
    from peft import inject_adapter_in_model

    layers = adapter_layers(model)
    acting = layers[0].active_adapters[0] if layers else name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=name)
    _switch(adapter_layers(model), acting)


def _config(model: nn.Module, name: str) -> LoraConfig:
    """The settings of the adapter `name`, read from its layers."""
    from peft import LoraConfig

    layers = {key: module for key, module in model.named_modules() if module in adapter_layers(model)}
    targets = sorted({key.rpartition(".")[2] for key in layers})
    layer: Any = next(iter(layers.values()))
    return LoraConfig(r=layer.r[name], lora_alpha=layer.lora_alpha[name], target_modules=targets)


def _switch(layers: list[LoraLayer], name: str | None) -> None:
    for layer in layers:
        if name is None:
            layer.enable_adapters(False)
        else:
            layer.enable_adapters(True)
            layer.set_adapter(name)


def _is_of(key: str, name: str) -> bool:
    return f".lora_A.{name}." in key or f".lora_B.{name}." in key
