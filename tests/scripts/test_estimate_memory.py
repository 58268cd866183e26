"""The scale plan's memory: against transformers' models, torch's saved tensors, and roles of the stage itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from pipeline.advise_facts import PPO_COPIES
from pipeline.errors import UserError
from pipeline.stage import Stage
from pipeline.tokens import Encoder, load_tokenizer
from policy.ppo.roles import load_roles, memory_by_role
from scripts.bench_ppo_models import WORKLOADS, Shape, make, random_model
from scripts.estimate_check import bench_shape
from scripts.estimate_memory import Computed, layer_activation_bytes, memory, roles
from scripts.estimate_plan import GIB
from scripts.estimate_shapes import NAMED, ModelShape, load_shape, shape_of
from tests.scripts.estimate_plans import TINY, large_plan, tiny_plan
from tests.tiny_stage import prepare_stage

# Shapes


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("0.5b", 494_032_768),
        ("1.5b", 1_543_714_304),
        ("7b", 7_615_616_512),
        ("8b", 8_030_261_248),
        ("14b", 14_770_033_664),
        ("32b", 32_763_876_352),
        ("70b", 70_553_706_496),
    ],
)
def test_the_table_has_the_published_numbers_of_parameters(name: str, published: int) -> None:
    """Published: what the hub counts in the safetensors files of Qwen2.5 and Llama 3."""
    assert NAMED[name].parameters == published


SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def built(family: str, **changed: Any) -> tuple[PretrainedConfig, int, int]:
    """A configuration, and transformers' parameters of its causal model and of its classifier with one output."""
    config = AutoConfig.for_model(family, **{**SIZES, **changed, "num_labels": 1})
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config)
        classifier = AutoModelForSequenceClassification.from_config(config)
    counts = [sum(p.numel() for p in model.parameters()) for model in (causal, classifier)]
    return config, counts[0], counts[1]


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 16}),
        ("mistral", {"num_key_value_heads": 4}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 8}),
    ],
)
def test_shapes_count_what_transformers_builds(family: str, changed: Mapping[str, Any], tmp_path: Path) -> None:
    config, causal, classifier = built(family, **changed)
    config.save_pretrained(tmp_path)
    shape = load_shape(str(tmp_path))
    assert (shape.parameters, shape.classifier_parameters) == (causal, classifier)


def test_a_model_that_is_not_counted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'gpt2' model"):
        shape_of({"model_type": "gpt2"}, "gpt2")
    with pytest.raises(UserError, match=r"config\.json has no 'hidden_size'"):
        shape_of({"model_type": "llama", "num_attention_heads": 2}, "broken")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_shape(str(tmp_path))
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_shape(str(tmp_path.parent))


# Memory


@pytest.mark.parametrize(
    "ppo",
    [
        {},
        {"critic": "policy"},
        {"critic": "shared"},
        {"sharing": "lora_policy"},
        {"sharing": "lora"},
        {"sharing": "lora", "critic": "shared"},
    ],
)
def test_roles_are_those_that_the_stage_measures(ppo: Mapping[str, Any], tmp_path: Path) -> None:
    """Exactly the MiB that `memory_by_role` counts in the stage's own roles."""
    make(TINY, tmp_path, TINY.batch, "cpu")
    plan = tiny_plan(ppo)
    recipe = {**plan.recipe.model_dump(mode="json"), "rollout": {"engine": "transformers"}}
    reward = "rm_adapter" if ppo.get("sharing") == "lora" else "rm"
    inputs = {"policy": tmp_path / "policy", "reward_model": tmp_path / reward}
    stage = Stage(prepare_stage(tmp_path / "run" / "ppo.partial", recipe, "ppo", inputs))
    encoder = Encoder(load_tokenizer(tmp_path / "policy", plan.recipe.model), 8, 16)
    measured = memory_by_role(load_roles(stage, encoder, [], torch.device("cpu")))
    predicted = {
        name: {"weights": role.weight_bytes / 2**20, "training": role.training_bytes / 2**20}
        for name, role in roles(plan).items()
    }
    assert predicted == {name: pytest.approx(each, abs=1e-9) for name, each in measured.items()}


def test_the_advice_of_the_pipeline_counts_the_same_copies() -> None:
    """`tristage advise` counts 10 float32 copies for PPO; critic and reward model lack the (untied) head."""
    plan = tiny_plan()
    total = sum(role.weight_bytes + role.training_bytes for role in roles(plan).values())
    assert total / (4 * plan.shape.parameters) == pytest.approx(PPO_COPIES["full"], rel=0.01)


