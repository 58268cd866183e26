from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    Lfm2Config,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)
from transformers.cache_utils import DynamicLayer

from rollout.engine import EngineOptions, SamplingOptions
from rollout.hf_engine import TransformersEngine, _fill_holes, _pick, _ReservedLayer
from tests.rollout.tiny import STOP, VOCABULARY, forward_logprobs, greedy, prompts_of

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "learned positions": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.2, **SIZES),
    "sliding window": MistralConfig(sliding_window=8, head_dim=32, **LLAMA_LIKE, **SIZES),
    "normed heads": Qwen3Config(head_dim=32, **LLAMA_LIKE, **SIZES),
    "convolution and attention": Lfm2Config(layer_types=["conv", "full_attention"], **LLAMA_LIKE, **SIZES),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_architecture_is_sampled_as_its_forward_pass_says(architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]).eval()
    model.save_pretrained(tmp_path)
    engine = TransformersEngine(tmp_path, EngineOptions(96, 8, STOP))
    prompts = prompts_of([1, 30, 4, 12, 7, 2, 21, 16, 9, 3], seed=4)
    answers = engine.generate(prompts, SamplingOptions(30, 1.3), range(10))
    assert {answer.finished for answer in answers} == {True, False}
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = forward_logprobs(model, prompt, answer.token_ids, 1.3)
        assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    likeliest = engine.generate(prompts, SamplingOptions(12, 0.0), [0] * 10)
    for prompt, answer in zip(prompts, likeliest, strict=True):
        assert list(answer.token_ids) == greedy(model, prompt, 12)


def test_pick_inverts_the_distribution_function() -> None:
    # p = (1/2, 0, 1/4, 1/4) at temperature 1: cumulative 0.5, 0.5, 0.75, 1
    logits = torch.tensor([0.5, 0.0, 0.25, 0.25]).log().expand(6, 4)
    uniforms = torch.tensor([0.0, 0.4999, 0.5001, 0.7499, 0.7501, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = _pick(logits, uniforms, 1.0)
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]
    assert logprobs.exp().tolist() == pytest.approx([0.5, 0.5, 0.25, 0.25, 0.25, 0.25])
    # temperature 1/2 squares the odds: (4/6, 0, 1/6, 1/6)
    tokens, logprobs = _pick(logits[:3], torch.tensor([0.66, 0.67, 0.84]).double(), 0.5)
    assert tokens.tolist() == [0, 2, 3]
    assert logprobs.exp().tolist() == pytest.approx([4 / 6, 1 / 6, 1 / 6])
    tokens, logprobs = _pick(logits[:1], uniforms[:1], 0.0)
    assert tokens.tolist() == [0]
    assert logprobs.exp().tolist() == pytest.approx([0.5])


@given(st.lists(st.booleans(), min_size=1, max_size=12).filter(any))
def test_live_rows_move_only_into_holes(live: list[bool]) -> None:
    order = _fill_holes(torch.tensor(live)).tolist()
    count = sum(live)
    assert sorted(order) == [row for row, alive in enumerate(live) if alive]
    assert all(order[slot] == slot for slot in range(count) if live[slot])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_reserved_layer_is_transformers_own_layer(data: st.DataObject) -> None:
    rows, capacity = 5, 12
    reserved, reference = _ReservedLayer(capacity), DynamicLayer()
    while reserved.get_seq_length() < capacity - 3:
        width = data.draw(st.integers(1, 3))
        keys, values = torch.randn(rows, 2, width, 4), torch.randn(rows, 2, width, 3)
        for ours, theirs in zip(reserved.update(keys, values), reference.update(keys, values), strict=True):
            assert torch.equal(ours, theirs)
        live = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows).filter(any))
        kept = _fill_holes(torch.tensor(live))
        reserved.batch_select_indices(kept)
        reference.batch_select_indices(kept)
        for ours, theirs in ((reserved.keys, reference.keys), (reserved.values, reference.values)):
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours, theirs)
        assert reserved.get_mask_sizes(1) == reference.get_mask_sizes(1)
        rows = sum(live)
