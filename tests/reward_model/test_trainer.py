"""The trainer: exact denominators, a planted rule is learnt, a resumed run equals an uninterrupted one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from pipeline.tokens import EncodedRanking
from reward_model.data import RankingCollator, ranking_dataset
from reward_model.report import score_rankings
from reward_model.train import fresh_head
from reward_model.trainer import Objective, RankingTrainer
from tests.reward_model.tiny import EOS, PAD, random_rankings, reward_model


def make(
    out: Path,
    rankings: list[EncodedRanking],
    objective: Objective = Objective(),  # noqa: B008
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> RankingTrainer:
    """A trainer over a random tiny model; every model has the same weights."""
    defaults: dict[str, Any] = {
        "max_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
    }
    arguments = TrainingArguments(
        output_dir=str(out),
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{**defaults, **settings},
    )
    trainer = RankingTrainer(
        objective=objective,
        model=reward_model(seed=1),
        args=arguments,
        data_collator=RankingCollator(PAD, with_ratings=objective.margin > 0),
        train_dataset=ranking_dataset(rankings),
        eval_dataset=ranking_dataset(rankings),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class KeepGradients(TrainerCallback):
    """Copies the gradients of every optimiser step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})


def by_definition(model: Any, rankings: list[EncodedRanking], centering: float = 0.0) -> Tensor:
    """Mean over prompts of the mean over ordered pairs, one forward per answer, in plain loops."""
    prompts = []
    for ranking in rankings:
        scores = []
        for answer in ranking.response_ids:
            ids = torch.tensor([[*ranking.prompt_ids, *answer]])
            scores.append(model.score(model.model(input_ids=ids).last_hidden_state[0, -1])[0])
        pairs = []
        for i, better in enumerate(ranking.ranks):
            for j, worse in enumerate(ranking.ranks):
                if better < worse:
                    loss = torch.log1p(torch.exp(-(scores[i] - scores[j])))
                    pairs.append(loss + centering * (scores[i] + scores[j]) ** 2)
        prompts.append(sum(pairs, torch.zeros(())) / len(pairs))
    return sum(prompts, torch.zeros(())) / len(prompts)


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4), (3, 3)])
def test_a_step_is_the_mean_over_its_prompts_however_it_is_cut(tmp_path: Path, batch: int, accumulation: int) -> None:
    """Eight prompts of two to four answers; 3 x 3 makes uneven micro-batches (3, 3, 2)."""
    rankings = random_rankings(8, seed=0)
    keep = KeepGradients()
    trainer = make(
        tmp_path,
        rankings,
        Objective(centering=0.1),
        [keep],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        max_steps=-1,
    )
    trainer.train()
    model = reward_model(seed=1)
    expected = by_definition(model, rankings, centering=0.1)
    expected.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert len(keep.steps) == 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(keep.steps[0][name], parameter.grad, atol=2e-6, rtol=1e-4)


