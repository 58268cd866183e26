"""trl's SFTTrainer with a held-out loss that does not depend on how examples fall into batches."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from trl.trainer.sft_trainer import SFTTrainer

from pipeline.counts import count_tokens


class TokenMeanTrainer(SFTTrainer):
    """SFTTrainer whose `eval_loss` is -sum log p / n over all n supervised held-out tokens, in
    nats.

    The library's is a mean of batch means: with batches of similar length it is too low, because
    short batches, whose EOS is easy to predict, weigh as much as long ones.
    """

    _eval_sum = 0.0
    _eval_tokens = 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The library's loss; counts what an evaluation adds up."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            loss = result[0] if return_outputs else result
            tokens = int((inputs["labels"][:, 1:] >= 0).sum())
            self._eval_sum += float(loss) * tokens
            self._eval_tokens += tokens
        return result

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Counts prompts and responses without padding; packed rows, which come without a mask, have none."""
        mask: Tensor = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(inputs["input_ids"])
        count_tokens(self, mask.sum())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The library's log with `eval_loss` replaced by the token mean."""
        if "eval_loss" in logs:
            totals = torch.tensor([self._eval_sum, self._eval_tokens], dtype=torch.float64, device=self.args.device)
            total, tokens = cast(torch.Tensor, self.accelerator.reduce(totals)).tolist()
            logs["eval_loss"] = total / tokens
            self._eval_sum, self._eval_tokens = 0.0, 0
        super().log(logs, start_time)
