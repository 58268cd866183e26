"""Weights on disk: the same tensors come back, files are of bounded size, what is broken is told before it is used."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from rollout.weight_files import (
    INDEX,
    UnusableWeights,
    WeightsPlace,
    check_shapes,
    read_weights,
    weight_shapes,
    write_weights,
)

WEIGHTS = {f"layer.{n}": torch.arange(6.0).reshape(2, 3) * n for n in range(5)}
SHAPES = {name: tensor.shape for name, tensor in WEIGHTS.items()}
BYTES = 5 * 6 * 4


@pytest.mark.parametrize(("shard_bytes", "files"), [(1000, 1), (48, 3), (47, 5), (1, 5)])
def test_weights_come_back_from_shards_of_bounded_size(tmp_path: Path, shard_bytes: int, files: int) -> None:
    directory = tmp_path / "w"
    alive: list[int] = []

    def named() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in WEIGHTS.items():
            alive.append(len(list(tmp_path.rglob("*.safetensors"))))
            yield name, tensor

    assert write_weights(named(), directory, torch.float32, shard_bytes) == BYTES
    assert len(list(directory.glob("*.safetensors"))) == files
    assert alive[-1] >= files - 2  # earlier shards are on the disk while later weights are made
    assert [path.name for path in tmp_path.iterdir()] == ["w"]
    back = dict(read_weights(directory))
    assert back.keys() == WEIGHTS.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in WEIGHTS.items())
    check_shapes(directory, SHAPES)


def test_tied_and_strided_weights_and_another_dtype(tmp_path: Path) -> None:
    whole = torch.randn(4, 6, requires_grad=True)
    named = {"a": whole, "b": whole, "half": whole[:2], "turned": whole.T, "count": torch.tensor([3])}
    write_weights(named.items(), tmp_path / "w", torch.bfloat16)
    back = dict(read_weights(tmp_path / "w"))
    for name, tensor in named.items():
        expected = tensor.detach().to(torch.bfloat16) if tensor.is_floating_point() else tensor
        assert torch.equal(back[name], expected)
        assert back[name].dtype == expected.dtype


def test_a_checkpoint_as_save_pretrained_writes_it(tied_dir: Path, tmp_path: Path, policy: LlamaForCausalLM) -> None:
    expected = {name: tuple(parameter.shape) for name, parameter in policy.named_parameters()}
    policy.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for directory in (tied_dir, tmp_path / "shards"):
        assert weight_shapes(directory) == expected
        assert all(torch.equal(tensor, policy.get_parameter(name)) for name, tensor in read_weights(directory))


def test_an_interrupted_write_leaves_no_directory_behind(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(2)
        yield "b", torch.ones(2)
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        write_weights(broken(), tmp_path / "w", torch.float32, 8)
    assert list(tmp_path.iterdir()) == []


def test_what_killed_engines_left_is_removed_and_what_living_ones_hold_is_not(tmp_path: Path) -> None:
    words = (
        "import os, sys, pathlib; from rollout.weight_files import WeightsPlace\n"
        "place = WeightsPlace(pathlib.Path(sys.argv[1]), 'killed')\n"
        "(place.directory / 'version-3').mkdir(parents=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    shared = tmp_path / "run" / "weights"
    living = WeightsPlace(shared, "living")
    (living.directory / "version-1").mkdir(parents=True)
    assert subprocess.run([sys.executable, "-c", words, str(shared)], check=False).returncode == -9
    assert {path.name for path in shared.iterdir()} == {"living", "living.lock", "killed", "killed.lock"}
    following = WeightsPlace(shared, "following")
    assert {path.name for path in shared.iterdir()} == {"living", "living.lock", "following.lock"}
    assert (living.directory / "version-1").is_dir()
    living.remove()
    assert {path.name for path in shared.iterdir()} == {"following.lock"}
    following.remove()
    assert list(tmp_path.rglob("*")) == [tmp_path / "run"]


def test_without_locks_nothing_of_others_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", none)
    (tmp_path / "other").mkdir()
    (tmp_path / "other.lock").touch()
    place = WeightsPlace(tmp_path, "own")
    place.directory.mkdir()
    place.remove()
    assert {path.name for path in tmp_path.iterdir()} == {"other", "other.lock"}


def test_what_is_broken_is_refused(tmp_path: Path) -> None:
    def made(name: str) -> Path:
        write_weights(WEIGHTS.items(), tmp_path / name, torch.float32, 48)
        return tmp_path / name

    with pytest.raises(UnusableWeights, match="does not exist here") as failure:
        weight_shapes(tmp_path / "nowhere")
    assert failure.value.passing
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnusableWeights, match=r"neither model\.safetensors nor"):
        weight_shapes(tmp_path / "empty")
    short = made("short") / "model-00001.safetensors"
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(UnusableWeights, match=r"model-00001\.safetensors cannot be read") as failure:
        weight_shapes(short.parent)
    assert not failure.value.passing
    (made("lacking") / "model-00002.safetensors").unlink()
    with pytest.raises(UnusableWeights, match=r"model-00002\.safetensors does not exist") as failure:
        weight_shapes(tmp_path / "lacking")
    assert failure.value.passing
    index = made("index") / INDEX
    index.write_text("{")
    with pytest.raises(UnusableWeights, match="json cannot be read"):
        weight_shapes(index.parent)
    moved = json.loads((made("moved") / INDEX).read_text())
    moved["weight_map"]["layer.0"] = "model-00002.safetensors"
    (tmp_path / "moved" / INDEX).write_text(json.dumps(moved))
    with pytest.raises(UnusableWeights, match=r"lacks 'layer\.0'"):
        weight_shapes(tmp_path / "moved")
    with pytest.raises(UnusableWeights, match=r"lacks 1 weights of the model, first 'more'"):
        check_shapes(made("whole"), {**SHAPES, "more": torch.Size([1])})
    with pytest.raises(UnusableWeights, match=r"'layer\.3' has shape \(2, 3\), but the model's has \(3, 2\)"):
        check_shapes(tmp_path / "whole", {**SHAPES, "layer.3": torch.Size([3, 2])})
