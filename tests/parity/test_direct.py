"""The first step's loss and gradient of each direct method are those of trl's trainer on one batch of real text."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.recipe import Recipe
from policy.answers import Group
from policy.objectives import Objective, Sizes, Step, make_objective
from policy.preference_data import Row, RowCollator, reference_sums, with_reference

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytestmark = pytest.mark.parity
BASE = Path(__file__).parents[2] / "assets" / "demo-base"
TEXTS = [
    ("the film is", " a quiet and moving story about two brothers.", " bad."),
    ("i really wanted to like", " it, and i did.", " this one, but the plot makes no sense at all."),
    ("the actors", " are very good, and so is the music", " try hard"),
    ("it is", " one of the best comedies of the year!", " a long, dull, empty film."),
]
BETA = 0.3
LossAndGradients = tuple[float, list[Tensor]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE)


def random_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **shape)
    return LlamaForCausalLM(config)


def common(tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": len(TEXTS),
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "beta": BETA,
    }


def pairs_data() -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in TEXTS])


def labels_data() -> Any:
    from datasets import Dataset

    rows = [{"prompt": p, "completion": c, "label": True} for p, c, _ in TEXTS[:2]]
    return Dataset.from_list(rows + [{"prompt": p, "completion": r, "label": False} for p, _, r in TEXTS[2:]])


def peer_step(trainer: Any) -> tuple[dict[str, Tensor], LossAndGradients]:
    """trl's batch, and its loss and gradients."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    kept = {name: value.clone() for name, value in batch.items() if isinstance(value, Tensor)}
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return kept, (loss.item(), [p.grad for p in trainer.model.parameters()])


def split(ids: Tensor, mask: Tensor, answer: Tensor) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of every row of a right-padded batch."""
    return [(i[m & ~a].tolist(), i[m & a].tolist()) for i, m, a in zip(ids, mask.bool(), answer.bool(), strict=True)]


def pair_rows_of(batch: dict[str, Tensor]) -> list[Row]:
    if "chosen_labels" in batch:
        sides = [
            split(batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], batch[f"{side}_labels"] != -100)
            for side in ("chosen", "rejected")
        ]
    else:
        rows = split(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
        sides = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    assert all(one[0] == two[0] for one, two in zip(*sides, strict=True))
    return [Row(Group(c[0], [c[1], r[1]]), ((0, 1),)) for c, r in zip(*sides, strict=True)]


def our_step(objective: Objective, model: PreTrainedModel, rows: list[Row], *, shared: bool) -> LossAndGradients:
    inputs = RowCollator(0, shared)(rows)
    rows_of_step, tokens = objective.sizes(inputs)
    objective.begin_step(model, [inputs], Step(0, lambda tensor: tensor))
    loss, _ = objective.loss(model, inputs, Sizes(rows_of_step, tokens))
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters() if p.grad is not None]


def check(theirs: LossAndGradients, ours: LossAndGradients) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert len(ours[1]) == len(theirs[1])
    for one, two in zip(ours[1], theirs[1], strict=True):
        assert (one - two).norm() <= 1e-5 * two.norm() + 1e-9


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({"name": "parity", "model": {"name_or_path": "model"}, **sections})


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("loss_type", "name", "settings"),
    [
        ("sigmoid", "dpo", {}),
        ("robust", "dpo", {"variant": "robust", "label_smoothing": 0.1}),
        ("hinge", "dpo", {"variant": "hinge"}),
        ("ipo", "ipo", {}),
    ],
)
def test_dpo_and_ipo(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    loss_type: str,
    name: str,
    settings: dict[str, Any],
    shared: bool,
) -> None:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    model, reference = random_model(tokenizer, 0), random_model(tokenizer, 1)
    own = copy.deepcopy(model)
    smoothing = {"label_smoothing": settings["label_smoothing"]} if "label_smoothing" in settings else {}
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(loss_type=[loss_type], **smoothing, **common(tmp_path)),
        train_dataset=pairs_data(),
        processing_class=tokenizer,
    )
    batch, theirs = peer_step(trainer)
    rows = pair_rows_of(batch)
    rows = with_reference(rows, reference_sums(rows, reference, 0, shared=shared, autocast=torch.no_grad))
    objective = make_objective(name, recipe(**{name: {"beta": BETA, **settings}}), shared=shared, labels=(0, 0))
    check(theirs, our_step(objective, own, rows, shared=shared))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.5)])
def test_kto(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, weights: tuple[float, float]) -> None:
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    model, reference = random_model(tokenizer, 2), random_model(tokenizer, 3)
    own = copy.deepcopy(model)
    desirable, undesirable = weights
    trainer = KTOTrainer(
        model=model,
        ref_model=reference,
        args=KTOConfig(desirable_weight=desirable, undesirable_weight=undesirable, **common(tmp_path)),
        train_dataset=labels_data(),
        processing_class=tokenizer,
    )
    batch, theirs = peer_step(trainer)
    own_rows = split(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    others = split(batch["KL_input_ids"], batch["KL_attention_mask"], batch["KL_completion_mask"])
    rows = [
        Row(Group(prompt, [answer]), desirable=bool(label), other=Group(other[0], [other[1]]))
        for (prompt, answer), other, label in zip(own_rows, others, batch["label"].tolist(), strict=True)
    ]
    rows = with_reference(rows, reference_sums(rows, reference, 0, shared=False, autocast=torch.no_grad))
    section = {"beta": BETA, "desirable_weight": desirable, "undesirable_weight": undesirable}
    objective = make_objective("kto", recipe(kto=section), shared=False, labels=(2, 2))
    check(theirs, our_step(objective, own, rows, shared=False))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, smoothing: float, shared: bool) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    model = random_model(tokenizer, 4)
    own = copy.deepcopy(model)
    arguments = CPOConfig(
        loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.15, label_smoothing=smoothing, **common(tmp_path)
    )
    trainer = CPOTrainer(model=model, args=arguments, train_dataset=pairs_data(), processing_class=tokenizer)
    batch, theirs = peer_step(trainer)
    section = {"beta": BETA, "gamma": 0.15, "label_smoothing": smoothing}
    objective = make_objective("simpo", recipe(simpo=section), shared=shared, labels=(0, 0))
    check(theirs, our_step(objective, own, pair_rows_of(batch), shared=shared))


@pytest.mark.parametrize("shared", [False, True])
def test_orpo(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, shared: bool) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model = random_model(tokenizer, 5)
    own = copy.deepcopy(model)
    arguments = ORPOConfig(**common(tmp_path))
    trainer = ORPOTrainer(model=model, args=arguments, train_dataset=pairs_data(), processing_class=tokenizer)
    batch, theirs = peer_step(trainer)
    objective = make_objective("orpo", recipe(orpo={"beta": BETA}), shared=shared, labels=(0, 0))
    check(theirs, our_step(objective, own, pair_rows_of(batch), shared=shared))
