"""Roles over one frozen base, the critic on the policy's trunk, and the first forward that is not done twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.adapters import add_adapter, base_sha256, save_merged, using
from pipeline.artifacts import finish, open_artifact
from pipeline.errors import UserError
from pipeline.recipe import LoraSection, ModelSection, PpoSection
from pipeline.stage import Stage
from pipeline.tokens import load_tokenizer, tokenizer_sha256
from policy.critics import PLAIN, ValueHead, zero_head
from policy.models import POLICY, load_policy
from policy.ppo.experience import make_experience
from policy.ppo.maths import masked_mean
from policy.ppo.rewards import shared_reward
from policy.ppo.roles import Roles
from policy.ppo.stage import run
from policy.ppo.update import Learner, UpdateOptions, ppo_update
from reward_model.score import Normalisation, score_responses
from tests.policy.conftest import make_batch, make_roles
from tests.tiny_stage import prepare_stage
from tests.workplace import Workplace, make_workplace

LORA = LoraSection(rank=4, alpha=8.0)
PPO = PpoSection(rollout_batch_size=6, num_ppo_epochs=2, learning_rate=1e-2, critic_learning_rate=1e-2, updates=4)


def updated(roles: Roles, ppo: PpoSection, *, reuse: bool = True) -> dict[str, float]:
    experience = make_experience(roles, make_batch(), ppo, 0.1)
    assert bool(experience.passes) == (ppo.num_minibatches == 1 and roles.max_tokens > 100)
    if not reuse:
        experience = replace(experience, passes=())
    return ppo_update(roles, Learner.create(roles, ppo, seed=0), experience, UpdateOptions(ppo, 8))


def weights(roles: Roles) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in (*roles.policy.parameters(), *roles.critic.parameters())])


def on_trunk(roles: Roles) -> Roles:
    head = zero_head(roles.policy)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(3))
    return replace(roles, critic=ValueHead(roles.policy, head, PLAIN, None))


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("changes", [{}, {"entropy_coef": 0.1, "kl_loss_coef": 0.2}])
def test_reusing_the_first_forward_changes_nothing(
    policy_dir: Path, reward_dir: Path, on_policy: bool, changes: Mapping[str, float]
) -> None:
    ppo = PPO.model_copy(update=changes)
    results = []
    for reuse in (True, False):
        roles = make_roles(policy_dir, reward_dir)
        roles = on_trunk(roles) if on_policy else roles
        metrics = updated(roles, ppo, reuse=reuse)
        results.append((metrics, weights(roles)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4, abs=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("on_policy", [False, True])
def test_gradient_checkpointing_changes_nothing(policy_dir: Path, reward_dir: Path, on_policy: bool) -> None:
    results = []
    for checkpointing in (False, True):
        roles = make_roles(policy_dir, reward_dir)
        roles = on_trunk(roles) if on_policy else roles
        if checkpointing:
            for model in (roles.policy, roles.critic.trunk):
                model.gradient_checkpointing_enable({"use_reentrant": False})
        updated(roles, PPO)
        results.append(weights(roles))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


def test_a_critic_on_the_policys_trunk_adds_value_coef_times_its_loss(policy_dir: Path, reward_dir: Path) -> None:
    """One plain step against autograd on the sum of both losses, written out."""
    roles = on_trunk(make_roles(policy_dir, reward_dir))
    ppo = PPO.model_copy(update={"num_ppo_epochs": 1, "value_coef": 0.3, "cliprange_value": None, "max_grad_norm": 1e9})
    experience = make_experience(roles, make_batch(), ppo, 0.1)
    assert isinstance(roles.critic, ValueHead)
    assert roles.critic.trainable() == [roles.critic.head.weight]
    batch, mask = experience.batch, experience.batch.response_mask
    logits = roles.policy(
        batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        position_ids=(batch.attention_mask.long().cumsum(1) - 1).clamp(min=0),
        output_hidden_states=True,
    )
    start = batch.prompt_ids.shape[1] - 1
    hidden = logits.hidden_states[-1][:, start:-1]
    logprobs = logits.logits[:, start:-1].log_softmax(-1).gather(-1, batch.response_ids[..., None])[..., 0]
    ratio = (logprobs - experience.old_logprobs).exp()
    surrogate = -(ratio * experience.advantages)[mask].mean()
    error = 0.5 * (roles.critic.head(hidden)[..., 0] - experience.returns)[mask].square().mean()
    wanted = torch.autograd.grad(surrogate + 0.3 * error, [*roles.policy.parameters(), roles.critic.head.weight])
    learner = Learner.create(roles, ppo.model_copy(update={"learning_rate": 1e-9, "critic_learning_rate": 1e-9}), 0)
    metrics = ppo_update(roles, learner, experience, UpdateOptions(ppo, 8))
    got = [p.grad for p in (*roles.policy.parameters(), roles.critic.head.weight)]
    assert metrics["loss/value_avg"] == pytest.approx(float(error), rel=1e-5)
    assert masked_mean(experience.values, mask).abs() > 0.01
    for one, two in zip(got, wanted, strict=True):
        assert one is not None
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def adapter_artifact(place: Workplace, policy: Path, final: Path) -> Path:
    """An artifact as the rm stage with rm.lora writes it, its adapter and head random."""
    partial = final.with_name(final.name + ".partial")
    model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
    add_adapter(model, "reward", LORA, seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(6))
    entry = save_merged(model, "reward", partial, base=str(policy))
    tokenizer = load_tokenizer(policy, ModelSection(name_or_path="model"))
    tokenizer.save_pretrained(partial)
    manifest = {
        "kind": "rm",
        "fingerprint": {"sha256": "made by hand"},
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "chat_template_sha256": None,
        "normalisation": {"mean": 0.1, "std": 0.5},
        "metrics": {"eval/accuracy": 0.8, "eval/accuracy_low": 0.7, "eval/accuracy_high": 0.9, "eval/pairs": 50},
        "adapter": entry,
    }
    finish(partial, final, manifest)
    return final


def shared_stage(place: Workplace, reward_model: Path, out: str = "ppo.partial", **ppo: Any) -> Stage:
    recipe: Mapping[str, Any] = {
        "name": "tiny",
        "model": {"name_or_path": "model", "lora": {"rank": 4, "alpha": 8.0}},
        "data": {
            "prompts": str(place.path / "prompts.jsonl"),
            "max_prompt_tokens": 24,
            "max_response_tokens": 8,
        },
        "ppo": {
            "sharing": "lora",
            "rollout_batch_size": 8,
            "num_ppo_epochs": 2,
            "updates": 2,
            "learning_rate": 1e-2,
            "critic_learning_rate": 1e-2,
            **ppo,
        },
        "rollout": {"engine": "transformers"},
        "eval": {"prompts": 2, "samples_per_prompt": 1},
    }
    inputs = {"policy": place.path / "model", "reward_model": reward_model}
    return Stage(prepare_stage(place.run / out, recipe, "ppo", inputs))


@pytest.mark.parametrize(
    ("ppo", "said"),
    [
        ({}, "critic starts from the reward model, its head kept"),
        ({"critic_head": "zero"}, "its head zero"),
        ({"critic": "policy"}, "critic starts from the policy, its head zero"),
        ({"critic": "shared"}, "critic is a zero head on the policy's own trunk"),
        ({"sharing": "lora_policy"}, "critic starts from the reward model, its head kept"),
    ],
)
def test_all_roles_over_one_base(tmp_path: Path, ppo: Mapping[str, Any], said: str) -> None:
    place = make_workplace(tmp_path / "work")
    policy = place.path / "model"
    stage = shared_stage(place, adapter_artifact(place, policy, place.run / "rm"), **ppo)
    final = stage.complete(run(stage))
    assert said in (final / "log.txt").read_text()

    rows = [json.loads(line) for line in (final / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "objective/kl" in row]
    assert trained[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6)  # the adapter's delta is zero to begin with
    assert trained[0]["val/ratio_first"] == pytest.approx(1.0, abs=1e-5)
    assert abs(trained[1]["objective/kl"]) > 1e-4
    assert max(row["rollout/max_logprob_gap"] for row in trained) < 1e-4

    memory = json.loads((final / "manifest.json").read_text())["memory"]
    assert memory["reference"] == {"weights": 0.0, "training": 0.0}
    assert memory["base"]["weights"] > 0
    assert memory["policy"]["training"] == pytest.approx(3 * memory["policy"]["weights"])
    one_base = stage.recipe.ppo.sharing == "lora"
    assert (memory["reward rm"]["weights"] < memory["base"]["weights"]) == one_base
    assert (memory["critic"]["weights"] < memory["base"]["weights"]) == one_base

    ids = torch.tensor([[1, 20, 30, 40]])
    saved = AutoModelForCausalLM.from_pretrained(final)(ids).logits
    base = AutoModelForCausalLM.from_pretrained(policy)
    assert not torch.allclose(base(ids).logits, saved, atol=1e-3)
    torch.testing.assert_close(PeftModel.from_pretrained(base, str(final / "adapter"))(ids).logits, saved)
    AutoModelForSequenceClassification.from_pretrained(final / "critic", num_labels=1)


def test_switching_adapters_leaves_the_others_and_the_base_alone(policy_dir: Path) -> None:
    model = load_policy(policy_dir, "float32")
    before = base_sha256(model)
    add_adapter(model, POLICY, LORA, seed=0)
    add_adapter(model, "critic", LORA, seed=1)
    ids = torch.tensor([[1, 5, 6]])
    with using(model, "critic"):
        model(ids).logits.square().mean().backward()
        with using(model, None):
            assert not any(p.requires_grad for p in model.parameters())
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved
    assert all(".critic." in name for name in moved)
    assert all(".policy." in name for name, p in model.named_parameters() if p.requires_grad)
    assert base_sha256(model) == before


def test_a_reward_model_over_other_weights_is_refused(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    model = load_policy(place.path / "model", "float32")
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    other = tmp_path / "other"
    model.save_pretrained(other)
    load_tokenizer(place.path / "model", ModelSection(name_or_path="model")).save_pretrained(other)
    with pytest.raises(UserError, match=r"adapter over other weights than the policy's.*rm\.init_from"):
        run(shared_stage(place, adapter_artifact(place, other, place.run / "rm")))


def test_scores_of_a_shared_and_a_plain_reward_model_agree(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    path = adapter_artifact(place, place.path / "model", place.run / "rm")
    policy = load_policy(place.path / "model", "float32")
    add_adapter(policy, POLICY, LORA, seed=0)
    artifact = open_artifact(path, kinds=("rm",), wanted_as="ppo.reward_model")
    source = shared_reward("rm", artifact, policy, Normalisation(0.0, 1.0), 64, nullcontext)
    prompts, responses = [[1, 20, 21], [1, 30]], [[40, 41, 2], [50, 2]]
    merged = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    torch.testing.assert_close(
        source.raw_scores(prompts, responses), score_responses(merged, prompts, responses), rtol=1e-4, atol=1e-5
    )
