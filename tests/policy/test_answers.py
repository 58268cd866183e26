"""Answers that share their prompt's row give the numbers that each gives alone, and the same gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from policy.answers import (
    AnswerBatch,
    Group,
    _summed,
    answer_logprobs,
    attention,
    can_share_prompts,
    collate_answers,
    positions,
)
from policy.models import load_policy
from tests.policy.conftest import tiny_config

GROUPS = [
    Group([1, 5, 6], [[7, 8, 2], [9, 2], [10, 11, 12, 13]]),
    Group([1], [[14, 2]]),
    Group([1, 15, 16, 17, 18], [[2], [19, 20, 21, 2]]),
]


def alone(model: PreTrainedModel, groups: list[Group]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Sums of every answer's and every prompt's log-probabilities from full logits, one row at a time."""
    answers, prompts = [], []
    for group in groups:
        prompt = list(group.prompt_ids)
        for answer in group.answer_ids:
            logits = model(torch.tensor([prompt + list(answer)])).logits[0].log_softmax(-1)
            answers.append(sum(logits[len(prompt) - 1 + t, token] for t, token in enumerate(answer)))
        logits = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        prompts.append(sum((logits[t, token] for t, token in enumerate(prompt[1:])), torch.zeros(())))
    return answers, prompts


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sums_and_gradients_are_those_of_each_row_alone(policy_dir: Path, shared: bool, family: str) -> None:
    model = load_policy(policy_dir, "float32").eval()
    if family == "gpt2":
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    batch = collate_answers(GROUPS, 0, shared=shared)
    assert batch.input_ids.shape == ((3, 12) if shared else (6, 9))
    got = answer_logprobs(model, batch, with_prompts=True)
    answers, prompts = alone(model, GROUPS)
    torch.testing.assert_close(got.answers, torch.stack(answers), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.prompts, torch.stack(prompts), rtol=1e-5, atol=1e-5)
    assert got.answer_tokens.tolist() == [3, 2, 4, 2, 1, 4]
    assert got.prompt_tokens.tolist() == [2, 0, 4]
    assert batch.group.tolist() == [0, 0, 0, 1, 2, 2]
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 0.3])
    (got.answers @ weights).backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    (torch.stack(alone(model, GROUPS)[0]) @ weights).backward()
    for one, two in zip(found, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_gradients_are_the_same_bits_however_threads_run() -> None:
    """A prompt's last token predicts the first of all its answers, so that their gradients are added up."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=256, n_layer=1, n_head=2, n_positions=8)).eval()
    group = Group([1, 5, 6], [[7 + k % 20, *([8 + k % 9] * 5), 2] for k in range(300)])
    batch = collate_answers([group] * 3, 0, shared=True)  # the middle one is halved by two threads
    width = model.config.hidden_size
    hidden = torch.randn(batch.input_ids.numel(), width, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = []
        for _ in range(20):
            leaf = hidden.clone().requires_grad_()
            sums, _ = _summed(model, leaf, batch.rows, batch.ids, batch.owner, len(batch.group))
            sums.square().sum().backward()
            assert leaf.grad is not None
            found.append(leaf.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(grad, found[0]) for grad in found)


def test_layout_by_hand() -> None:
    batch = collate_answers([Group([5, 6], [[7, 8], [9]]), Group([1], [[2]])], 0, shared=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [1, 2, 0, 0, 0]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 2], [0, 1, -1, -1, -1]]
    assert positions(batch)[0].tolist() == [0, 1, 2, 3, 2]
    assert positions(batch)[1, :2].tolist() == [0, 1]
    assert attention(batch)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert list(zip(batch.rows.tolist(), batch.ids.tolist(), batch.owner.tolist(), strict=True)) == [
        (1, 7, 0),
        (2, 8, 0),
        (1, 9, 1),
        (5, 2, 2),
    ]
    again = AnswerBatch.of({**batch.as_dict(), "labels": torch.zeros(1)}, shared=True)
    assert torch.equal(again.rows, batch.rows)


def test_models_that_cannot_share_are_told(policy_dir: Path, tmp_path: Path) -> None:
    assert can_share_prompts(load_policy(policy_dir, "float32").eval())
    from transformers import MistralConfig, MistralForCausalLM

    window = {
        key: value for key, value in tiny_config().to_dict().items() if key not in ("architectures", "model_type")
    }
    MistralForCausalLM(MistralConfig(**{**window, "sliding_window": 32})).save_pretrained(tmp_path / "window")
    assert not can_share_prompts(AutoModelForCausalLM.from_pretrained(tmp_path / "window").eval())
