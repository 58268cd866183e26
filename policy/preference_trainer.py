"""The trainer of the direct methods: transformers' Trainer with losses whose denominators are the whole step's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from pipeline.counts import count_tokens
from pipeline.equal_batches import counts, equal_batches
from pipeline.sharding import through
from policy.objectives import Objective, Sizes, Step
from reward_model.data import training_order

Mode = Literal["train", "eval"]


class PreferenceTrainer(Trainer):
    """transformers.Trainer that minimises an `Objective`.

    The loss of an optimiser step is what the objective gives for the whole step, whatever its micro-batches and
    processes: each micro-batch adds its sum divided by the rows (and tokens) of the step. Logged metrics are exact
    means over rows, under trl's names.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *, objective: Objective, in_order: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.objective = objective
        self.in_order = in_order
        self._totals: dict[Mode, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self._held_out: Sizes | None = None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of which every rank has equally many; each row counts once."""
        rows: Any = self.train_dataset
        lengths = [row.tokens for row in rows]
        order = SequentialSampler(rows) if self.in_order else training_order(self.args, lengths)
        return equal_batches(self, rows, order, self._train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The same of the held-out rows, in their order."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        return equal_batches(self, rows, SequentialSampler(rows), self.args.eval_batch_size, held_out=True)

    def compute_loss_context_manager(self) -> ExitStack:
        """The library's with autocast, which accelerate puts around the model's own forward only."""
        stack = super().compute_loss_context_manager()
        stack.enter_context(self.accelerator.autocast())
        return stack

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of one optimiser step, and its rows and supervised tokens over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        moved = [self._prepare_inputs(batch) for batch in batches]
        sizes = [self._sizes(batch) for batch in moved]
        total: Any = self.accelerator.reduce(torch.tensor(sizes, device=device).sum(0), "sum")
        with self.compute_loss_context_manager():
            self.objective.begin_step(self._plain(self.model), moved, Step(self.state.global_step, self._sum))
        return moved, total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The micro-batch's share of the step's loss, times the number of processes, whose gradients are averaged.

        0 for rows that do not count.
        """
        rows, tokens = self._sizes(inputs)
        sizes = self._held_out or Sizes(float(max(rows, 1)), float(max(tokens, 1)))
        if num_items_in_batch is not None:
            sizes = self._per_process(num_items_in_batch)
        plain = self._plain(model)
        loss, metrics = through(model, plain, lambda: self.objective.loss(plain, inputs, sizes))
        counted = counts(inputs)
        if not counted:
            loss = loss * 0.0
        mode: Mode = "train" if model.training else "eval"
        self._count(mode, "loss", loss.detach() * sizes.rows, rows)
        for name, values in metrics.items():
            counting = values if counted else values[:0]
            self._count(mode, name, counting.double().sum(), len(counting))
        return (loss, metrics) if return_outputs else loss

    def _sizes(self, inputs: dict[str, Tensor]) -> tuple[int, int]:
        return self.objective.sizes(inputs) if counts(inputs) else (0, 0)

    def _track_num_input_tokens(self, inputs: dict[str, Tensor]) -> None:
        """Counts the tokens that get a gradient through the model, padding left out.

        A prompt counts once for each row that it stands in: once for all its answers where they share a row. Forwards
        without a gradient do not count: KTO's answers to other prompts, IFT's first pass, the reference's sums.
        """
        count_tokens(self, (inputs["segments"] >= 0).sum() * counts(inputs))

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of one held-out batch; its metrics are counted on the way."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The library's loop with loss and metrics as exact means over all held-out rows."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        dataloader = kwargs["dataloader"] if "dataloader" in kwargs else args[0]
        sizes = torch.tensor([self._sizes(batch) for batch in dataloader], device=self.args.device)
        self._totals["eval"], self._held_out = {}, self._per_process(self._sum(sizes.sum(0)))
        with self.compute_loss_context_manager():
            step = Step(self.state.global_step, self._sum)
            self.objective.begin_step(self._plain(self.model), map(self._prepare_inputs, dataloader), step)
        output = super().evaluation_loop(*args, **kwargs)
        self._held_out = None
        exact = {f"{prefix}_{key}": value for key, value in self._take_means("eval").items()}
        return output._replace(metrics={**(output.metrics or {}), **exact})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the training means since the last call to `loss`."""
        if "loss" in logs:
            logs |= {key: value for key, value in self._take_means("train").items() if key != "loss"}
        super().log(logs, start_time)

    def _count(self, mode: Mode, name: str, total: Tensor, rows: int) -> None:
        entry = torch.stack([total.double(), torch.tensor(rows, dtype=torch.float64, device=total.device)])
        self._totals[mode][name] = self._totals[mode][name] + entry if name in self._totals[mode] else entry

    def _take_means(self, mode: Mode) -> dict[str, float]:
        totals, self._totals[mode] = self._totals[mode], {}
        if not totals:
            return {}
        summed = self._sum(torch.stack(list(totals.values()))).tolist()
        return {name: total / rows for name, (total, rows) in zip(totals, summed, strict=True) if rows}

    def _per_process(self, sizes: Tensor) -> Sizes:
        share = sizes / self.accelerator.num_processes
        return Sizes(rows=share[0], tokens=share[1])

    def _sum(self, tensor: Tensor) -> Tensor:
        summed: Any = self.accelerator.reduce(tensor, "sum")
        return summed

    def _plain(self, model: Any) -> Any:
        return self.accelerator.unwrap_model(model)
