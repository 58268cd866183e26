"""A reward model trained, stopped, resumed and saved by two ranks is the one that one rank makes."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from transformers import PrinterCallback, TrainingArguments

from pipeline.adapters import add_adapter, merged_weights
from pipeline.ranks import Ranks
from pipeline.recipe import LoraSection, Recipe
from pipeline.sharding import whole
from pipeline.trainer_ranks import gathered, is_sharded_run, place, precision
from reward_model.data import RankingCollator, ranking_dataset
from reward_model.report import score_rankings
from reward_model.score import backbone_and_head
from reward_model.trainer import Objective, RankingTrainer
from tests.reward_model.tiny import PAD, random_rankings, reward_model

RECIPE = Recipe.model_validate({"name": "t", "model": {"name_or_path": "m"}})
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
RANKINGS = random_rankings(9, seed=3)
HELD_OUT = random_rankings(5, seed=4)
TIMED = ("runtime", "per_second", "preparation_time", "total_flos")


def model_on(device: torch.device, lora: bool) -> Any:
    model: Any = reward_model(seed=1)
    if lora:
        add_adapter(model, "reward", LoraSection(rank=2, alpha=8.0), seed=0)
        backbone_and_head(model)[1].requires_grad_(True)
    return model.to(device)


def make(out: Path, ranks: Ranks, *, lora: bool = False) -> RankingTrainer:
    """Two epochs of nine rankings in steps of four: in each epoch's last step one of two ranks has no row."""
    stage: Any = SimpleNamespace(ranks=ranks, recipe=RECIPE, name="rm")
    sharded = is_sharded_run(stage)
    exact: dict[str, Any] = {**precision("float32", sharded=sharded)}
    arguments = TrainingArguments(
        output_dir=str(out),
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        num_train_epochs=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=4 // ranks.world,
        per_device_eval_batch_size=4 // ranks.world,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=2,
        **exact,
    )
    trainer = RankingTrainer(
        objective=Objective(centering=0.1),
        model=place(stage, lambda device: model_on(device, lora), sharded=sharded),
        args=arguments,
        data_collator=RankingCollator(PAD),
        train_dataset=ranking_dataset(RANKINGS),
        eval_dataset=ranking_dataset(HELD_OUT),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def weights_of(trainer: RankingTrainer) -> dict[str, torch.Tensor]:
    assert trainer.model is not None
    return {name: tensor.detach().clone() for name, tensor in whole(trainer.model.state_dict().items())}


def run_all(out: Path, ranks: Ranks) -> dict[str, Any]:
    trainer = make(out / "full", ranks)
    trainer.train()
    resumed = make(out / "resumed", ranks)
    resumed.train(resume_from_checkpoint=str(out / "full" / "checkpoint-4"))
    adapted = make(out / "lora", ranks, lora=True)
    adapted.train()
    assert trainer.model is not None
    assert adapted.model is not None
    plain = reward_model(seed=1)
    saved = gathered(trainer.model, ranks)
    if saved is None or ranks.is_main:
        plain.load_state_dict(trainer.model.state_dict() if saved is None else saved)
    if ranks.world > 1:
        for parameter in plain.parameters():
            dist.broadcast(parameter.data, src=0)
    return {
        "weights": weights_of(trainer),
        "resumed": weights_of(resumed),
        "merged": {n: t.detach().clone() for n, t in whole(merged_weights(adapted.model, "reward"))},
        "rows": [{k: v for k, v in r.items() if not k.endswith(TIMED)} for r in trainer.state.log_history],
        "tokens": trainer.state.num_input_tokens_seen,
        "scores": [score for scores in score_rankings(plain, HELD_OUT, ranks) for score in scores],
    }


def as_rank(rank: int, out: Path, environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update(environment | {name: str(number) for name, number in numbers.items()})
    dist.init_process_group("gloo", init_method=f"file://{out / 'store'}", rank=rank, world_size=2)
    torch.save(run_all(out, Ranks(rank, 2, rank, 2)), out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_all(tmp_path_factory.mktemp("one"), Ranks())


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"ACCELERATE_USE_CPU": "true"}, FSDP], ids=["whole", "sharded"])
def test_two_ranks_do_what_one_does(of_one_rank: dict[str, Any], tmp_path: Path, environment: dict[str, str]) -> None:
    processes.spawn(as_rank, (tmp_path, environment), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    for rank in (0, 1):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert got["tokens"] == of_one_rank["tokens"] > 0
        assert got["scores"] == pytest.approx(of_one_rank["scores"], abs=1e-4)
        assert len(got["rows"]) == len(of_one_rank["rows"])
        for row, expected in zip(got["rows"], of_one_rank["rows"], strict=True):
            assert row == pytest.approx(expected, rel=2e-4, abs=2e-5)
        for kind in ("weights", "merged"):
            assert got[kind].keys() == of_one_rank[kind].keys()
            for name, weight in of_one_rank[kind].items():
                torch.testing.assert_close(got[kind][name], weight, rtol=1e-5, atol=1e-5)
        for name, weight in got["weights"].items():
            torch.testing.assert_close(got["resumed"][name], weight, rtol=0, atol=0)
