"""Contrast fine-tuning: the text shows the worse answer, the loss is on the better one alone.

Neither a reference nor a probability of the worse answer enters; there is no paper. Its closest
published relative marks answers with control tokens (ContextualAI/HALOs `csft`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from policy.tensors import at_least_float32, masked_reduce

BETTER = "{chosen}"


def contrast_sft_loss(
    logprobs: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    denominator: float | Tensor | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The contrast loss, a scalar, and the metric `logps` [B], the summed log-probabilities.

    Sum of -logprobs over the mask / `denominator`: the tokens of the whole step; None: those of
    this batch. `mask` [B,T] is True on the tokens of the better answer and its EOS. Pitfalls: tokenise
    prompt and answer apart, since a prompt that ends in a space merges with the answer; trained
    with the worse answer in every row, the model only learns to mend an answer that it is shown.
    """
    logprobs = torch.where(mask, at_least_float32(logprobs), 0.0)
    return masked_reduce(-logprobs, mask, "token_mean", denominator), {"logps": logprobs.detach().sum(-1)}


def _check(name: str, text: str, slots: Sequence[str]) -> None:
    for slot in slots:
        if f"{{{slot}}}" not in text:
            raise ValueError(f"the {name} template lacks the slot {{{slot}}}: {text!r}")
    try:
        text.format(**dict.fromkeys(slots, ""))
    except (KeyError, IndexError) as error:
        raise ValueError(f"the {name} template has an unknown slot ({error}); it may use {', '.join(slots)}") from error
    if text.index(BETTER) != len(text) - len(BETTER):
        raise ValueError(f"the {name} template must end in its only {BETTER}, where the loss begins: {text!r}")


@dataclass(frozen=True)
class ContrastTemplate:
    """Two texts with slots: `training` shows {rejected}, `inference` does not.

    Both hold {instruction} and {prompt} and end in {chosen}; a literal brace is doubled. Raises
    ValueError, naming the slot, when one is missing or unknown.
    """

    training: str
    inference: str

    def __post_init__(self) -> None:
        _check("training", self.training, ("instruction", "prompt", "rejected", "chosen"))
        _check("inference", self.inference, ("instruction", "prompt", "chosen"))

    def training_prompt(self, instruction: str, prompt: str, rejected: str) -> str:
        """Everything before the better answer, with the worse one in it: no loss on this."""
        template = self.training.removesuffix(BETTER)
        return template.format(instruction=instruction, prompt=prompt, rejected=rejected)

    def inference_prompt(self, instruction: str, prompt: str) -> str:
        """Everything before the answer, without a worse one."""
        return self.inference.removesuffix(BETTER).format(instruction=instruction, prompt=prompt)


TEMPLATES = {
    "english": ContrastTemplate(
        "Instruction: {instruction}\nQuestion: {prompt}\nWorse answer: {rejected}\nBetter answer: {chosen}",
        "Instruction: {instruction}\nQuestion: {prompt}\nBetter answer: {chosen}",
    ),
    "chinese": ContrastTemplate(
        "指令: {instruction}\n问题: {prompt}\n消极回答: {rejected}\n积极回答: {chosen}",
        "指令: {instruction}\n问题: {prompt}\n积极回答: {chosen}",
    ),
}
