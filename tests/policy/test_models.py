"""Log-probabilities and values read from models, against one-by-one forwards without padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma2Config, Gemma2ForCausalLM

from pipeline.errors import UserError
from policy.critics import load_value_model
from policy.models import check_projection, load_policy, response_scores
from reward_model.score import Normalisation, backbone_and_head
from tests.policy.conftest import PROMPTS, RESPONSES, make_batch


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("padding", [(0, 0), (3, 2)])
def test_response_scores_equal_dense_logits_of_each_row_alone(
    policy_dir: Path, temperature: float, padding: tuple[int, int]
) -> None:
    model = load_policy(policy_dir, "float32").eval()
    reference = AutoModelForCausalLM.from_pretrained(policy_dir).eval().double()
    batch = make_batch(*padding)
    with torch.no_grad():
        scores = response_scores(model, batch, temperature)
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            logits = reference(torch.tensor([prompt + response])).logits[0] / temperature
            for t, token in enumerate(response):
                logp = logits[len(prompt) + t - 1].log_softmax(-1)
                assert scores.logprobs[row, t].item() == pytest.approx(logp[token].item(), abs=2e-5)
                assert scores.entropy[row, t].item() == pytest.approx(-(logp.exp() * logp).sum().item(), abs=2e-5)
            assert (scores.logprobs[row, len(response) :] == 0).all()


def test_values_are_the_normalised_score_head_before_each_token(reward_dir: Path) -> None:
    critic = load_value_model(reward_dir, "float32", Normalisation(0.5, 2.0), "reward_model").eval()
    model = AutoModelForSequenceClassification.from_pretrained(reward_dir).eval().double()
    with torch.no_grad():
        values = critic(make_batch(2, 1))
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            hidden = model.model(torch.tensor([prompt + response])).last_hidden_state[0]
            for t in range(len(response)):
                expected = (model.score(hidden[len(prompt) + t - 1]).item() - 0.5) / 2.0
                assert values[row, t].item() == pytest.approx(expected, abs=2e-5)
            assert (values[row, len(response) :] == 0).all()


def test_zero_head_predicts_zero_everywhere_and_still_learns(reward_dir: Path) -> None:
    critic = load_value_model(reward_dir, "float32", Normalisation(0.5, 2.0), "zero").eval()
    values = critic(make_batch())
    assert (values == 0).all()
    values.sum().backward()
    grad = backbone_and_head(critic.model)[1].weight.grad
    assert grad is not None
    assert grad.abs().sum() > 0


def test_soft_capped_logits_are_refused() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
    )
    with pytest.raises(UserError, match="changes its logits after the output projection"):
        check_projection(Gemma2ForCausalLM(config).eval(), "gemma")


def test_plain_head_passes_the_probe(policy_dir: Path) -> None:
    check_projection(load_policy(policy_dir, "float32").eval(), policy_dir)


def test_directory_without_model_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no causal language model could be loaded"):
        load_policy(tmp_path, "float32")
