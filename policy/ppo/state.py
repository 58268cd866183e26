"""The whole training state of PPO on disk: saved every few updates, written beside, synced and renamed."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from typing import Any

import numpy
import torch

from pipeline.artifacts import sync_directory
from policy.ppo.experience import Roles
from policy.ppo.health import Health
from policy.ppo.maths import FixedKLController
from policy.ppo.update import Learner

KEPT = 2
_NAME = re.compile(r"update_(\d+)\.pt")


def save_state(
    directory: Path, update: int, roles: Roles, learner: Learner, controller: FixedKLController, health: Health
) -> None:
    """Writes `update_<n>.pt` after `update` updates: weights, optimisers, schedules, RNGs, KL controller, health.

    Data order and sampling seeds are functions of the update number, so it is the data position too. The last
    two states are kept.
    """
    directory.mkdir(parents=True, exist_ok=True)
    numpy_rng = numpy.random.get_state(legacy=False)
    state = {
        "update": update,
        "policy": roles.policy.state_dict(),
        "critic": roles.critic.state_dict(),
        "learner": learner.state_dict(),
        "kl_controller": controller.state_dict(),
        "health": health.state_dict(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy_rng": {
            "bit_generator": numpy_rng["bit_generator"],
            "key": torch.from_numpy(numpy_rng["state"]["key"].astype("int64")),
            "pos": int(numpy_rng["state"]["pos"]),
            "has_gauss": int(numpy_rng["has_gauss"]),
            "gauss": float(numpy_rng["gauss"]),
        },
        "python_rng": random.getstate(),
    }
    beside = directory / f".update_{update:06d}.tmp"
    with beside.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(directory / f"update_{update:06d}.pt")
    sync_directory(directory)
    for old in _states(directory)[:-KEPT]:
        old.unlink()


def load_newest_state(
    directory: Path, roles: Roles, learner: Learner, controller: FixedKLController, health: Health
) -> int | None:
    """Restores the newest state in place; returns its update number, or None when there is none."""
    states = _states(directory)
    if not states:
        return None
    state: dict[str, Any] = torch.load(states[-1], map_location="cpu", weights_only=True)
    roles.policy.load_state_dict(state["policy"])
    roles.critic.load_state_dict(state["critic"])
    learner.load_state_dict(state["learner"])
    controller.load_state_dict(state["kl_controller"])
    health.load_state_dict(state["health"])
    torch.set_rng_state(state["torch_rng"])
    if state["cuda_rng"]:
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    saved = state["numpy_rng"]
    key = saved["key"].numpy().astype("uint32")
    numpy.random.set_state((saved["bit_generator"], key, saved["pos"], saved["has_gauss"], saved["gauss"]))
    random.setstate(state["python_rng"])
    return int(state["update"])


def _states(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(file for file in directory.iterdir() if _NAME.fullmatch(file.name))
