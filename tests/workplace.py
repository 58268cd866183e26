"""A working directory with everything the three stages need, small enough to run them in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.pipeline.conftest import CORPUS, save_tiny_tokenizer
from tests.tiny_stage import VOCABULARY, write_rows

ROOT = Path(__file__).resolve().parent.parent
RECIPE = """\
name: tiny
model:
  name_or_path: model
data:
  sft: sft.jsonl
  preferences: rankings.jsonl
  prompts: prompts.jsonl
  eval_fraction: 0.25
  max_prompt_tokens: 24
  max_response_tokens: 8
sft:
  trainer:
    learning_rate: 1.0e-3
    max_steps: 12
    save_steps: 3
    per_device_train_batch_size: 4
    logging_steps: 1
rm:
  normalisation_samples: 8
  trainer:
    learning_rate: 1.0e-3
    max_steps: 12
    save_steps: 3
    per_device_train_batch_size: 4
    logging_steps: 1
ppo:
  updates: 7
  rollout_batch_size: 8
  num_ppo_epochs: 2
  num_minibatches: 2
  learning_rate: 1.0e-3
  critic_learning_rate: 1.0e-3
  kl_target_per_sequence: 0.5
  eval_every: 3
  save_every: 2
rollout:
  engine: transformers
eval:
  prompts: 4
  samples_per_prompt: 2
  shown_samples: 2
  judges:
    characters:
      function: length_judge:characters
"""
JUDGE = """\
def characters(prompts, responses):
    return [float(len(response)) for response in responses]
"""
WORDS = " ".join(CORPUS).split()


@dataclass(frozen=True)
class Workplace:
    """A directory to run `tristage` in.

    Attributes:
        path: holds recipe.yaml, the model and the data; runs/tiny is written below it.
    """

    path: Path

    @property
    def run(self) -> Path:
        """The recipe's run directory."""
        return self.path / "runs" / "tiny"

    def manifest(self, stage: str) -> dict[str, Any]:
        """A finished stage's manifest."""
        return json.loads((self.run / stage / "manifest.json").read_text(encoding="utf-8"))

    def rows(self, stage: str, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """Rows of a JSONL file of a stage's directory, whose last line may still be in writing."""
        path = self.run / stage / file
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Starts `tristage <words>` in a session of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", *words],
            cwd=self.path,
            env=command_environment() | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def tristage(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs `tristage <words>` to its end."""
        process = self.start(*words, **environment)
        out, err = process.communicate(timeout=500)
        return subprocess.CompletedProcess(words, process.returncode, out, err)


def command_environment() -> dict[str, str]:
    """One thread, no network, the packages of this tree."""
    fixed = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
    }
    return {key: value for key, value in os.environ.items() if key != "WANDB_API_KEY"} | fixed


def make_workplace(path: Path) -> Workplace:
    """Writes model, data, judge and recipe into `path`."""
    path.mkdir(parents=True, exist_ok=True)
    _save_model(path / "model")
    write_rows(path / "sft.jsonl", [{"prompt": f"{n} {_word(n)}", "response": _answer(n)} for n in range(48)])
    write_rows(path / "rankings.jsonl", [_ranking(n) for n in range(48)])
    write_rows(path / "prompts.jsonl", [{"prompt": f"{n} {_word(n)}"} for n in range(40)])
    (path / "length_judge.py").write_text(JUDGE)
    (path / "recipe.yaml").write_text(RECIPE)
    return Workplace(path)


def change_rows(file: Path, changes: Mapping[int, Mapping[str, Any]]) -> None:
    """Updates rows of a JSONL file by their index."""
    rows: Sequence[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    write_rows(file, [{**row, **changes.get(index, {})} for index, row in enumerate(rows)])


def _save_model(directory: Path) -> None:
    """A random two-layer Llama, seeded. Heads of 32 are the smallest that vLLM's CPU attention takes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    save_tiny_tokenizer(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def _word(n: int) -> str:
    return WORDS[n % len(WORDS)]


def _answer(n: int) -> str:
    return " " + " ".join(WORDS[n % 7 : n % 7 + 1 + n % 4])


def _ranking(n: int) -> dict[str, Any]:
    """Three answers of one, two and three words, the last two tied in every other row."""
    answers = [" " + " ".join(WORDS[(n + k) % len(WORDS)] for k in range(count)) for count in (1, 2, 3)]
    return {"prompt": f"{n} {_word(n)}", "responses": answers, "ranks": [0, 1, 1 + n % 2]}
