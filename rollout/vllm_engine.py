"""Rollouts with vLLM inside the trainer's process, on the CPU and on CUDA.

vLLM is written to own its process. What is done here about it:

* Its start-up replaces `torch.set_num_threads`, reseeds python's, numpy's and torch's generators
  and writes to the environment: all of it is put back (`trainer_state_kept`).
* Its shutdown, and the garbage collection of an `LLM`, destroy the default process group, which is
  the trainer's: only vLLM's own groups are destroyed (`_release_groups`).
* Started before the process group exists it makes a world of one process on every rank, and data
  parallelism is silently off: refused (`refuse_lone_rank`).
* On the CPU a head that is tied to the embedding keeps its packed copy of the old weights after a
  reload, and cached prefixes keep the old keys and values: both are renewed (`load_weights`).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from pipeline.errors import UserError
from rollout.batch import Completion
from rollout.engine import (
    IMPORT_FAILURES,
    EngineOptions,
    SamplingOptions,
    check_request,
    one_line,
    read_config,
    text_config,
)

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.v1.engine.core_client import EngineCoreClient

_GIB = 1024**3


class VllmEngine:
    """The policy's copy in vLLM, colocated with the trainer.

    Args:
        model_dir: checkpoint directory; no tokenizer is needed in it.
        options: see `EngineOptions`.
        notify: receives one line where the key-value cache is too small for `max_sequences`.

    Raises:
        UserError: this process is one of several and has no process group yet, or vLLM refuses
            the model or the sizes.
    """

    name = "vllm"

    def __init__(
        self, model_dir: str | Path, options: EngineOptions, notify: Callable[[str], None]
    ) -> None:
        refuse_lone_rank()
        directory = Path(model_dir)
        self.policy_version = 0
        self._options = options
        self._vocab_size = text_config(directory).vocab_size
        self._unusable: str | None = None
        with trainer_state_kept():
            self._weight_names = _weight_names(directory)
            _set_environment()
            import vllm

            self.version = str(vllm.__version__)
            _make_safe()
            gc.freeze()
            with _memory_unbound():
                self._llm: LLM | None = _start(directory, options)
        _notify_small_cache(self._llm, options, notify)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingOptions,
        seeds: Sequence[int],
    ) -> list[Completion]:
        """See `RolloutEngine.generate`."""
        llm = self._usable_llm()
        room = self._options.max_model_len - sampling.max_new_tokens
        check_request(prompts, seeds, room, self._vocab_size)
        if not prompts:
            return []
        params = [_sampling_params(sampling, self._options, seed) for seed in seeds]
        with _generators_kept(), _requests_dropped_on_error(llm):
            outputs = llm.generate(
                [{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False
            )
        return [_completion(output, self._options.stop_token_ids) for output in outputs]

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See `RolloutEngine.load_weights`; the prefix cache is emptied with it.

        Raises:
            RuntimeError: requests are still in flight, so that the prefix cache cannot be emptied.
        """
        if self._llm is None:
            raise RuntimeError("the engine is closed")
        self._unusable = "its last weight update failed half-way"
        given: set[str] = set()
        worker = self._llm.llm_engine.model_executor.driver_worker.worker
        with _generators_kept():
            worker.reload_weights(weights_iterator=_counted(named, given))
        missing = sorted(self._weight_names - given)
        if missing:
            raise ValueError(
                f"{len(missing)} weights were not given to load_weights, first {missing[0]!r}"
            )
        renew_packed_heads(worker.model_runner.model)
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: requests are still in flight")
        self._unusable = None
        self.policy_version += 1

    def close(self) -> None:
        """See `RolloutEngine.close`; the trainer's process group stays as it is."""
        if self._llm is not None:
            llm, self._llm = self._llm, None
            client = llm.llm_engine.engine_core
            _LIVE_CLIENTS.discard(client)
            client.shutdown()

    def _usable_llm(self) -> LLM:
        if self._llm is None:
            raise RuntimeError("the engine is closed")
        if self._unusable is not None:
            raise RuntimeError(f"the engine cannot generate: {self._unusable}")
        return self._llm


def import_failure() -> str | None:
    """Why vLLM cannot be imported, in one line; None once it has been imported."""
    with trainer_state_kept():
        _set_environment()
        try:
            import vllm  # noqa: F401
        except IMPORT_FAILURES as error:
            return one_line(error)
    return None


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
def _generators_kept() -> Iterator[None]:
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
def _memory_unbound() -> Iterator[None]:
    """Keep vLLM from binding the process, the trainer with it, to the memory of one NUMA node."""
    if torch.cuda.is_available():
        yield
        return
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
    with _generators_kept(), _collection_paused(), warnings.catch_warnings():
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


