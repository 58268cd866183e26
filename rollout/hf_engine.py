"""Rollouts with transformers: any causal language model, any device, no vLLM.

Finished rows leave the batch at once and the key-value cache is written in place, so answers of
uneven length cost what their tokens cost; `generate` of transformers steps every row to the
longest answer and copies the whole cache at every token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.utils import logging as transformers_logging

from pipeline.errors import UserError
from rollout.batch import Completion
from rollout.engine import EngineOptions, SamplingOptions, check_request, one_line, text_config

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TransformersEngine:
    """The policy's copy in transformers, sampled with one random stream per sequence.

    Raises:
        UserError: the directory's weights cannot be loaded.
    """

    name = "transformers"

    def __init__(self, model_dir: str | Path, options: EngineOptions) -> None:
        directory = Path(model_dir)
        self.version = transformers.__version__
        self.policy_version = 0
        self._options = options
        self._vocab_size = text_config(directory).vocab_size
        self._unusable: str | None = None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = _load(directory, _DTYPES[options.dtype])
        torch.nn.Module.to(model, device)
        self._model: PreTrainedModel | None = model.eval().requires_grad_(False)
        self._config = model.config
        self._device = torch.device(device)
        self._stop = torch.tensor(options.stop_token_ids, dtype=torch.long, device=device)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingOptions,
        seeds: Sequence[int],
    ) -> list[Completion]:
        """See `RolloutEngine.generate`."""
        model = self._usable_model()
        room = self._options.max_model_len - sampling.max_new_tokens
        check_request(prompts, seeds, room, self._vocab_size)
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        completions: dict[int, Completion] = {}
        for start in range(0, len(prompts), self._options.max_sequences):
            chosen = by_length[start : start + self._options.max_sequences]
            batch = [prompts[index] for index in chosen]
            uniforms = _uniforms([seeds[index] for index in chosen], sampling).to(self._device)
            sampled = self._sample(model, batch, sampling, uniforms)
            completions.update(zip(chosen, sampled, strict=True))
        return [completions[index] for index in range(len(prompts))]

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]], *, version: int | None = None) -> None:
        """See `RolloutEngine.load_weights`; weights that share storage need to be given once."""
        if self._model is None:
            raise RuntimeError("the engine is closed")
        self._unusable = "its last weight update failed half-way"
        own = self._model.state_dict()
        loaded: set[int] = set()
        for name, tensor in named:
            if name not in own:
                raise ValueError(f"the model has no weight named {name!r}")
            if own[name].shape != tensor.shape:
                raise ValueError(
                    f"weight {name!r} has shape {tuple(tensor.shape)}, but the model's has {tuple(own[name].shape)}"
                )
            own[name].copy_(tensor.detach())
            loaded.add(own[name].data_ptr())
        missing = [n for n, p in self._model.named_parameters() if p.data_ptr() not in loaded]
        if missing:
            raise ValueError(f"{len(missing)} weights were not given to load_weights, first {missing[0]!r}")
        self._unusable = None
        self.policy_version = self.policy_version + 1 if version is None else version

    def rest(self) -> None:
        """Nothing: see `RolloutEngine.rest`."""

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self._model = None

    def _usable_model(self) -> PreTrainedModel:
        if self._model is None:
            raise RuntimeError("the engine is closed")
        if self._unusable is not None:
            raise RuntimeError(f"the engine cannot generate: {self._unusable}")
        return self._model

    @torch.inference_mode()
    def _sample(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingOptions,
        uniforms: torch.Tensor,
    ) -> list[Completion]:
        """Sample B prompts of up to P tokens together; uniforms [B, N] decide the draws."""
        inputs, mask = _left_pad(prompts, sampling.max_new_tokens, self._device)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)  # [B, P + N]
        rows = torch.arange(len(prompts), device=self._device)  # batch slot -> prompt
        tokens = rows.new_zeros(len(prompts), sampling.max_new_tokens)
        logprobs = torch.zeros(tokens.shape, device=self._device)
        lengths = torch.full_like(rows, sampling.max_new_tokens)
        finished = torch.zeros_like(rows, dtype=torch.bool)
        cache, compactable = _make_cache(self._config, mask.shape[1])
        prompt_width = inputs.shape[1]
        for step in range(sampling.max_new_tokens):
            width = prompt_width + step
            logits = model(
                input_ids=inputs,
                attention_mask=mask[:, :width],
                position_ids=positions[:, width - inputs.shape[1] : width],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            inputs, picked = _pick(logits.float(), uniforms[rows, step], sampling.temperature)
            tokens[rows, step], logprobs[rows, step] = inputs, picked
            ended = torch.isin(inputs, self._stop) & ~finished[rows]
            lengths[rows[ended]] = step + 1
            finished[rows[ended]] = True
            if bool(finished.all()):
                break
            if compactable and bool(ended.any()):
                kept = _fill_holes(~ended)
                cache.batch_select_indices(kept)
                rows, mask, positions, inputs = (
                    rows[kept],
                    mask[kept],
                    positions[kept],
                    inputs[kept],
                )
            inputs = inputs[:, None]
        return _completions(tokens, logprobs, lengths, finished, self.policy_version)


def _load(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    showed_progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"transformers cannot load the model in {directory}: {one_line(error)}",
            mend="Point the engine at a causal language model written by save_pretrained.",
        ) from error
    finally:
        if showed_progress:
            transformers_logging.enable_progress_bar()


def _left_pad(prompts: Sequence[Sequence[int]], room: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, P], prompts at the right edge, and mask [B, P + room], False on the padding."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest + room, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _uniforms(seeds: Sequence[int], sampling: SamplingOptions) -> torch.Tensor:
    """[B, N] numbers in [0, 1), row b from a generator seeded with seeds[b] and nothing else."""
    draws = torch.empty(len(seeds), sampling.max_new_tokens, dtype=torch.float64)
    for row, seed in enumerate(seeds):
        draws[row].uniform_(generator=torch.Generator().manual_seed(seed))
    return draws


def _pick(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row by inversion of the distribution function, and its log-prob.

    token = min {v : sum_{w <= v} p_w > u},  p = softmax(logits / temperature)

    Args:
        logits: [B, V] float32. uniforms: [B] float64 in [0, 1). temperature: 0 means argmax.

    Returns:
        tokens [B] and log p_token [B]; at temperature 0 p = softmax(logits).
    """
    if temperature == 0.0:
        logprobs = logits.log_softmax(-1)
        tokens = logits.argmax(-1)
    else:
        logprobs = (logits / temperature).log_softmax(-1)
        cumulative = logprobs.double().exp().cumsum(-1)
        target = uniforms * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
        tokens = tokens.clamp_max(logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _fill_holes(live: torch.Tensor) -> torch.Tensor:
    """Indices [n] of the n live rows such that those already among the first n keep their slot."""
    count = int(live.sum())
    order = torch.arange(count, device=live.device)
    order[~live[:count]] = live[count:].nonzero()[:, 0] + count
    return order


def _completions(
    tokens: torch.Tensor, logprobs: torch.Tensor, lengths: torch.Tensor, finished: torch.Tensor, version: int
) -> list[Completion]:
    rows = zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), finished.tolist(), strict=True)
    return [
        Completion(token_ids=tuple(ids[:n]), logprobs=tuple(values[:n]), finished=ended, policy_version=version)
        for ids, values, n, ended in rows
    ]


class _ReservedLayer(DynamicLayer):
    """A layer's keys and values in storage reserved for `capacity` positions, written in place."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._length = 0
        self._stores: tuple[torch.Tensor, ...] = ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, H, q, D] states and return views on everything kept so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._stores = tuple(
                states.new_empty(*states.shape[:2], self._capacity, states.shape[3])
                for states in (key_states, value_states)
            )
        end = self._length + key_states.shape[-2]
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store[: states.shape[0], :, self._length : end] = states
        self._length = end
        return self._show(key_states.shape[0])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`; only those that change their slot are copied."""
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        for store in self._stores:
            store[moved, :, : self._length] = store[indices[moved], :, : self._length]
        self._show(len(indices))

    def _show(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (store[:rows, :, : self._length] for store in self._stores)
        self.keys, self.values = keys, values
        return keys, values


def _make_cache(config: transformers.PretrainedConfig, capacity: int) -> tuple[Cache, bool]:
    """An empty cache for the model, and whether rows can be taken out of it."""
    cache = DynamicCache(config=config)
    cache.layers = [_ReservedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    row_wise = (_ReservedLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)
    return cache, all(type(layer) in row_wise for layer in cache.layers)
