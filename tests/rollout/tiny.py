"""Tiny random models for the engines' tests, and what they must answer by a plain forward pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCABULARY = 128
MODEL_EOS = 2  # in the model's configuration, but no stop token of the engines under test
STOP = (3, 4, 5, 6)
POSITIONS = 512


def save_llama(directory: Path, *, tied: bool) -> Path:
    """A two-layer Llama with sharp logits and a generation_config that must not be obeyed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=MODEL_EOS,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    defaults = {"do_sample": True, "top_k": 3, "top_p": 0.5, "temperature": 0.3}
    defaults |= {"repetition_penalty": 1.5, "eos_token_id": MODEL_EOS, "max_new_tokens": 3}
    (directory / "generation_config.json").write_text(json.dumps(defaults))
    return directory


def load_llama(directory: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def perturb(model: PreTrainedModel, seed: int, scale: float = 0.05) -> None:
    """A policy update: every weight moves."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(7, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def forward_logits(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """[R, V] logits that the response's tokens were drawn from, by one pass without a cache."""
    ids = torch.tensor([[*prompt, *response]])
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()


def forward_logprobs(
    model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
) -> torch.Tensor:
    """[R] log-probs of the response's tokens."""
    logprobs = (forward_logits(model, prompt, response) / temperature).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(response)[:, None])[:, 0]


def greedy(model: PreTrainedModel, prompt: Sequence[int], limit: int) -> list[int]:
    """The most likely continuation, one full pass per token, up to a stop token."""
    response: list[int] = []
    while len(response) < limit and not (response and response[-1] in STOP):
        response.append(int(forward_logits(model, prompt, [*response, 0])[-1].argmax()))
    return response
