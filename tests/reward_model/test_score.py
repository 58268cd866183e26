"""Scores are read at the last response token, whatever else is in the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaForSequenceClassification

from pipeline.artifacts import Artifact
from pipeline.errors import UserError
from reward_model.score import (
    Normalisation,
    backbone_and_head,
    load_reward_model,
    read_normalisation,
    score_responses,
    token_batches,
)
from tests.reward_model.tiny import EOS, PAD, config, language_model, reward_model

MODEL = reward_model(seed=3)
IDS = st.lists(st.integers(PAD, 39), min_size=1, max_size=7)


def one_by_one(prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
    """The plain definition: one forward without padding per sequence, head at the last position."""
    scores = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            hidden = MODEL.model(input_ids=ids).last_hidden_state
            scores.append(float(hidden[0, -1] @ MODEL.score.weight[0]))
    return torch.tensor(scores)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=6), st.integers(1, 60))
def test_batching_and_padding_never_change_a_score(rows: list[tuple[list[int], list[int]]], max_tokens: int) -> None:
    prompts, answers = [list(p) for p, _ in rows], [list(a) for _, a in rows]
    got = score_responses(MODEL, prompts, answers, max_tokens=max_tokens)
    torch.testing.assert_close(got, one_by_one(prompts, answers), atol=2e-5, rtol=1e-5)


def test_a_response_that_ends_in_the_padding_token_is_read_at_that_token() -> None:
    prompts, answers = [[1, 5], [1, 6, 7, 8]], [[9, PAD], [10, 11, EOS]]
    got = score_responses(MODEL, prompts, answers)
    torch.testing.assert_close(got, one_by_one(prompts, answers), atol=2e-5, rtol=1e-5)


def test_scores_agree_with_the_library_classifier() -> None:
    ids = torch.tensor([[1, 5, 9, EOS, PAD], [1, 6, 7, 8, EOS]])
    with torch.no_grad():
        wanted = MODEL(input_ids=ids, attention_mask=(ids != PAD).long()).logits.squeeze(-1)
    got = score_responses(MODEL, [[1, 5], [1, 6]], [[9, EOS], [7, 8, EOS]])
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)
    assert got.dtype == torch.float32
    assert not got.requires_grad


def test_empty_response_is_refused() -> None:
    with pytest.raises(ValueError, match="response 1 has no tokens"):
        score_responses(MODEL, [[1], [1]], [[3], []])


def test_no_prompts_no_scores() -> None:
    assert score_responses(MODEL, [], []).shape == (0,)


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 64))
def test_token_batches_hold_every_index_once_within_the_budget(lengths: list[int], max_tokens: int) -> None:
    batches = list(token_batches(lengths, max_tokens))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[index] for index in batch)
        assert padded <= max_tokens or len(batch) == 1


def test_token_batches_are_as_large_as_the_budget_allows() -> None:
    assert list(token_batches([2, 5, 3, 2], 6)) == [[1], [2, 0], [3]]


def test_a_batch_of_enough_tokens_ends_where_padding_begins() -> None:
    """9 is no less than 7/8 of 10, and 8 is; the second batch has not enough tokens to leave out a 4."""
    assert list(token_batches([10, 4, 10, 8, 9], 100, enough=20)) == [[0, 2, 4], [3, 1]]
    assert list(token_batches([10, 4, 10, 8, 9], 100, enough=8)) == [[0, 2, 4], [3], [1]]
    assert list(token_batches([10, 4, 10, 8, 9], 20, enough=20)) == [[0, 2], [4, 3], [1]]


def test_load_reward_model_round_trip(tmp_path: Path) -> None:
    model = LlamaForSequenceClassification(config())
    model.config.attention_dropout = 0.1
    model.save_pretrained(tmp_path)
    loaded = load_reward_model(tmp_path, torch.float32, "cpu")
    assert not loaded.training
    layers = [module for module in loaded.modules() if "attention_dropout" in vars(module)]
    assert layers
    assert all(module.attention_dropout == 0.0 for module in layers)
    torch.testing.assert_close(backbone_and_head(loaded)[1].weight, model.score.weight, rtol=0, atol=0)


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    language_model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"not a reward model.*score\.weight"):
        load_reward_model(tmp_path, torch.float32, "cpu")


def test_two_outputs_are_no_reward_model(tmp_path: Path) -> None:
    two = config()
    two.num_labels = 2
    LlamaForSequenceClassification(two).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="2 outputs"):
        load_reward_model(tmp_path, torch.float32, "cpu")


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing-here"):
        load_reward_model(tmp_path / "nothing-here", torch.float32, "cpu")


def test_backbone_and_head_of_another_architecture() -> None:
    gpt2 = GPT2ForSequenceClassification(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    backbone, head = backbone_and_head(gpt2)
    assert backbone is gpt2.transformer
    assert head is gpt2.score


def test_backbone_and_head_names_an_architecture_without_a_linear_head() -> None:
    model: Any = reward_model()
    model.score = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 1))
    with pytest.raises(UserError, match="LlamaForSequenceClassification"):
        backbone_and_head(model)


def test_normalisation_subtracts_the_mean_and_divides_by_the_std() -> None:
    # (5 - 2) / 4 = 0.75, (-2 - 2) / 4 = -1
    got = Normalisation(mean=2.0, std=4.0).apply(torch.tensor([5.0, -2.0]))
    torch.testing.assert_close(got, torch.tensor([0.75, -1.0]))


def test_read_normalisation() -> None:
    manifest = {"normalisation": {"mean": -0.5, "std": 2.0, "samples": 4}}
    assert read_normalisation(Artifact("rm", "rm", manifest)) == Normalisation(-0.5, 2.0)


@pytest.mark.parametrize(
    ("manifest", "text"),
    [
        ({}, "no score normalisation"),
        ({"normalisation": {"mean": 0.0, "std": 0.0}}, "std 0.0"),
        ({"normalisation": {"mean": float("nan"), "std": 1.0}}, "mean nan"),
        ({"normalisation": {"mean": 0.0, "std": float("inf")}}, "std inf"),
    ],
)
def test_unusable_normalisation_is_refused(manifest: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        read_normalisation(Artifact("runs/x/rm", "rm", manifest))
