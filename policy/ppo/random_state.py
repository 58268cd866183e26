"""The global random generators of this process: Python's, NumPy's and torch's, on the CPU and on its GPU."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """All of them, as `torch.load(weights_only=True)` can read them back."""
    numpy_state = numpy.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": {
            "bit_generator": numpy_state["bit_generator"],
            "key": torch.from_numpy(numpy_state["state"]["key"].astype("int64")),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "python": random.getstate(),
    }


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Takes back what `random_state` gave; the GPU's generator stays as it is where none was saved."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    saved = state["numpy"]
    key = saved["key"].numpy().astype("uint32")
    numpy.random.set_state((saved["bit_generator"], key, saved["pos"], saved["has_gauss"], saved["gauss"]))
    random.setstate(state["python"])
