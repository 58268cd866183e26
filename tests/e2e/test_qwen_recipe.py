"""recipes/qwen2.5-0.5b-hh.yaml in its exact shape, on local stand-ins for the hub's model and data sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from policy.models import cast
from tests.pipeline.conftest import save_tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHORT = {
    "sft.trainer.max_steps": 2,
    "rm.trainer.max_steps": 2,
    "rm.normalisation_samples": 8,
    "ppo.updates": 2,
    "ppo.force": "true",
    "ppo.rollout_batch_size": 8,
    "eval.prompts": 4,
    "data.max_response_tokens": 24,
    "data.eval_fraction": 0.3,
}


def _save_model(directory: Path) -> Path:
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    save_tiny_tokenizer(directory, chat_template=CHATML)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    cast(Qwen2ForCausalLM(config), "bfloat16").save_pretrained(directory)
    return directory


def _save_data(directory: Path) -> dict[str, Path]:
    """The columns of trl-lib/Capybara and trl-lib/hh-rlhf-helpful-base."""
    from datasets import Dataset

    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    capybara = [
        {
            "source": "made",
            "num_turns": 2,
            "messages": [
                turn("user", f"what is {i} plus one ?"),
                turn("assistant", f"it is {i + 1} ."),
                turn("user", "and the plot ?"),
                turn("assistant", "the plot was dull ."),
            ],
        }
        for i in range(24)
    ]
    helpful = [
        {
            "prompt": [turn("user", f"tell me of film {i}")],
            "chosen": [turn("assistant", "this film is a quiet wonder .")],
            "rejected": [turn("assistant", "the jokes were old .")],
        }
        for i in range(24)
    ]
    paths = {"sft": directory / "capybara", "preferences": directory / "helpful"}
    Dataset.from_list(capybara).save_to_disk(paths["sft"])
    Dataset.from_list(helpful).save_to_disk(paths["preferences"])
    return paths


@pytest.mark.slow
@pytest.mark.vllm
def test_three_stages_in_bfloat16_on_chat_data_with_vllm(tmp_path: Path) -> None:
    settings = {"model.name_or_path": _save_model(tmp_path / "qwen"), "output_dir": tmp_path / "runs", **SHORT}
    settings |= {f"data.{key}": path for key, path in _save_data(tmp_path).items()}
    words = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "pipeline.cli", "run", "recipes/qwen2.5-0.5b-hh.yaml", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "runs" / "qwen2.5-0.5b-hh"
    manifest = json.loads((out / "ppo" / "manifest.json").read_text())
    assert manifest["engine"]["name"] == "vllm"
    assert json.loads((out / "ppo" / "config.json").read_text())["dtype"] == "bfloat16"
    rows = [json.loads(line) for line in (out / "ppo" / "metrics.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "loss/policy_avg" in row]
    assert len(losses) == 2
    assert losses[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert losses[0]["rollout/mean_probability_gap"] < 0.01