def _set_environment() -> None:
    """What vLLM reads on import: in-process, quiet, and no usage report sent anywhere."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])


# Start


def _start(directory: Path, options: EngineOptions) -> LLM:
    from vllm import LLM

    on_cpu = not torch.cuda.is_available()
    several = dist.is_initialized() and dist.get_world_size() > 1
    had_group = dist.is_initialized()
    try:
        llm = LLM(
            str(directory),
            skip_tokenizer_init=True,
            use_tqdm_on_load=False,
            generation_config="vllm",
            dtype=options.dtype,  # pyright: ignore[reportArgumentType]  (checked by EngineOptions)
            seed=options.seed,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_sequences,
            enforce_eager=on_cpu,
            kv_cache_memory_bytes=int(options.kv_cache_gib * _GIB) if on_cpu else None,
            gpu_memory_utilization=options.gpu_memory_utilization,
            logprobs_mode="processed_logprobs",
            distributed_executor_backend="external_launcher" if several else "uni",
        )
    except (ValueError, SafetensorError) as error:
        if not any(True for _ in _LIVE_CLIENTS):
            _release_groups()
        raise UserError(
            f"vLLM refuses the model in {directory}: {_reason(error)}",
            mend="Change what it names (rollout.kv_cache_gib, the lengths, the model), or set "
            "rollout.engine: transformers.",
        ) from error
    finally:
        if not had_group and dist.is_initialized():
            _GROUP_MADE_BY_VLLM.append(dist.group.WORLD)
    _LIVE_CLIENTS.add(llm.llm_engine.engine_core)
    return llm


def _reason(error: Exception) -> str:
    """The telling line of a vLLM error: pydantic puts it second, after a count."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:
        return lines[1]
    return one_line(error)


def _notify_small_cache(llm: LLM, options: EngineOptions, notify: Callable[[str], None]) -> None:
    """Say so where fewer than `max_sequences` sequences of full length fit into the cache."""
    cache = llm.llm_engine.vllm_config.cache_config
    blocks = cache.num_gpu_blocks
    if torch.cuda.is_available() or not blocks:
        return
    per_sequence = -(-options.max_model_len // cache.block_size)
    if blocks < per_sequence * options.max_sequences:
        wanted = options.kv_cache_gib * per_sequence * options.max_sequences / blocks
        notify(
            f"vLLM's key-value cache of {options.kv_cache_gib:g} GiB holds "
            f"{blocks // per_sequence} of {options.max_sequences} full-length sequences at a time; "
            f"rollout.kv_cache_gib: {wanted:.2g} would hold all."
        )


# Requests


def _sampling_params(sampling: SamplingOptions, options: EngineOptions, seed: int) -> SamplingParams:
    """Plain sampling: nothing of the model directory's generation_config takes part."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seed=seed,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        repetition_penalty=1.0,
        ignore_eos=True,
        stop_token_ids=list(options.stop_token_ids),
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
    )


def _completion(output: RequestOutput, stop_token_ids: tuple[int, ...]) -> Completion:
    (sampled,) = output.outputs
    token_ids = tuple(sampled.token_ids)
    logprobs = tuple(sampled.logprobs.logprobs)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]  (flat_logprobs)
    if len(logprobs) != len(token_ids):
        raise RuntimeError(f"vLLM gave {len(logprobs)} log-probs for {len(token_ids)} tokens")
    return Completion(
        token_ids=token_ids, logprobs=logprobs, finished=token_ids[-1] in stop_token_ids
    )


@contextlib.contextmanager
def _requests_dropped_on_error(llm: LLM) -> Iterator[None]:
    """Leave no request in flight after an error or Ctrl-C: the next call would answer it."""
    try:
        yield
    except BaseException:
        engine = llm.llm_engine
        engine.abort_request(list(engine.output_processor.request_states), internal=True)
        raise


# Weights


def _counted(
    named: Iterable[tuple[str, torch.Tensor]], given: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in named:
        given.add(name)
        yield name, tensor.detach()


def _weight_names(directory: Path) -> set[str]:
    """What `named_parameters` of the model yields: a reload that leaves one out scrambles a layer.

    The model is built without storage, so that a tied head counts once whatever the files hold.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(read_config(directory))
    except ValueError as error:
        raise UserError(
            f"{directory} holds no causal language model: {one_line(error)}",
            mend="Point the engine at the policy's directory.",
        ) from error
    return {name for name, _ in model.named_parameters()}


def renew_packed_heads(model: torch.nn.Module) -> None:
    """Pack every output head anew on the CPU, where it multiplies by a packed copy of its weight.

    A reload packs the module that owns a weight; a tied head shares the embedding's weight but has
    a packed copy of its own, which would stay at the old values without an error.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    if torch.cuda.is_available():
        return
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


# Shutdown

# Engines that are neither closed nor collected. Their groups are shared.
_LIVE_CLIENTS: weakref.WeakSet[EngineCoreClient] = weakref.WeakSet()
_GROUP_MADE_BY_VLLM: list[object] = []


def _make_safe() -> None:
    """Replace what must not run in a trainer's process, before an engine is started.

    * `cleanup_dist_env_and_memory`, which every way to the end of an engine calls (close, garbage
      collection, interpreter exit), destroys the default process group: see `_release_groups`.
    * `batched_count_greater_than` is compiled by inductor on first use even in eager mode, for some
      6 CPU-seconds; the plain expression is as fast on a CPU. (The other compiled helper,
      `compiled_random_sample`, draws for requests without a seed, and ours all have one.)
    """
    import vllm.v1.engine.core as engine_core
    import vllm.v1.sample.sampler as sampler

    vars(engine_core)["cleanup_dist_env_and_memory"] = _release_groups
    if not torch.cuda.is_available():
        vars(sampler)["batched_count_greater_than"] = _count_at_least


def _count_at_least(values: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Per row of values [B, V], how many are >= thresholds [B, 1]."""
    return (values >= thresholds).sum(-1)


def _release_groups(shutdown_ray: bool = False) -> None:
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
