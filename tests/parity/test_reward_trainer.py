"""On pairs, the first step's loss and gradient are those of trl.RewardTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from reward_model.data import RankingCollator, ranking_dataset
from reward_model.trainer import Objective, RankingTrainer
from tests.reward_model.tiny import PAD, random_rankings, reward_model

pytestmark = pytest.mark.parity


class KeepGradients(TrainerCallback):
    """Copies the gradient of the first optimiser step."""

    def __init__(self) -> None:
        self.gradient: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.gradient = {n: p.grad.clone() for n, p in named if p.grad is not None}


def words_tokenizer() -> PreTrainedTokenizerFast:
    """Forty one-word tokens; the trainers get ids and read only the special ones."""
    from tokenizers import Tokenizer, models

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 40)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w3")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


@pytest.mark.parametrize(("margin", "centering"), [(0.0, 0.0), (0.5, 0.01)])
def test_first_step_on_pairs_equals_trl(tmp_path: Path, margin: float, centering: float) -> None:
    from datasets import Dataset
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    rankings = random_rankings(6, seed=11, sizes=(2,))
    arguments = RewardConfig(
        output_dir=str(tmp_path),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=1,
        per_device_train_batch_size=6,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        center_rewards_coefficient=centering or None,
        train_sampling_strategy="sequential",
    )
    rows: list[dict[str, Any]] = []
    for ranking in rankings:
        chosen, rejected = sorted((0, 1), key=lambda k: ranking.ranks[k])
        ids = [[*ranking.prompt_ids, *answer] for answer in ranking.response_ids]
        row = {"chosen_ids": ids[chosen], "rejected_ids": ids[rejected]}
        ratings = ranking.ratings or (0.0, 0.0)
        rows.append(row | ({"margin": margin * (ratings[chosen] - ratings[rejected])} if margin else {}))
    theirs, ours = KeepGradients(), KeepGradients()
    peer = RewardTrainer(
        model=reward_model(seed=2),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=words_tokenizer(),
        callbacks=[theirs],
    )
    trainer = RankingTrainer(
        objective=Objective(margin=margin, centering=centering),
        model=reward_model(seed=2),
        args=arguments,
        data_collator=RankingCollator(PAD, with_ratings=margin > 0),
        train_dataset=ranking_dataset(rankings),
        callbacks=[ours],
    )
    logged = []
    for one in (peer, trainer):
        one.remove_callback(PrinterCallback)
        one.train()
        logged.append(one.state.log_history[0])
    for key in ("loss", "accuracy", "margin", "mean_reward"):
        assert logged[1][key] == pytest.approx(logged[0][key], rel=1e-5, abs=1e-6), key
    assert theirs.gradient.keys() == ours.gradient.keys()
    assert len(theirs.gradient) > 10
    for name, gradient in theirs.gradient.items():
        torch.testing.assert_close(ours.gradient[name], gradient, atol=1e-5, rtol=1e-5)
