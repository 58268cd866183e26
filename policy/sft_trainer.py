"""trl's SFTTrainer with figures that do not depend on how examples fall into batches and on ranks."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler
from trl.trainer.sft_trainer import SFTTrainer

from pipeline.counts import count_tokens
from pipeline.equal_batches import Batch, equal_batches
from reward_model.data import training_order

MEANS = ("entropy", "mean_token_accuracy")
"""trl's figures that are means over supervised tokens."""
Mode = Literal["train", "eval"]


class TokenMeanTrainer(SFTTrainer):
    """SFTTrainer whose `eval_loss` is -sum log p / n over all n supervised held-out tokens, in
    nats; `entropy` and `mean_token_accuracy` are such means too.

    The library's are means of batch means: with batches of similar length the loss is too low,
    because short batches, whose EOS is easy to predict, weigh as much as long ones.
    """

    _eval_sum = 0.0
    _eval_tokens = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._supervised: dict[Mode, list[int]] = {"train": [], "eval": []}

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of which every rank has equally many; each row counts once."""
        rows: Any = self.train_dataset
        order = training_order(self.args, [len(ids) for ids in rows["input_ids"]])
        return equal_batches(self, rows, order, self._train_batch_size, uncounted=without_labels)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The same of the held-out rows, in their order."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        return equal_batches(
            self, rows, SequentialSampler(rows), self.args.eval_batch_size, held_out=True, uncounted=without_labels
        )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The library's loss; counts what an evaluation adds up."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        tokens = (inputs["labels"][:, 1:] >= 0).sum()
        if not model.training:
            loss = result[0] if return_outputs else result
            self._eval_sum += float(loss) * int(tokens)
            self._eval_tokens += int(tokens)
        self._supervised["train" if model.training else "eval"].append(int(self._over_ranks(tokens)))
        return result

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Counts prompts and responses without padding; packed rows, which come without a mask, have none."""
        mask: Tensor = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(inputs["input_ids"])
        count_tokens(self, mask.sum() * (inputs["labels"] >= 0).any())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The library's log with means over tokens, and the tokens of all of the run."""
        if "eval_loss" in logs:
            totals = torch.tensor([self._eval_sum, self._eval_tokens], dtype=torch.float64, device=self.args.device)
            total, tokens = self._over_ranks(totals).tolist()
            logs["eval_loss"] = total / tokens
            self._eval_sum, self._eval_tokens = 0.0, 0
        mode: Mode = "eval" if "eval_loss" in logs else "train"
        kept, weights = self._metrics[mode], self._supervised[mode]
        for name in MEANS:
            if kept[name]:
                total = sum(value * weight for value, weight in zip(kept[name], weights, strict=True))
                kept[name] = [total / sum(weights)]
            else:
                del kept[name]
        if "num_tokens" in kept:
            kept["num_tokens"] = [self.state.num_input_tokens_seen]
        self._supervised[mode] = []
        super().log(logs, start_time)

    def _over_ranks(self, tensor: Tensor) -> Tensor:
        return cast(Tensor, self.accelerator.reduce(tensor, "sum"))


def without_labels(batch: Batch) -> Batch:
    """The batch with no token that carries loss: labels of -100, as torch's cross entropy leaves them out."""
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}
