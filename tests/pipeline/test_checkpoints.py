"""Which checkpoint a killed run resumes from."""

from __future__ import annotations

import json
import os
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

from pipeline.checkpoints import newest_complete_checkpoint, seal_checkpoint
from pipeline.errors import UserError
from pipeline.ranks import Ranks


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


FILES = ("trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "tristage.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_a_changed_byte_of_a_sealed_checkpoint_sends_back_to_the_one_before(
    tmp_path: Path, name: str, place: float
) -> None:
    state = tmp_path / "state"
    for step in (1, 2):
        seal_checkpoint(_checkpoint(state, step))
    said: list[str] = []
    assert newest_complete_checkpoint(state, say=said.append) == state / "checkpoint-2"
    assert not said
    file = state / "checkpoint-2" / name
    content = bytearray(file.read_bytes())
    content[int(len(content) * place) if place >= 0 else -1] ^= 1
    file.write_bytes(content)
    assert newest_complete_checkpoint(state, say=said.append) == state / "checkpoint-1"
    what = "is damaged" if name == "tristage.json" else "does not have its sha256"
    assert said == [f"state/checkpoint-2/{name} {what}: going on from checkpoint-1"]


def test_a_sealed_checkpoint_without_one_of_its_files_is_passed_over(tmp_path: Path) -> None:
    """Without a seal nobody could tell that the schedule is missing."""
    for step in (1, 2):
        (_checkpoint(tmp_path, step) / "scheduler.pt").rename(tmp_path / f"checkpoint-{step}" / "schedule.txt")
        seal_checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-2" / "schedule.txt").unlink()
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_sealed_checkpoints_that_are_all_damaged_are_an_error(tmp_path: Path) -> None:
    seal_checkpoint(_checkpoint(tmp_path / "state", 1))
    _checkpoint(tmp_path / "state", 2).joinpath("trainer_state.json").unlink()
    (tmp_path / "state" / "checkpoint-1" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(UserError) as error:
        newest_complete_checkpoint(tmp_path / "state")
    assert str(error.value) == (
        "no checkpoint of this stage is whole: state/checkpoint-1/optimizer.pt does not have its sha256. Restore the "
        "files, or run the stage again with --overwrite: it starts anew."
    )


def test_a_checkpoint_is_sealed_anew(tmp_path: Path) -> None:
    """After a return to an older one the trainer writes into the directory of the damaged one."""
    seal_checkpoint(_checkpoint(tmp_path, 1))
    torch.save({"step": "again"}, tmp_path / "checkpoint-1" / "optimizer.pt")
    seal_checkpoint(tmp_path / "checkpoint-1")
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    files = json.loads((tmp_path / "checkpoint-1" / "tristage.json").read_text())["files"]
    assert sorted(files) == sorted(
        path.name
        for path in (tmp_path / "checkpoint-1").iterdir()
        if path.suffix != ".json" or path.name == "trainer_state.json"
    )


def _sharded(state: Path, step: int, ranks: int = 2) -> Path:
    """What transformers writes under FSDP with SHARDED_STATE_DICT, by `accelerate.utils.fsdp_utils`."""
    directory = state / f"checkpoint-{step}"
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    weights = {"model": model.state_dict()}
    moments = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    for folder, content in {"pytorch_model_fsdp_0": weights, "optimizer_0": moments}.items():
        save(content, storage_writer=FileSystemWriter(directory / folder))
    for name in ("scheduler.pt", *(f"rng_state_{rank}.pth" for rank in range(ranks))):
        torch.save({"step": step}, directory / name)
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return directory


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("folder", ["pytorch_model_fsdp_0", "optimizer_0"])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("kept", [None, 0.0, 0.9])
def test_a_sharded_checkpoint_is_complete_when_its_shards_are(
    tmp_path: Path, folder: str, name: str, kept: float | None
) -> None:
    _sharded(tmp_path, 1)
    file = _sharded(tmp_path, 2) / folder / name
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    content = file.read_bytes()
    file.unlink() if kept is None else file.write_bytes(content[: int(len(content) * kept)])
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_metadata_that_would_run_code_is_not_read(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (_sharded(tmp_path, 1) / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Evil()))
    assert newest_complete_checkpoint(tmp_path) is None
    assert not (tmp_path / "ran").exists()


def test_a_whole_state_dict_of_fsdp_is_checked_too(tmp_path: Path) -> None:
    for step in (1, 2):
        directory = _checkpoint(tmp_path, step)
        (directory / "model.safetensors").rename(directory / "other.txt")
        for name in ("pytorch_model_fsdp.bin", "optimizer.bin"):
            torch.save({"weight": torch.zeros(99)}, directory / name)
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    os.truncate(tmp_path / "checkpoint-2" / "optimizer.bin", 300)
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def as_rank(rank: int, store: str, state: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=60), rank=rank, world_size=2)
    ranks, said = Ranks(rank, 2), []
    for step in (1, 2):
        seal_checkpoint(state / f"checkpoint-{step}", ranks)
    assert newest_complete_checkpoint(state, ranks) == state / "checkpoint-2"
    ranks.barrier()
    if ranks.is_main:
        (state / "checkpoint-2" / "rng_state_1.pth").write_bytes(b"")
    ranks.barrier()
    assert newest_complete_checkpoint(state, ranks, say=said.append) == state / "checkpoint-1"
    assert said == ["state/checkpoint-2/rng_state_1.pth does not have its sha256: going on from checkpoint-1"]
    ranks.barrier()
    if ranks.is_main:
        (state / "checkpoint-2" / "tristage.json").unlink()
        (state / "checkpoint-2" / "rng_state_1.pth").unlink()
    ranks.barrier()
    assert newest_complete_checkpoint(state, ranks, say=said.append) == state / "checkpoint-1"
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_ranks_seal_and_choose_together(tmp_path: Path) -> None:
    """Without a seal, a rank that has not written its generators was cut off."""
    for step in (1, 2):
        _sharded(tmp_path / "state", step)
    arguments = (str(tmp_path / "store"), tmp_path / "state")
    processes.spawn(as_rank, arguments, nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    seal = json.loads((tmp_path / "state" / "checkpoint-1" / "tristage.json").read_text())
    assert {"optimizer_0/.metadata", "optimizer_0/__0_0.distcp", "rng_state_1.pth"} < seal["files"].keys()
    assert len(seal["files"]) == 8
