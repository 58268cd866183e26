"""A critic behind an adapter of its own: what it reads, what it leaves alone, and how it is saved."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from pipeline.adapters import adapter_layers, adapter_state, add_adapter, copy_adapter, merged_weights, using
from pipeline.recipe import LoraSection
from policy.critics import ValueHead, ValueModel, zero_head
from policy.models import POLICY, load_policy
from reward_model.score import Normalisation
from tests.policy.conftest import make_batch

AFFINE = Normalisation(0.2, 1.5)
IDS = torch.tensor([[1, 5, 6, 7]])


def adapted(policy_dir: Path) -> PreTrainedModel:
    """A policy with the adapters `policy`, which acts, and `critic`, neither of them zero."""
    model = load_policy(policy_dir, "float32").eval()
    for seed, name in enumerate((POLICY, "critic")):
        add_adapter(model, name, LoraSection(rank=4, alpha=8.0), seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
    return model


@torch.no_grad()
def test_it_reads_its_own_adapter_and_is_saved_with_it(policy_dir: Path) -> None:
    torch.manual_seed(0)
    policy = adapted(policy_dir)
    head = zero_head(policy)
    torch.nn.init.normal_(head.weight)
    critic = ValueHead(policy, head, AFFINE, "critic")
    values, logits = critic(make_batch()), policy(IDS).logits
    saved = ValueModel(critic.classifier().eval(), AFFINE)
    torch.testing.assert_close(saved(make_batch()), values)
    assert not torch.allclose(ValueHead(policy, head, AFFINE, None)(make_batch()), values, atol=1e-2)
    torch.testing.assert_close(policy(IDS).logits, logits)


@torch.no_grad()
def test_inside_the_reference_another_adapter_acts_and_the_reference_comes_back(policy_dir: Path) -> None:
    policy = adapted(policy_dir)
    with using(policy, None):
        reference = policy(IDS).logits
        with using(policy, "critic"):
            assert not torch.allclose(policy(IDS).logits, reference, atol=1e-2)
        assert torch.equal(policy(IDS).logits, reference)
        assert all(layer.disable_adapters for layer in adapter_layers(policy))
    assert not torch.allclose(policy(IDS).logits, reference, atol=1e-2)


def test_a_copied_adapter_equals_its_source_and_moves_by_itself(policy_dir: Path) -> None:
    policy = adapted(policy_dir)
    copy_adapter(policy, "second", "critic")
    for (_, one), (_, two) in zip(merged_weights(policy, "second"), merged_weights(policy, "critic"), strict=True):
        assert torch.equal(one, two)
    before = {key: tensor.clone() for key, tensor in adapter_state(policy, "critic").items()}
    with torch.no_grad():
        for tensor in adapter_state(policy, "second").values():
            tensor.add_(1.0)
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter_state(policy, "critic").items())
    assert not any(parameter.requires_grad for name, parameter in policy.named_parameters() if ".policy." not in name)
