"""A library trainer's checkpoints and figures: what a killed run resumes from, and the last evaluation."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import sync_directory
from pipeline.errors import UserError
from pipeline.ranks import ALONE, Ranks
from pipeline.seals import find_damage, hash_files, read_seal, shown, together, write_seal
from pipeline.shards import METADATA, SUFFIX, shards_whole

if TYPE_CHECKING:
    from transformers import Trainer

SEAL = "tristage.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STATE_FILE = "trainer_state.json"


def seal_checkpoint(checkpoint: Path, ranks: Ranks = ALONE) -> None:
    """Flushes a finished checkpoint to disk and writes `tristage.json`, the sha256 of its files, last.

    transformers flushes nothing, and no rank waits for the others to write theirs. All ranks call it, each once it
    has written its files; they share the reading.
    """
    ranks.barrier()
    listed = sorted(
        file.relative_to(checkpoint).as_posix()
        for file in checkpoint.rglob("*")
        if file.is_file() and file.name not in (SEAL, f".{SEAL}.tmp")
    )
    names = ranks.broadcast(listed)
    with together(ranks):
        hashes = hash_files(checkpoint, [names[index] for index in ranks.share(range(len(names)))])
    every = {name: sha256 for part in ranks.gather(hashes) for name, sha256 in part.items()}
    with together(ranks):
        if ranks.is_main:
            for folder in {(checkpoint / name).parent for name in names}:
                sync_directory(folder)
            write_seal(checkpoint / SEAL, every)
            sync_directory(checkpoint.parent)


def newest_complete_checkpoint(
    state_dir: Path, ranks: Ranks = ALONE, *, say: Callable[[str], None] | None = None
) -> Path | None:
    """The newest `checkpoint-<step>` directory whose files are all whole, or None; the same on all ranks.

    One with a seal has the hashes that the seal says; `say` tells of any that has not. One without was cut off
    before it got its seal, and counts where its files look whole: transformers writes `trainer_state.json` last
    (transformers/trainer.py, `_save_checkpoint`), and files that were not flushed may have lost their end.

    Errors:
        UserError: there are checkpoints with a seal, all of them are damaged, and no other is whole.
    """
    damages: list[str] = []
    for step, checkpoint in reversed(ranks.broadcast(_checkpoints(state_dir))):
        with together(ranks):
            seal = _seal_of(checkpoint, step, ranks.world) if ranks.is_main else None
        seal = ranks.broadcast(seal)
        if seal is None:
            continue
        damage = seal if isinstance(seal, str) else find_damage(checkpoint, seal["files"], ranks)
        if damage is None:
            for line in damages:
                if say is not None:
                    say(f"{line}: going on from {checkpoint.name}")
            return checkpoint
        damages.append(damage)
    if damages:
        raise UserError(
            f"no checkpoint of this stage is whole: {'; '.join(damages)}.",
            mend="Restore the files, or run the stage again with --overwrite: it starts anew.",
        )
    return None


def _checkpoints(state_dir: Path) -> list[tuple[int, Path]]:
    """Step and directory of every checkpoint, in rising order."""
    if not state_dir.is_dir():
        return []
    return sorted(
        (int(match[1]), path)
        for path in state_dir.iterdir()
        if path.is_dir() and (match := _CHECKPOINT.fullmatch(path.name))
    )


def _seal_of(checkpoint: Path, step: int, world: int) -> dict[str, Any] | str | None:
    """The seal; a damaged one in words; an empty one for a whole checkpoint without; None for an incomplete one."""
    file = checkpoint / SEAL
    if file.exists():
        return read_seal(file) or f"{shown(file, checkpoint)} is damaged"
    return {"files": {}} if _is_complete(checkpoint, step, world) else None


def _is_complete(checkpoint: Path, step: int, world: int) -> bool:
    """Whether the files of a checkpoint without a seal look whole; of several ranks, each must have written its own."""
    try:
        state = json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(state, dict) or state.get("global_step") != step:
        return False
    weights = [path for path in checkpoint.rglob("*") if path.suffix in (".safetensors", ".bin", SUFFIX)]
    if not any(path.name != "training_args.bin" for path in weights):
        return False
    if world > 1 and not all((checkpoint / f"rng_state_{rank}.pth").exists() for rank in range(world)):
        return False
    archives = [path for suffix in ("pt", "pth", "bin") for path in checkpoint.glob(f"*.{suffix}")]
    sharded = {path.parent for path in checkpoint.rglob("*") if path.suffix == SUFFIX or path.name == METADATA}
    return (
        all(_safetensors_whole(path) for path in checkpoint.glob("*.safetensors"))
        and all(zipfile.is_zipfile(path) for path in archives)
        and all(shards_whole(folder) for folder in sharded)
    )


def _safetensors_whole(path: Path) -> bool:
    """Return whether a safetensors file has the size that its header announces."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 + header_size:
            return False
        try:
            header = json.loads(stream.read(header_size))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + header_size + max(ends, default=0)


def final_evaluation(trainer: Trainer) -> dict[str, float]:
    """The held-out figures of the trained model; the last evaluation's where it was of these weights."""
    state = trainer.state
    last = [row for row in state.log_history if "eval_loss" in row][-1:]
    if last and last[0]["step"] == state.global_step and not trainer.args.load_best_model_at_end:
        return last[0]
    return trainer.evaluate()