def saved_bytes(shape: ModelShape, computed: str, checkpointing: bool = False) -> tuple[int, int]:
    """Bytes that a forward of 300 tokens keeps for the backward pass: of activations, and of weights' copies."""
    sizes = {field.name: vars(shape)[field.name] for field in dataclasses.fields(Shape)}
    model = random_model(Shape(**sizes), "causal", "cpu").train()
    torch.nn.Module.to(model, torch.bfloat16 if computed == "bfloat16" else torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {form for p in model.parameters() for form in (tuple(p.shape), tuple(p.t().shape) if p.ndim == 2 else ())}
    seen: dict[int, tuple[int, bool]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = (storage.nbytes(), tuple(tensor.shape) in shapes)
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=computed != "float32"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        ids = torch.randint(3, shape.vocab_size, (3, 100))
        output = model.get_submodule("model")(input_ids=ids, use_cache=False)
    found = [sum(size for size, copy in seen.values() if copy == wanted) for wanted in (False, True)]
    del output
    return found[0], found[1]


@pytest.mark.parametrize("computed", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_a_layers_activations_are_what_autograd_keeps(computed: Computed, heads: tuple[int, int]) -> None:
    """Two layers more: what they add per token and layer, and the copies of their weights that autocast makes."""
    forms = [
        dataclasses.replace(
            bench_shape(WORKLOADS["a"].shape),
            num_hidden_layers=layers,
            num_attention_heads=heads[0],
            num_key_value_heads=heads[1],
            head_size=256 // heads[0],
        )
        for layers in (1, 3)
    ]
    (one, copies_one), (three, copies_three) = (saved_bytes(form, computed) for form in forms)
    assert (three - one) / 2 / 300 == layer_activation_bytes(forms[0], computed)
    assert (copies_three - copies_one) / 2 == (2 * forms[0].trunk_parameters if computed == "autocast" else 0)
    few, many = (saved_bytes(form, computed, checkpointing=True)[0] for form in forms)
    assert (many - few) / 2 / 300 == 256 * (2 if computed == "bfloat16" else 4)


def test_memory_by_hand() -> None:
    """8 B parameters on 8 ranks, fsdp2: 16 bytes each for the policy, 4 for the reference."""
    plan = large_plan("8b")
    items = {item.name: item.gib for item in memory(plan).items}
    assert items["policy"] == pytest.approx(8_030_261_248 * 16 / 8 / GIB)
    assert items["reference"] == pytest.approx(8_030_261_248 * 4 / 8 / GIB)
    classifier = 8_030_261_248 - 128256 * 4096 + 4096
    assert items["critic"] == pytest.approx(classifier * 16 / 8 / GIB)
    assert items["engine"] == pytest.approx(0.25 * 79.1)
    layer = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336) + 2 * 4096
    root = 2 * 128256 * 4096 + 4096
    assert items["gathered"] == pytest.approx((2 * (2 * layer + root) + 6 * (layer + root)) / GIB)
    assert items["rollout batch"] == pytest.approx(512 * (9 * 1024 + 45 * 512) / GIB)
    kept = 12 * 4096 + 8 + 2 * (3 * 4096 + 4096 + 2 * 1024 + 4 * 14336) + 4 * 32
    checkpointed = 4096 * (32 * 2 * 4096 + kept + 8 * 4096)
    assert items["activations"] == pytest.approx(checkpointed / GIB)
    assert memory(plan).total_gib == pytest.approx(sum(items.values()))


def test_roles_out_of_ppo_shard_and_under_ddp_are_whole() -> None:
    whole = {item.name: item.gib for item in memory(large_plan("8b", sharding="ddp")).items}
    some = {item.name: item.gib for item in memory(large_plan("8b", "--ppo.shard", "[policy, critic]")).items}
    cut = {item.name: item.gib for item in memory(large_plan("8b")).items}
    assert whole["policy"] == pytest.approx(8 * cut["policy"])
    assert "gathered" not in whole
    assert (some["policy"], some["reference"]) == (cut["policy"], whole["reference"])
    assert some["reward rm"] == whole["reward rm"]
    assert "autocast copies" in whole
    assert "autocast copies" not in cut
    assert memory(large_plan("8b")).host_gib == pytest.approx(8 * whole["reference"] / 8)
    assert memory(large_plan("8b", sharding="ddp")).host_gib == pytest.approx(8 * whole["reference"])


@pytest.mark.parametrize(
    ("sharing", "cut"),
    [
        ("full", {"policy", "reference", "critic", "reward rm"}),
        ("lora_policy", {"critic", "reward rm"}),
        ("lora", set()),
    ],
)
def test_a_base_under_adapters_is_never_cut(sharing: str, cut: set[str]) -> None:
    plan = large_plan("8b", "--ppo.sharing", sharing)
    assert {name for name in roles(plan) if plan.sharded(name)} == cut
    assert not large_plan("8b", "--ppo.critic", "shared").sharded("critic")


def test_a_server_takes_the_engine_away_and_needs_room_itself() -> None:
    served = large_plan("70b", machines=8, mode="server", server_gpus=8, tensor_parallel=8)
    assert "engine" not in {item.name for item in memory(served).items}
    assert memory(served).engine_fits
    assert not memory(dataclasses.replace(served, tensor_parallel=1)).engine_fits
    assert not memory(large_plan("70b", machines=8)).engine_fits
