"""The trainer of the reward model: one batch element is one prompt with all its ranked answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from pipeline.counts import count_tokens
from pipeline.equal_batches import counts, equal_batches
from reward_model.data import training_order
from reward_model.losses import plackett_luce_loss, ranking_loss

LOSSES = {"ranking": ranking_loss, "plackett_luce": plackett_luce_loss}
TOTALS = ("loss", "prompts", "right", "pairs", "margin", "score", "answers")
"""Sums kept between two logs; `right` counts the pairs whose better answer scores strictly higher."""


@dataclass(frozen=True, slots=True)
class Objective:
    """Which loss is minimised; the fields are those of the recipe's `rm` section."""

    loss: Literal["ranking", "plackett_luce"] = "ranking"
    margin: float = 0.0
    centering: float = 0.0


class RankingTrainer(Trainer):
    """transformers.Trainer with a loss over ranked answers; one forward per answer.

    The loss of an optimiser step is the mean over its prompts, whatever its micro-batches and processes: each
    micro-batch adds its sum of prompt losses divided by the number of prompts of the whole step.
    Logs trl.RewardTrainer's `accuracy`, `margin` and `mean_reward` beside the loss.
    Source: InstructGPT (arXiv 2203.02155), section 3.5 and eq. 1.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *, objective: Objective, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.objective = objective
        self._totals = {"train": self._zeros(), "eval": self._zeros()}

    def _zeros(self) -> Tensor:
        return torch.zeros(len(TOTALS), dtype=torch.float64, device=self.args.device)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of which every rank has equally many; each row counts once."""
        rows: Any = self.train_dataset
        order = training_order(self.args, rows["length"])
        return equal_batches(self, rows, order, self._train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The same of the held-out rows, in their order."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        return equal_batches(self, rows, SequentialSampler(rows), self.args.eval_batch_size, held_out=True)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one optimiser step and the number of prompts in it, over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        prompts = torch.tensor([sum(len(batch["mask"]) for batch in batches if counts(batch))], device=device)
        gathered: Any = self.accelerator.gather(prompts)
        return batches, gathered.sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum of the prompts' losses over the prompts of the optimiser step; of the batch without `num_items_in_batch`.

        Multiplied by the number of processes, whose gradients the libraries average. 0 for rows that do not count.
        """
        mask = inputs["mask"]
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
        )
        scores = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        scores = scores.masked_scatter(mask, outputs.logits.squeeze(-1).float())
        margins = inputs["ratings"] * self.objective.margin if self.objective.margin else None
        denominator: float | Tensor = float(len(mask))
        if num_items_in_batch is not None:
            denominator = num_items_in_batch / self.accelerator.num_processes
        loss, metrics = LOSSES[self.objective.loss](
            scores,
            inputs["ranks"],
            mask,
            margins=margins,
            centering=self.objective.centering or None,
            denominator=denominator,
        )
        pairs = metrics["pairs"]
        sums = (
            loss.detach() * denominator,
            metrics["prompts"],
            metrics["accuracy"] * pairs,
            pairs,
            metrics["margin"] * pairs,
            scores.detach().sum(),
            mask.sum(),
        )
        if counts(inputs):
            self._totals["train" if model.training else "eval"] += torch.stack([value.double() for value in sums])
        else:
            loss = loss * 0.0
        return (loss, outputs) if return_outputs else loss

    def _track_num_input_tokens(self, inputs: dict[str, Tensor]) -> None:
        """Counts every answer with its prompt, one row each, without padding."""
        count_tokens(self, inputs["attention_mask"].sum() * counts(inputs))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of one held-out batch; its pairs are counted on the way."""
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The library's loop with loss, accuracy, margin and mean reward counted exactly over all held-out pairs."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        self._totals["eval"] = self._zeros()
        output = super().evaluation_loop(*args, **kwargs)
        means = self._take_means("eval")
        exact = {f"{prefix}_{key}": value for key, value in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **exact})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the training means since the last call to `loss`."""
        if "loss" in logs:
            means = self._take_means("train")
            logs |= {key: value for key, value in means.items() if key != "loss"}
        super().log(logs, start_time)

    def _take_means(self, mode: Literal["train", "eval"]) -> dict[str, float]:
        summed: Any = self.accelerator.reduce(self._totals[mode], "sum")
        self._totals[mode] = self._zeros()
        total = dict(zip(TOTALS, summed.tolist(), strict=True))
        return {
            "loss": total["loss"] / total["prompts"],
            "accuracy": total["right"] / total["pairs"],
            "margin": total["margin"] / total["pairs"],
            "mean_reward": total["score"] / total["answers"],
        }
