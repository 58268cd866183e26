from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from policy.losses import METHODS
from policy.losses.contrast_sft import TEMPLATES, ContrastTemplate, contrast_sft_loss


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual.detach().double(), tensor(expected), rtol=1e-12, atol=1e-12)


LOGPROBS = [[math.nan, -4.0, -2.0, -1.0], [math.nan, math.nan, -3.0, math.nan]]
MASK = torch.tensor([[False, True, True, True], [False, False, True, False]])


def test_the_loss_is_the_mean_over_all_tokens() -> None:
    logprobs = tensor(LOGPROBS).requires_grad_()
    loss, metrics = contrast_sft_loss(logprobs, MASK)
    close(loss, 10 / 4)
    close(metrics["logps"], [-7.0, -3.0])
    assert not metrics["logps"].requires_grad
    parts = [contrast_sft_loss(logprobs[i : i + 1], MASK[i : i + 1], 4)[0] for i in range(2)]
    close(parts[0] + parts[1], 10 / 4)
    loss.backward()
    assert logprobs.grad is not None
    close(logprobs.grad, (-0.25 * MASK).tolist())
    half, _ = contrast_sft_loss(torch.full((1, 300), -1.0, dtype=torch.bfloat16), torch.ones(1, 300).bool(), 1)
    close(half, 300)
    assert half.dtype == torch.float32


def test_the_two_templates() -> None:
    english = TEMPLATES["english"]
    assert english.training_prompt("Be brief.", "Why {x}?", "Bad") == (
        "Instruction: Be brief.\nQuestion: Why {x}?\nWorse answer: Bad\nBetter answer: "
    )
    assert english.inference_prompt("Be brief.", "Why {x}?") == (
        "Instruction: Be brief.\nQuestion: Why {x}?\nBetter answer: "
    )
    chinese = TEMPLATES["chinese"]
    assert chinese.training_prompt("一", "二", "三") == "指令: 一\n问题: 二\n消极回答: 三\n积极回答: "
    assert chinese.inference_prompt("一", "二") == "指令: 一\n问题: 二\n积极回答: "


TRAINING, INFERENCE = "{instruction} {prompt} {rejected} {chosen}", "{instruction} {prompt} {chosen}"


@pytest.mark.parametrize("slot", ["instruction", "prompt", "rejected", "chosen"])
def test_a_missing_slot_is_named(slot: str) -> None:
    with pytest.raises(ValueError, match=rf"training template lacks the slot {{{slot}}}"):
        ContrastTemplate(TRAINING.replace(f"{{{slot}}}", "x"), INFERENCE)
    if slot != "rejected":
        with pytest.raises(ValueError, match=rf"inference template lacks the slot {{{slot}}}"):
            ContrastTemplate(TRAINING, INFERENCE.replace(f"{{{slot}}}", "x"))


def test_an_unknown_slot_a_shown_worse_answer_and_a_text_after_the_better_one_are_refused() -> None:
    for extra in ("{context} ", "{} "):
        with pytest.raises(ValueError, match="training template has an unknown slot"):
            ContrastTemplate(extra + TRAINING, INFERENCE)
    with pytest.raises(ValueError, match=r"inference template has an unknown slot .*rejected"):
        ContrastTemplate(TRAINING, TRAINING)
    for text in (TRAINING + "\n", "{chosen} " + TRAINING):
        with pytest.raises(ValueError, match=r"must end in its only {chosen}"):
            ContrastTemplate(text, INFERENCE)
    doubled = ContrastTemplate("{{a}} " + TRAINING, INFERENCE)
    assert doubled.training_prompt("i", "p", "r") == "{a} i p r "


def test_the_table_of_methods() -> None:
    kinds = {name: method.data for name, method in METHODS.items()}
    pairs = dict.fromkeys(("dpo", "ipo", "simpo", "orpo", "contrast"), "pairs")
    assert kinds == pairs | {"kto": "labels", "ift": "targets"}
    assert {name for name, method in METHODS.items() if method.needs_reference} == {"dpo", "ipo", "kto"}
    assert {name for name, method in METHODS.items() if not method.averaged} == {"dpo", "kto"}
    assert [method.loss.__name__ for method in METHODS.values()] == [
        "dpo_loss", "ipo_loss", "kto_loss", "simpo_loss", "orpo_loss", "ift_loss", "contrast_sft_loss",
    ]  # fmt: skip
