"""A step of a direct method is the same however it is split into micro-batches, and its means are exact."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from pipeline.recipe import Recipe
from policy.answers import Group
from policy.models import disable_dropout, load_policy
from policy.objectives import make_objective
from policy.preference_data import Row, RowCollator, Rows
from policy.preference_trainer import PreferenceTrainer

ANSWERS = [[7, 8, 2], [9, 2], [10, 11, 12, 13], [14, 2], [15, 16, 17, 2], [18, 19, 2]]
PROMPTS = [[1, 5, 6], [1, 20], [1, 21, 22, 23], [1, 24], [1, 25, 26], [1, 27]]
METHODS = ["dpo", "ipo", "simpo", "orpo", "kto", "ift", "contrast"]


def rows_of(name: str) -> list[Row]:
    """Six rows of unequal length; pair methods have one to three pairs per row."""
    rows = []
    for k, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        others = [ANSWERS[(k + i) % 6] for i in (1, 2)]
        group = Group(prompt, [answer])
        if name in ("dpo", "ipo", "simpo", "orpo"):
            pairs = tuple(itertools.combinations(range(3), 2))[: 1 + k % 3]
            reference = (-3.0 - k, -4.0, -5.0 + k) if name in ("dpo", "ipo") else ()
            rows.append(Row(Group(prompt, [answer, *others]), pairs, reference=reference))
        elif name == "kto":
            other = Group(prompt, [others[0]])
            rows.append(Row(group, desirable=k % 3 == 0, other=other, reference=(-6.0 - k, -80.0 - 2 * k)))
        else:
            rows.append(Row(group))
    return rows


class Keep(TrainerCallback):
    """Copies the gradient of the first optimiser step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients = [p.grad.clone() for p in kwargs["model"].parameters() if p.grad is not None]


def first_step(
    place: Path, policy: Path, name: str, split: tuple[int, int], *, shared: bool = True
) -> tuple[list[torch.Tensor], dict[str, float], dict[str, float]]:
    """Gradients, logged metrics and held-out metrics before and after one step."""
    recipe = Recipe.model_validate(
        {"name": "t", "model": {"name_or_path": "m"}, "simpo": {"sft_weight": 0.2}, "ift": {"residual_noise": 0.5}}
    )
    rows, keep, model = rows_of(name), Keep(), load_policy(policy, "float32")
    disable_dropout(model)
    shared = shared and len(rows[0].group.answer_ids) > 1
    arguments = TrainingArguments(
        output_dir=str(place),
        report_to=[],
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=split[0],
        gradient_accumulation_steps=split[1],
        per_device_eval_batch_size=split[0],
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
    )
    objective, fresh = (make_objective(name, recipe, shared=shared, labels=(2, 4)) for _ in range(2))
    trainer = PreferenceTrainer(
        objective=objective,
        model=model,
        args=arguments,
        data_collator=RowCollator(0, shared),
        train_dataset=Rows(rows),
        eval_dataset=Rows(rows),
        callbacks=[keep],
    )
    trainer.remove_callback(PrinterCallback)
    held_out = trainer.evaluate()
    trainer.objective = fresh  # which knows nothing of the evaluation
    trainer.train()
    logged = next(row for row in trainer.state.log_history if "loss" in row and "eval_loss" not in row)
    return keep.gradients, logged, held_out


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_change_nothing(tmp_path: Path, policy_dir: Path, name: str) -> None:
    gradients, logged, held_out = first_step(tmp_path, policy_dir, name, (6, 1))
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients)
    assert held_out["eval_loss"] == pytest.approx(logged["loss"], rel=1e-5)
    for split in ((2, 3), (1, 6)):
        got, log, evaluated = first_step(tmp_path, policy_dir, name, split, shared=split == (2, 3))
        for one, two in zip(got, gradients, strict=True):
            assert (one - two).norm() <= 1e-5 * two.norm() + 1e-8
        assert log == pytest.approx(logged, rel=1e-4, abs=1e-5)
        numbers = {k: v for k, v in held_out.items() if not k.endswith(("time", "second"))}
        assert {k: evaluated[k] for k in numbers} == pytest.approx(numbers, rel=1e-5)


def test_logged_metrics_are_trls(tmp_path: Path, policy_dir: Path) -> None:
    _, logged, _ = first_step(tmp_path, policy_dir, "dpo", (6, 1))
    names = {f"{kind}/{side}" for kind in ("rewards", "logps", "tokens") for side in ("chosen", "rejected")}
    assert names | {"rewards/margins", "rewards/accuracies", "loss"} <= logged.keys()
    pairs = [(row.group.answer_ids[a], row.group.answer_ids[b]) for row in rows_of("dpo") for a, b in row.pairs]
    assert logged["tokens/chosen"] == pytest.approx(sum(len(a) for a, _ in pairs) / len(pairs))
    assert logged["tokens/rejected"] == pytest.approx(sum(len(b) for _, b in pairs) / len(pairs))
