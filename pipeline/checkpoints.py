"""A library trainer's checkpoints and figures: what a killed run resumes from, and the last evaluation."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STATE_FILE = "trainer_state.json"


def newest_complete_checkpoint(state_dir: Path) -> Path | None:
    """Return the newest `checkpoint-<step>` directory whose files are all whole, or None.

    transformers writes `trainer_state.json` last (transformers/trainer.py, `_save_checkpoint`), so
    a checkpoint without a readable one was cut off by a kill. Weights and torch files are checked
    too, because a power cut may lose the end of a file that was written before.
    """
    if not state_dir.is_dir():
        return None
    steps = {
        int(match.group(1)): path
        for path in state_dir.iterdir()
        if path.is_dir() and (match := _CHECKPOINT.fullmatch(path.name))
    }
    return next(
        (steps[step] for step in sorted(steps, reverse=True) if _is_complete(steps[step], step)),
        None,
    )


def _is_complete(checkpoint: Path, step: int) -> bool:
    try:
        state = json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(state, dict) or state.get("global_step") != step:
        return False
    weights = [path for path in checkpoint.rglob("*") if path.suffix in (".safetensors", ".bin", ".distcp")]
    if not any(path.name != "training_args.bin" for path in weights):
        return False
    archives = [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]
    return all(_safetensors_whole(path) for path in checkpoint.glob("*.safetensors")) and all(
        zipfile.is_zipfile(path) for path in archives
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
