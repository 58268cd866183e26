"""Rollouts with vLLM inside the trainer's process, on the CPU and on CUDA.

vLLM is written to own its process. What is done here about it:

* Its start-up replaces `torch.set_num_threads`, reseeds python's, numpy's and torch's generators
  and writes to the environment: all of it is put back (`trainer_state_kept`).
* Its shutdown, and the garbage collection of an `LLM`, destroy the default process group, which is
  the trainer's: only vLLM's own groups are destroyed (`release_groups`).
* Started before the process group exists it makes a world of one process on every rank, and data
  parallelism is silently off: refused (`refuse_lone_rank`).
* On the CPU a head that is tied to the embedding keeps its packed copy of the old weights after a
  reload, and cached prefixes keep the old keys and values: both are renewed (`load_weights`).
* On CUDA it would keep its memory while the trainer needs it: `rest` gives it back.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from pipeline.errors import UserError
from rollout.batch import Completion
from rollout.engine import (
    EngineOptions,
    SamplingOptions,
    check_request,
    one_line,
    read_config,
    text_config,
)
from rollout.vllm_process import (
    generators_kept,
    group_maker_noted,
    make_safe,
    memory_unbound,
    note_engine,
    on_cpu,
    refuse_lone_rank,
    release_groups,
    set_environment,
    shut_down,
    trainer_state_kept,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm import LLM, RequestOutput, SamplingParams

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

    def __init__(self, model_dir: str | Path, options: EngineOptions, notify: Callable[[str], None]) -> None:
        refuse_lone_rank()
        directory = Path(model_dir)
        self.policy_version = 0
        self._options = options
        self._vocab_size = text_config(directory).vocab_size
        self._unusable: str | None = None
        with trainer_state_kept():
            self._shapes = _weight_shapes(directory)
            self._rests = False
            set_environment()
            import vllm

            self.version = str(vllm.__version__)
            make_safe()
            gc.freeze()
            with memory_unbound():
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
        with generators_kept(), _requests_dropped_on_error(llm):
            outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)
        return [_completion(output, self._options.stop_token_ids, self.policy_version) for output in outputs]

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]], *, version: int | None = None) -> None:
        """See `RolloutEngine.load_weights`; the prefix cache is emptied with it.

        Raises:
            RuntimeError: requests are still in flight, so that the prefix cache cannot be emptied.
        """
        if self._llm is None:
            raise RuntimeError("the engine is closed")
        if self._rests:
            self._llm.wake_up(tags=["weights"])
        self._unusable = "its last weight update failed half-way"
        given: set[str] = set()
        worker = self._llm.llm_engine.model_executor.driver_worker.worker
        with generators_kept():
            worker.reload_weights(weights_iterator=_checked(named, self._shapes, given))
        missing = sorted(self._shapes.keys() - given)
        if missing:
            raise ValueError(f"{len(missing)} weights were not given to load_weights, first {missing[0]!r}")
        renew_packed_heads(worker.model_runner.model)
        if self._rests:
            self._llm.wake_up(tags=["kv_cache"])
            self._rests = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: requests are still in flight")
        self._unusable = None
        self.policy_version = self.policy_version + 1 if version is None else version

    def rest(self) -> None:
        """See `RolloutEngine.rest`: on CUDA weights and key-value cache leave the GPU, on a CPU nothing happens.

        Written from vLLM's source and not run: there was no GPU.
        """
        if self._llm is not None and not self._rests and not on_cpu():
            self._unusable = "it rests until weights are loaded"
            self._llm.sleep(level=2)
            self._rests = True

    def close(self) -> None:
        """See `RolloutEngine.close`; the trainer's process group stays as it is."""
        if self._llm is not None:
            llm, self._llm = self._llm, None
            shut_down(llm.llm_engine.engine_core)

    def _usable_llm(self) -> LLM:
        if self._llm is None:
            raise RuntimeError("the engine is closed")
        if self._unusable is not None:
            raise RuntimeError(f"the engine cannot generate: {self._unusable}")
        return self._llm


# Start


def _start(directory: Path, options: EngineOptions) -> LLM:
    from vllm import LLM

    cpu = on_cpu()
    several = dist.is_initialized() and dist.get_world_size() > 1
    try:
        with group_maker_noted():
            llm = LLM(
                str(directory),
                skip_tokenizer_init=True,
                use_tqdm_on_load=False,
                generation_config="vllm",
                dtype=options.dtype,  # pyright: ignore[reportArgumentType]  (one of DTYPES)
                seed=options.seed,
                max_model_len=options.max_model_len,
                max_num_seqs=options.max_sequences,
                enforce_eager=cpu,
                enable_chunked_prefill=not cpu,  # a split prompt's generator is rewound, which CPU generators cannot
                kv_cache_memory_bytes=int(options.kv_cache_gib * _GIB) if cpu else None,
                gpu_memory_utilization=options.gpu_memory_utilization,
                enable_sleep_mode=not cpu,
                logprobs_mode="processed_logprobs",
                distributed_executor_backend="external_launcher" if several else "uni",
            )
    except (ValueError, SafetensorError) as error:
        release_groups()
        raise UserError(
            f"vLLM refuses the model in {directory}: {_reason(error)}",
            mend="Change what it names (rollout.kv_cache_gib, the lengths, the model), or set "
            "rollout.engine: transformers.",
        ) from error
    note_engine(llm.llm_engine.engine_core)
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
    if not on_cpu() or not blocks:
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


def _completion(output: RequestOutput, stop_token_ids: tuple[int, ...], version: int) -> Completion:
    (sampled,) = output.outputs
    token_ids = tuple(sampled.token_ids)
    logprobs = tuple(sampled.logprobs.logprobs)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]  (flat_logprobs)
    if len(logprobs) != len(token_ids):
        raise RuntimeError(f"vLLM gave {len(logprobs)} log-probs for {len(token_ids)} tokens")
    return Completion(token_ids, logprobs, finished=token_ids[-1] in stop_token_ids, policy_version=version)


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


def _checked(
    named: Iterable[tuple[str, torch.Tensor]], shapes: dict[str, torch.Size], given: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass the weights on, note their names in `given`, and refuse those of another shape."""
    for name, tensor in named:
        if name in shapes and tensor.shape != shapes[name]:
            raise ValueError(
                f"weight {name!r} has shape {tuple(tensor.shape)}, but the model's has {tuple(shapes[name])}"
            )
        given.add(name)
        yield name, tensor.detach()


def _weight_shapes(directory: Path) -> dict[str, torch.Size]:
    """What `named_parameters` of the model yields: a reload that leaves one out scrambles a layer.

    The model is built without storage, so that a tied head counts once whatever the files hold.
    """
    try:
        return model_shapes(read_config(directory))
    except ValueError as error:
        raise UserError(
            f"{directory} holds no causal language model: {one_line(error)}",
            mend="Point the engine at the policy's directory.",
        ) from error


def model_shapes(config: PretrainedConfig) -> dict[str, torch.Size]:
    """Shapes by the names of `named_parameters`; a tied head has no name of its own.

    Raises:
        ValueError: the configuration is of no causal language model.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def renew_packed_heads(model: torch.nn.Module) -> None:
    """Pack every output head anew on the CPU, where it multiplies by a packed copy of its weight.

    A reload packs the module that owns a weight; a tied head shares the embedding's weight but has
    a packed copy of its own, which would stay at the old values without an error.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
