"""Shapes of models for `scripts.estimate`: a table of public ones, or what a config.json says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.recipe import LoraSection
from pipeline.sources import may_be_hub_id
from scripts.bench_ppo_models import Shape

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures (`model_type`) whose parameters are counted here."""


@dataclass(frozen=True)
class ModelShape(Shape):
    """A decoder of one of the FAMILIES; its counts are those of transformers' model classes.

    Attributes:
        family: how the benchmark's models are built; nothing is counted by it here.
        head_size: channels of one attention head.
        tied: the output head is the embedding.
        small: entries of one layer's norms and biases.
    """

    head_size: int
    tied: bool
    small: int

    @property
    def query_size(self) -> int:
        """Channels of all query heads."""
        return self.num_attention_heads * self.head_size

    @property
    def key_size(self) -> int:
        """Channels of all key heads, and of all value heads."""
        return self.num_key_value_heads * self.head_size

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """One layer's matrices by name: inputs and outputs."""
        hidden, feed_forward = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (hidden, self.query_size),
            "k_proj": (hidden, self.key_size),
            "v_proj": (hidden, self.key_size),
            "o_proj": (self.query_size, hidden),
            "gate_proj": (hidden, feed_forward),
            "up_proj": (hidden, feed_forward),
            "down_proj": (feed_forward, hidden),
        }

    @property
    def layer_parameters(self) -> int:
        """Of one decoder layer."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values()) + self.small

    @property
    def trunk_parameters(self) -> int:
        """Weights of the layers' matrix products; biases, norms and embeddings are left out."""
        return self.num_hidden_layers * (self.layer_parameters - self.small)

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding alone."""
        return self.vocab_size * self.hidden_size

    @property
    def body_parameters(self) -> int:
        """Embedding, layers and last norm: a causal model without its head."""
        return self.embedding_parameters + self.num_hidden_layers * self.layer_parameters + self.hidden_size

    @property
    def parameters(self) -> int:
        """Of the causal language model; a tied head counts once."""
        return self.body_parameters + (0 if self.tied else self.embedding_parameters)

    @property
    def classifier_parameters(self) -> int:
        """Of a critic or reward model: the body and a head with one output."""
        return self.body_parameters + self.hidden_size

    def adapter_parameters(self, lora: LoraSection) -> int:
        """Of a LoRA adapter: rank x (inputs + outputs) for every matrix that it is added to."""
        named = self.linears if lora.target_modules is None else lora.target_modules
        return lora.rank * self.num_hidden_layers * sum(sum(self.linears[name]) for name in named)


def _shape(family: str, **sizes: Any) -> ModelShape:
    """From the names of a transformers configuration; biases and further norms as the family has them."""
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    key_heads = sizes.get("num_key_value_heads") or heads
    head_size = sizes.get("head_dim") or hidden // heads
    query, key, feed_forward = heads * head_size, key_heads * head_size, sizes["intermediate_size"]
    small = 2 * hidden
    if family == "qwen2" or sizes.get("attention_bias"):
        small += query + 2 * key
    if family != "qwen2" and sizes.get("attention_bias"):
        small += hidden
    if family == "qwen3":
        small += 2 * head_size
    if sizes.get("mlp_bias"):
        small += 2 * feed_forward + hidden
    return ModelShape(
        family="qwen2" if family == "qwen2" else "llama",
        vocab_size=sizes["vocab_size"],
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=sizes["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_size=head_size,
        tied=bool(sizes.get("tie_word_embeddings", False)),
        small=small,
    )


def _public(family: str, vocab: int, hidden: int, feed_forward: int, layers: int, heads: tuple[int, int]) -> ModelShape:
    return _shape(
        family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        tie_word_embeddings=family == "qwen2" and hidden < 2048,
    )


NAMED = {
    "0.5b": _public("qwen2", 151936, 896, 4864, 24, (14, 2)),
    "1.5b": _public("qwen2", 151936, 1536, 8960, 28, (12, 2)),
    "7b": _public("qwen2", 152064, 3584, 18944, 28, (28, 4)),
    "8b": _public("llama", 128256, 4096, 14336, 32, (32, 8)),
    "14b": _public("qwen2", 152064, 5120, 13824, 48, (40, 8)),
    "32b": _public("qwen2", 152064, 5120, 27648, 64, (40, 8)),
    "70b": _public("llama", 128256, 8192, 28672, 80, (64, 8)),
}
"""Published configurations: Qwen2.5 0.5B, 1.5B, 7B, 14B and 32B, Llama 3 8B and 70B."""


def load_shape(model: str) -> ModelShape:
    """The shape of a name of the table, a directory with config.json, or a hub id.

    Errors:
        UserError: no such model, its configuration cannot be read, or another architecture.
    """
    if model.lower() in NAMED:
        return NAMED[model.lower()]
    path = Path(model) / "config.json"
    if not path.is_file():
        path = _fetched(model)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.", mend="Fetch the model again.") from error
    return shape_of(config, model)


def shape_of(config: Mapping[str, Any], model: str) -> ModelShape:
    """The shape that a transformers configuration describes; `model` names it in errors.

    Errors:
        UserError: an architecture that is not one of the FAMILIES, or a size that is missing.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{model} is a {family!r} model, whose parameters are not counted here.",
            mend=f"Estimate for one of {', '.join(NAMED)} of about its size, or for a {', '.join(FAMILIES)} model.",
        )
    try:
        return _shape(family, **config)
    except KeyError as error:
        raise UserError(f"{model}: config.json has no {error}.", mend="Fetch the model again.") from error


def _fetched(model: str) -> Path:
    """config.json of a hub id, fetched or from the cache."""
    known = f"Give a directory with config.json, a hub id, or one of {', '.join(NAMED)}."
    if Path(model).exists() or not may_be_hub_id(model):
        raise UserError(f"{model} holds no config.json.", mend=known)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json"))
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"config.json of {model} could not be fetched from the hub ({reason}).", mend=known) from error
