"""Tiny policies and prepared stage directories for tests that run a stage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.pipeline.conftest import CORPUS, save_tiny_tokenizer

VOCABULARY = 300


def save_tiny_policy(directory: Path, *, chat_template: str | None = None, tied: bool = True) -> Path:
    """A random two-layer Llama with the tiny tokenizer, seeded."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    save_tiny_tokenizer(directory, chat_template=chat_template)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def demonstrations(count: int) -> list[dict[str, str]]:
    """Prompt/response rows of unequal lengths with different prompts, a quarter of them held
    out.
    """
    words = " ".join(CORPUS).split()
    return [
        {
            "prompt": f"row {index} {words[index % len(words)]}",
            "response": " " + " ".join(words[index % 7 : index % 7 + 1 + index % 5]),
            "split": "eval" if index % 4 == 0 else "train",
        }
        for index in range(count)
    ]


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A JSONL file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def prepare_stage(out: Path, recipe: Mapping[str, Any], name: str, inputs: Mapping[str, Path]) -> Path:
    """Writes what the runner writes before it starts a stage's process; returns `out`."""
    from pipeline.load import RESOLVED, dump_recipe
    from pipeline.recipe import Recipe
    from pipeline.stage import JOB

    out.mkdir(parents=True, exist_ok=True)
    (out / RESOLVED).write_text(dump_recipe(Recipe.model_validate(recipe)))
    job = {
        "stage": name,
        "fingerprint": {"sha256": "0" * 64},
        "inputs": {
            role: {"path": str(path), "kinds": ["model", "sft", "rm"], "wanted_as": name, "identity": {}}
            for role, path in inputs.items()
        },
        "spent": {"wall_seconds": 0.0, "cpu_seconds": 0.0},
        "command": ["tristage", name],
    }
    (out / JOB).write_text(json.dumps(job))
    return out
