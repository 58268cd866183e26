"""Which checkpoint a killed run resumes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.checkpoints import newest_complete_checkpoint


def _checkpoint(state: Path, step: int) -> Path:
    directory = state / f"checkpoint-{step}"
    directory.mkdir(parents=True)
    save_file({"weight": torch.zeros(8, 8)}, directory / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"step": step}, directory / name)
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return directory


def test_no_checkpoint_no_resume(tmp_path: Path) -> None:
    assert newest_complete_checkpoint(tmp_path / "state") is None
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "other").mkdir()
    assert newest_complete_checkpoint(tmp_path) is None


def test_newest_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        _checkpoint(tmp_path, step)
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth"])
@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_a_file_cut_off_anywhere_disqualifies(tmp_path: Path, name: str, kept: float) -> None:
    _checkpoint(tmp_path, 1)
    file = _checkpoint(tmp_path, 2) / name
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors"])
def test_a_missing_file_disqualifies(tmp_path: Path, name: str) -> None:
    _checkpoint(tmp_path, 1)
    (_checkpoint(tmp_path, 2) / name).unlink()
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_state_of_another_step_disqualifies(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 1)
    (_checkpoint(tmp_path, 2) / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
