"""Tokens and optimiser steps in the manifests, counted again from the files with the bare tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.stage import Stage
from policy.ppo.stage import run as run_ppo
from policy.preference import run as run_direct
from policy.sft import run as run_sft
from reward_model.train import run as run_rm
from tests.policy.ppo.test_stage import _reward_model, _stage
from tests.tiny_stage import prepare_stage, write_rows
from tests.workplace import Workplace, change_rows, make_workplace

TRAIN = 38
EPOCHS = 2
CUT = 8
ROWS = 4


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    """Every data set trains on its first 38 rows: 10 steps of 4 rows in an epoch, the last of 2."""
    made = make_workplace(tmp_path / "work")
    for name, rows in (("sft", 48), ("rankings", 48), ("prompts", 40)):
        splits = {n: {"split": "train" if n < TRAIN else "eval"} for n in range(rows)}
        change_rows(made.path / f"{name}.jsonl", splits)
    return made


def counts_of(place: Workplace, name: str, run: Any, **section: Any) -> tuple[int, int, dict[str, list[str]]]:
    """`trained_tokens`, `optimizer_steps` and `models_in_memory` of a stage on the workplace."""
    trainer = {"learning_rate": 1e-4, "num_train_epochs": EPOCHS, "per_device_train_batch_size": ROWS // 2}
    trainer |= {"gradient_accumulation_steps": 2, "eval_steps": 0.5}
    data = {"sft": "sft", "preferences": "rankings", "prompts": "prompts"}
    recipe: Mapping[str, Any] = {
        "name": "tiny",
        "model": {"name_or_path": "model", "lora": {"rank": 4, "alpha": 8.0}},
        "data": {
            **{key: str(place.path / f"{file}.jsonl") for key, file in data.items()},
            "max_prompt_tokens": 24,
            "max_response_tokens": CUT,
        },
        name: {"trainer": trainer, **section},
        "rollout": {"engine": "transformers"},
        "eval": {"prompts": 2, "samples_per_prompt": 1},
    }
    inputs = {"model" if name == "sft" else "policy": place.path / "model"}
    stage = Stage(prepare_stage(place.run / f"{name}.partial", recipe, name, inputs))
    final = stage.complete(run(stage))
    manifest = json.loads((final / "manifest.json").read_text())
    metrics = manifest["metrics"]
    return metrics["trained_tokens"], metrics["optimizer_steps"], manifest["models_in_memory"]


def training_rows(place: Workplace, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place.path / file).read_text().splitlines()][:TRAIN]


def lengths(place: Workplace, texts: list[str]) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(place.path / "model")
    return [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]


def prompt_lengths(place: Workplace, rows: list[dict[str, Any]]) -> list[int]:
    """With BOS."""
    return [1 + length for length in lengths(place, [row["prompt"] for row in rows])]


def answer_lengths(place: Workplace, texts: list[str]) -> list[int]:
    """With EOS, cut at 8 tokens."""
    return [min(CUT, 1 + length) for length in lengths(place, texts)]


def different_answers(place: Workplace, texts: list[str]) -> int:
    """Tokens of the answers, those that are the same once cut counted once."""
    tokenizer = AutoTokenizer.from_pretrained(place.path / "model")
    return sum(len(ids) for ids in {(*tokenizer(text, add_special_tokens=False).input_ids, 2)[:CUT] for text in texts})


def test_sft_trains_on_prompts_and_responses(place: Workplace) -> None:
    rows = training_rows(place, "sft.jsonl")
    tokens = sum(prompt_lengths(place, rows)) + sum(answer_lengths(place, [row["response"] for row in rows]))
    models = {"training": ["policy"], "peak": ["policy"], "engine": ["policy"]}
    assert counts_of(place, "sft", run_sft) == (EPOCHS * tokens, EPOCHS * 10, models)


def test_the_reward_model_reads_the_prompt_with_every_answer(place: Workplace) -> None:
    rows = training_rows(place, "rankings.jsonl")
    tokens = 3 * sum(prompt_lengths(place, rows))
    tokens += sum(answer_lengths(place, [answer for row in rows for answer in row["responses"]]))
    counted, steps, models = counts_of(place, "rm", run_rm, lora=True)
    assert (counted, steps) == (EPOCHS * tokens, EPOCHS * 10)
    assert models["training"] == ["base", "reward adapter"]


@pytest.mark.parametrize("lora", [False, True])
def test_answers_of_one_prompt_share_its_tokens(place: Workplace, lora: bool) -> None:
    rows = training_rows(place, "rankings.jsonl")
    tokens = sum(prompt_lengths(place, rows)) + sum(different_answers(place, row["responses"]) for row in rows)
    counted, steps, models = counts_of(place, "dpo", run_direct, lora=lora)
    assert (counted, steps) == (EPOCHS * tokens, EPOCHS * 10)
    training = ["base", "policy adapter"] if lora else ["policy"]
    assert models == {"training": training, "peak": training if lora else ["policy", "reference"], "engine": ["policy"]}


def test_kto_does_not_count_what_gets_no_gradient(place: Workplace) -> None:
    """The best answer of each ranking is desirable, the third of odd ones undesirable, the rest at the median."""
    rows = training_rows(place, "rankings.jsonl")
    odd = rows[1::2]
    tokens = sum(prompt_lengths(place, [*rows, *odd]))
    tokens += sum(answer_lengths(place, [row["responses"][0] for row in rows] + [row["responses"][2] for row in odd]))
    counted, steps, _ = counts_of(place, "kto", run_direct)
    assert len(rows) + len(odd) == 57
    assert (counted, steps) == (EPOCHS * tokens, EPOCHS * 15)


def test_ppo_counts_every_epoch_of_what_it_generated(tmp_path: Path) -> None:
    """8 training prompts and batches of 8: each update asks all of them once and passes over the answers twice."""
    place = make_workplace(tmp_path / "work")
    rows = [{"prompt": f"film {n} {'old ' * (n % 5)}", "split": "train" if n < 8 else "eval"} for n in range(12)]
    write_rows(place.path / "prompts.jsonl", rows)
    stage = _stage(place, _reward_model(place), updates=3)
    metrics = run_ppo(stage)
    logged = [json.loads(line) for line in (stage.out / "metrics.jsonl").read_text().splitlines()]
    generated = sum(8 * row["response/length"] for row in logged if "response/length" in row)
    prompts = 3 * sum(prompt_lengths(place, rows[:8]))
    assert metrics["generated_tokens"] == round(generated)
    assert metrics["trained_tokens"] == 2 * (prompts + round(generated))
    assert metrics["optimizer_steps"] == 3 * 2 * 2
    manifest = json.loads((stage.complete(metrics) / "manifest.json").read_text())
    roles = ["policy", "reference", "critic", "reward rm"]
    assert manifest["models_in_memory"] == {"training": roles, "peak": roles, "engine": ["policy"]}
