"""What SFTTrainer computes from our rows against the definition in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.recipe import Recipe
from pipeline.tokens import EncodedExample
from policy.sft import make_trainer, sft_arguments, validation_loss
from tests.tiny_stage import save_tiny_policy

pytestmark = pytest.mark.parity

EXAMPLES = [
    EncodedExample([1, 10, 11, 12, 13, 2], 3),
    EncodedExample([1, 20, 21, 2], 2),
    EncodedExample([1, 30, 31, 32, 33, 34, 35, 36, 2], 1),
    EncodedExample([40, 41, 42, 2], 0),
]


def _recipe(**trainer: Any) -> Recipe:
    settings = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "save_strategy": "no", **trainer}
    return Recipe.model_validate({"name": "t", "model": {"name_or_path": "x"}, "sft": {"trainer": settings}})


def _trainer(policy: Path, tmp_path: Path, **settings: Any) -> Any:
    from pipeline.recipe import ModelSection
    from pipeline.tokens import load_tokenizer
    from policy.models import load_policy

    longest = max(len(example.ids) for example in EXAMPLES)
    arguments = sft_arguments(_recipe(**settings), tmp_path / "state", longest)
    tokenizer = load_tokenizer(policy, ModelSection(name_or_path=str(policy)))
    return make_trainer(load_policy(policy, "float32"), tokenizer, arguments, (EXAMPLES, EXAMPLES))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def reference(policy: Path) -> tuple[float, int]:
    """Sum of -log p over response tokens and their number, row by row without padding, in
    float64.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy).double().eval()
    total, count = 0.0, 0
    for example in EXAMPLES:
        with torch.no_grad():
            logits = model(torch.tensor([example.ids])).logits[0]
        for position in range(max(1, example.response_start), len(example.ids)):
            row = logits[position - 1]
            total -= float(row[example.ids[position]] - torch.logsumexp(row, 0))
            count += 1
    return total, count


def test_validation_loss_is_the_token_mean(policy: Path, tmp_path: Path, reference: tuple[float, int]) -> None:
    trainer = _trainer(policy, tmp_path)
    total, count = reference
    assert count == 3 + 2 + 8 + 3
    assert validation_loss(trainer) == pytest.approx(total / count, rel=1e-6)
    assert validation_loss(trainer) == pytest.approx(total / count, rel=1e-6)


def test_validation_loss_does_not_depend_on_batching(policy: Path, tmp_path: Path) -> None:
    losses = []
    for size in (1, 3, 4):
        trainer = _trainer(policy, tmp_path, per_device_eval_batch_size=size)
        losses.append(validation_loss(trainer))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_step_loss_divides_by_all_tokens_of_the_step(
    policy: Path, tmp_path: Path, reference: tuple[float, int], accumulation: int
) -> None:
    settings = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = _trainer(policy, tmp_path, max_steps=1, logging_steps=1, eval_strategy="no", **settings)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses == pytest.approx([reference[0] / reference[1]], rel=1e-5)


def test_packing_changes_rows_but_not_the_loss(policy: Path, tmp_path: Path, reference: tuple[float, int]) -> None:
    trainer = _trainer(policy, tmp_path, packing=True, max_length=14, per_device_train_batch_size=4)
    assert sorted(map(sum, trainer.train_dataset["seq_lengths"])) == [10, 13]
    (inputs,) = trainer.get_train_dataloader()
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(1))
    assert float(loss) == pytest.approx(reference[0], rel=1e-6)
    assert int((inputs["labels"] != -100).sum()) == 16


def test_evaluations_during_training_are_the_token_mean_of_their_weights(policy: Path, tmp_path: Path) -> None:
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "learning_rate": 0.01,
        "train_sampling_strategy": "group_by_length",
    }
    trainer = _trainer(policy, tmp_path, max_steps=2, **settings)
    trainer.train()
    logged = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(logged) == 2
    assert logged[1] < logged[0]
    assert validation_loss(trainer) == logged[1]
    trainer.state.log_history.clear()
    assert validation_loss(trainer) == pytest.approx(logged[1], rel=1e-6)
