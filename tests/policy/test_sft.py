"""The SFT stage: where loss falls, what is saved, and a killed run that completes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoints import newest_complete_checkpoint
from pipeline.errors import UserError
from pipeline.recipe import ModelSection, Recipe
from pipeline.records import Prompt, SftExample
from pipeline.tokens import EncodedExample, Encoder, encode_sft, load_tokenizer
from policy.sft import make_trainer, sft_arguments, sft_rows, shown_prompts
from tests.tiny_stage import demonstrations, prepare_stage, save_tiny_policy, write_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def any_policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"), tied=request.param)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def _recipe(policy: Path, tmp_path: Path, **trainer: Any) -> dict[str, Any]:
    rows = write_rows(tmp_path / "sft.jsonl", demonstrations(32))
    settings = {"learning_rate": 0.01, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8}
    return {
        "name": "tiny",
        "output_dir": str(tmp_path / "runs"),
        "seed": 3,
        "model": {"name_or_path": str(policy)},
        "data": {"sft": str(rows), "max_prompt_tokens": 24, "max_response_tokens": 40},
        "sft": {"trainer": {**settings, **trainer}},
        "eval": {"shown_samples": 3},
        "tracking": {"progress": False},
    }


def _run(recipe: dict[str, Any], policy: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    from pipeline.stage import Stage
    from policy.sft import run

    out = prepare_stage(tmp_path / "sft.partial", recipe, "sft", {"model": policy})
    return out, run(Stage(out))


def test_loss_falls_on_the_response_and_its_eos_only(policy: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(policy, ModelSection(name_or_path=str(policy)))
    recipe = Recipe.model_validate(_recipe(policy, tmp_path))
    encoder = Encoder(tokenizer, 24, 40)
    examples = [
        SftExample(Prompt("this film is"), " a quiet wonder"),
        SftExample(Prompt("the plot"), " was dull"),
        SftExample(None, "what is two plus two ?"),
    ]
    encoded, _ = encode_sft(examples, encoder, recipe.data)
    trainer = make_trainer_of(policy, tokenizer, recipe, tmp_path, encoded)
    (batch,) = trainer.get_eval_dataloader()
    supervised = [
        tokenizer.decode([token for token, label in zip(ids, labels, strict=True) if label != -100])
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    ]
    assert supervised == [" a quiet wonder</s>", " was dull</s>", "what is two plus two ?</s>"]
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert not kept[batch["attention_mask"] == 0].any()
    assert tokenizer.decode(batch["input_ids"][1][batch["attention_mask"][1] == 1]) == "<s>the plot was dull</s>"


def make_trainer_of(policy: Path, tokenizer: Any, recipe: Recipe, tmp_path: Path, encoded: list[EncodedExample]) -> Any:
    from policy.models import load_policy

    arguments = sft_arguments(recipe, tmp_path / "state", 64)
    return make_trainer(load_policy(policy, "float32"), tokenizer, arguments, (encoded, encoded))


def test_a_cut_response_has_no_eos_to_learn() -> None:
    rows = sft_rows([EncodedExample([1, 5, 6, 7, 8], 2)])
    assert rows == {"input_ids": [[1, 5, 6, 7, 8]], "labels": [[-100, -100, 6, 7, 8]]}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"packing": True}, r"longest example has 30 tokens and max_length is None"),
        ({"packing": True, "max_length": 29}, r"at least 30"),
        ({"max_length": 20}, r"sft\.trainer\.max_length is set by the stage"),
        ({"completion_only_loss": False}, r"sft\.trainer\.completion_only_loss is set by the stage"),
        ({"seed": 1}, r"sft\.trainer\.seed is set by the stage"),
        ({"learning_rat": 1.0}, r"Did you mean 'learning_rate'"),
    ],
)
def test_settings_that_would_ruin_a_run_are_refused(
    policy: Path, tmp_path: Path, settings: dict[str, Any], problem: str
) -> None:
    recipe = Recipe.model_validate(_recipe(policy, tmp_path, **settings))
    with pytest.raises(UserError, match=problem):
        sft_arguments(recipe, tmp_path / "state", 30)


def test_shown_prompts_are_different_and_open_plain_texts() -> None:
    held_out = [
        SftExample(Prompt("a"), "x"),
        SftExample(Prompt("a"), "y"),
        SftExample(None, "one two three four five six"),
        SftExample(Prompt("b"), "z"),
    ]
    assert [prompt.content for prompt in shown_prompts(held_out, 2)] == ["a", "one two three four"]


def test_the_stage_leaves_a_model_that_loads_and_has_learnt(any_policy: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = _recipe(any_policy, tmp_path, num_train_epochs=6)
    out, metrics = _run(recipe, any_policy, tmp_path)
    before = AutoModelForCausalLM.from_pretrained(any_policy)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    tied = before.config.tie_word_embeddings
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is tied
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert model.dtype == torch.float32
    assert json.loads((out / "generation_config.json").read_text()).keys() == {
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "transformers_version",
    }
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "<pad>")
    assert metrics["steps"] == 36
    assert metrics["validation_loss"] < 4.0 < torch.log(torch.tensor(300.0))
    assert metrics["validation_loss"] == pytest.approx(_held_out_loss(out, tmp_path), rel=1e-5)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["prompt"] for sample in samples] == ["row 0 this", "row 4 quiet", "row 8 cast"]
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in logged if "eval/loss" in row} == {8, 16, 24, 32, 36}


def _held_out_loss(directory: Path, tmp_path: Path) -> float:
    """Token mean of -log p over the held-out responses, rendered here and row by row in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(directory).double(),
        AutoTokenizer.from_pretrained(directory),
    )
    total, count = 0.0, 0
    for line in (tmp_path / "sft.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["split"] == "eval":
            prompt = tokenizer(row["prompt"])["input_ids"]
            response = [*tokenizer(row["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logp = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            total -= sum(float(logp[len(prompt) + t - 1, token]) for t, token in enumerate(response))
            count += len(response)
    return total / count


def test_the_same_seed_gives_the_same_weights(policy: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        out, _ = _run(_recipe(policy, tmp_path / name, max_steps=3), policy, tmp_path / name)
        weights.append(load_file(out / "model.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_weights_are_saved_in_the_recipes_dtype(policy: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    recipe = _recipe(policy, tmp_path, max_steps=1, bf16=False)
    recipe["model"]["dtype"] = "bfloat16"
    out, _ = _run(recipe, policy, tmp_path)
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.slow
def test_a_killed_run_completes_as_an_uninterrupted_one(policy: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    recipe = _recipe(policy, tmp_path, max_steps=200, save_steps=20, eval_strategy="no", save_total_limit=None)
    whole = prepare_stage(tmp_path / "whole" / "sft.partial", recipe, "sft", {"model": policy})
    killed = prepare_stage(tmp_path / "killed" / "sft.partial", recipe, "sft", {"model": policy})
    assert _start(whole).wait() == 0
    child = _start(killed)
    while newest_complete_checkpoint(killed / "state") is None:
        assert child.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    # A write that the kill cut off: newest by name, unusable.
    (killed / "state" / "checkpoint-199").mkdir()
    (killed / "state" / "checkpoint-199" / "trainer_state.json").write_text('{"global_step": 199')
    assert not (killed.with_name("sft")).exists()
    assert _start(killed).wait() == 0
    done, expected = killed.with_name("sft"), whole.with_name("sft")
    log = (done / "log.txt").read_text()
    assert "resuming from checkpoint-" in log
    assert "checkpoint-199" not in log
    assert not (done / "state").exists()
    ours, theirs = load_file(done / "model.safetensors"), load_file(expected / "model.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert _losses(done) == _losses(expected)


def test_training_that_diverges_ends_with_the_step_and_the_mend(policy: Path, tmp_path: Path) -> None:
    recipe = _recipe(policy, tmp_path, learning_rate=1e30, max_steps=4, logging_steps=1)
    with pytest.raises(UserError, match=r"sft: grad_norm is (nan|inf) at step [23]: .* diverged") as raised:
        _run(recipe, policy, tmp_path)
    assert "sft.trainer.learning_rate" in raised.value.mend


def _start(out: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "policy.sft", str(out)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )


def _losses(directory: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]
