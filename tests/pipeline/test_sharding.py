"""Functions in the place of a model's forward; what of accelerate's file the stages refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.ranks import Ranks
from pipeline.sharding import through, wanted

TWO = Ranks(0, 2, 0, 2)


class Wrapper(nn.Module):
    """Calls what it wraps, as DDP does: with the arguments that it got."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.got = module, []

    def forward(self, *arguments: Any) -> Any:
        self.got.append(arguments)
        return self.module(*arguments)


def test_a_function_stands_in_for_the_forward_once_and_the_wrapper_gets_one_argument() -> None:
    """DDP on a GPU takes the first of its arguments to the device, and fails where there is none."""
    model = nn.Linear(2, 2)
    wrapper = Wrapper(model)
    assert through(wrapper, model, lambda a, b: a + b, 3, 4) == 7
    assert wrapper.got == [(None,)]
    x = torch.ones(1, 2)
    assert torch.equal(wrapper(x), model.weight.sum(1) + model.bias[None])


def test_the_forward_comes_back_after_an_error() -> None:
    model = nn.Linear(2, 2)

    def fails() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        through(Wrapper(model), model, fails)
    assert model(torch.ones(1, 2)).shape == (1, 2)
    assert "forward" not in vars(model)


def test_a_model_by_itself_is_not_called_at_all() -> None:
    model = nn.Linear(2, 2)
    assert through(model, model, lambda: "as it is") == "as it is"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FSDP_VERSION": "1"}, "asks for FSDP 1"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "do not know fsdp_offload_params.*use more GPUs"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "ppo.gradient_checkpointing"),
    ],
)
def test_what_the_stages_do_not_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: str
) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        wanted("policy", ("policy",), TWO)


def test_models_are_sharded_where_the_file_and_the_recipe_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert wanted("policy", ("policy", "critic"), TWO)
    assert not wanted("reference", ("policy", "critic"), TWO)
    assert not wanted("policy", ("policy",), Ranks())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert not wanted("policy", ("policy",), TWO)