def test_margins_are_weighted_rating_differences(tmp_path: Path) -> None:
    ranking = EncodedRanking([1, 5], [[6, EOS], [7, EOS]], (1.0, 0.0), (0.5, 3.0))
    trainer = make(tmp_path, [ranking], Objective(margin=2.0))
    trainer.train()
    worse, better = score_rankings(reward_model(seed=1), [ranking])[0]
    # margin 2 * (3 - 0.5) = 5
    expected = math.log1p(math.exp(-(better - worse - 5.0)))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_plackett_luce_is_the_likelihood_of_the_ranking(tmp_path: Path) -> None:
    ranking = random_rankings(1, seed=2, sizes=(3,))[0]
    trainer = make(tmp_path, [ranking], Objective(loss="plackett_luce"))
    trainer.train()
    scores = score_rankings(reward_model(seed=1), [ranking])[0]
    first, second, third = (scores[ranking.ranks.index(rank)] for rank in (0.0, 1.0, 2.0))
    expected = math.log(sum(math.exp(s) for s in (first, second, third))) - first
    expected += math.log(math.exp(second) + math.exp(third)) - second
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_logged_means_are_exact_over_pairs_and_answers(tmp_path: Path) -> None:
    """Uneven evaluation batches (3, 3, 2): the last counts by its size."""
    rankings = random_rankings(8, seed=4)
    trainer = make(tmp_path, rankings, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    model = reward_model(seed=1)
    scores = score_rankings(model, rankings)
    margins = [
        values[i] - values[j]
        for ranking, values in zip(rankings, scores, strict=True)
        for i, better in enumerate(ranking.ranks)
        for j, worse in enumerate(ranking.ranks)
        if better < worse
    ]
    flat = [score for values in scores for score in values]
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(float(by_definition(model, rankings)), rel=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / len(margins))
    assert metrics["eval_margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-4)
    assert metrics["eval_mean_reward"] == pytest.approx(sum(flat) / len(flat), rel=1e-4)
    assert trainer.state.log_history[-1]["eval_accuracy"] == metrics["eval_accuracy"]


def test_training_logs_cover_the_steps_since_the_last_log(tmp_path: Path) -> None:
    rankings = random_rankings(4, seed=6)
    trainer = make(tmp_path, rankings, per_device_train_batch_size=2, max_steps=2, logging_steps=2, learning_rate=0.0)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["step"] == 2
    metrics = make(tmp_path, rankings).evaluate()
    for key in ("accuracy", "margin", "mean_reward"):
        assert logged[key] == pytest.approx(metrics[f"eval_{key}"], rel=1e-5)
    assert {"loss", "grad_norm", "learning_rate"} <= logged.keys()


def planted(count: int, seed: int) -> list[EncodedRanking]:
    """Answers are better the more often token 20 ("good") stands in them; everything else is noise."""
    generator = torch.Generator().manual_seed(seed)
    rankings = []
    for _ in range(count):
        answers = []
        for goods in (0, 1, 2):
            noise = torch.randint(3, 20, (6,), generator=generator).tolist()
            places = torch.randperm(6, generator=generator)[:goods].tolist()
            answers.append([20 if i in places else token for i, token in enumerate(noise)] + [EOS])
        order = torch.randperm(3, generator=generator).tolist()
        ranks = tuple(float(2 - goods) for goods in order)
        rankings.append(EncodedRanking([1, 30], [answers[goods] for goods in order], ranks, None))
    return rankings


def test_a_planted_rule_is_learnt(tmp_path: Path) -> None:
    trainer = make(
        tmp_path,
        planted(192, seed=0),
        max_steps=60,
        per_device_train_batch_size=16,
        max_grad_norm=1.0,
        train_sampling_strategy="group_by_length",
    )
    held_out: Any = ranking_dataset(planted(64, seed=1))
    before = trainer.evaluate(held_out)["eval_accuracy"]
    trainer.train()
    assert before < 0.7
    assert trainer.evaluate(held_out)["eval_accuracy"] > 0.9


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """Stopped in the second epoch, in the middle of a shuffled, length-grouped order."""
    settings: dict[str, Any] = {
        "max_steps": 7,
        "per_device_train_batch_size": 3,
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "steps",
        "save_steps": 5,
    }
    rankings = random_rankings(10, seed=8)
    whole = make(tmp_path / "whole", rankings, **settings)
    whole.train()
    resumed = make(tmp_path / "resumed", rankings, **settings)
    torch.manual_seed(123)  # another state of the global generator than at the first start
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert whole.model is not None
    assert resumed.model is not None
    expected = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=0)
    assert resumed.state.global_step == 7


def test_fresh_head_is_drawn_with_the_published_deviation_and_the_seed() -> None:
    model = reward_model()
    wide = torch.nn.Linear(4095, 1, bias=False)
    model.score = wide
    fresh_head(model, seed=5)
    first = wide.weight.detach().clone()
    # 1 / sqrt(4095 + 1) = 1/64; the deviation of 4,095 draws is within 5% of it
    assert float(first.std()) == pytest.approx(1 / 64, rel=0.05)
    assert abs(float(first.mean())) < 3 / 64 / math.sqrt(4095)
    fresh_head(model, seed=5)
    torch.testing.assert_close(wide.weight, first, rtol=0, atol=0)
    fresh_head(model, seed=6)
    assert not torch.equal(wide.weight, first)
