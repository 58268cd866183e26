"""The four roles of PPO: models of their own, or adapters and heads over one frozen base (`ppo.sharing`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.adapters import (
    adapter_parameters,
    adapter_state,
    add_adapter,
    load_adapter_state,
    merged_weights,
    using,
)
from pipeline.recipe import Recipe
from pipeline.stage import Stage
from pipeline.tokens import EncodedPrompt, Encoder
from policy.critics import Critic, ValueHead
from policy.models import POLICY, cast, check_projection, disable_dropout, load_policy, save_model, save_policy
from policy.ppo.critic import load_critic
from policy.ppo.ranks import Ranks
from policy.ppo.rewards import AdapterReward, ModelReward, Rewards, load_rewards

MIB = 1024**2


@dataclass(frozen=True)
class Roles:
    """The four roles of PPO, on one device.

    Attributes:
        policy: trained, itself or by its adapter; reference: its frozen start, which is the same object where an
            adapter is trained; critic: trained; rewards: frozen models and functions.
    """

    policy: PreTrainedModel
    reference: PreTrainedModel
    critic: Critic
    rewards: Rewards
    temperature: float
    max_tokens: int
    autocast: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def device(self) -> torch.device:
        """Where all models live."""
        return self.policy.device

    @property
    def adapted(self) -> bool:
        """Whether the policy is an adapter over the reference."""
        return self.reference is self.policy

    def acting_as_reference(self) -> AbstractContextManager[None]:
        """Inside, `reference` is the reference."""
        return using(self.policy, None) if self.adapted else nullcontext()

    def trainable(self) -> list[nn.Parameter]:
        """The weights that the policy's optimiser moves."""
        return adapter_parameters(self.policy, POLICY) if self.adapted else list(self.policy.parameters())

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """The policy's weights by name, as a rollout engine loads them."""
        return merged_weights(self.policy, POLICY) if self.adapted else self.policy.state_dict().items()

    @property
    def parts(self) -> dict[str, nn.Module | AdapterState]:
        """What an exact resume restores: whole models, or adapters and heads."""
        parts: dict[str, nn.Module | AdapterState] = {
            "policy": AdapterState(self.policy, POLICY) if self.adapted else self.policy,
            "critic": self.critic,
        }
        if isinstance(self.critic, ValueHead) and self.critic.adapter is not None:
            parts["critic_adapter"] = AdapterState(self.policy, self.critic.adapter)
        return parts


@dataclass(frozen=True)
class AdapterState:
    """One adapter's weights as a part of the training state."""

    model: PreTrainedModel
    name: str

    def state_dict(self) -> dict[str, Tensor]:
        return adapter_state(self.model, self.name)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        load_adapter_state(self.model, self.name, state)


def load_roles(stage: Stage, encoder: Encoder, prompts: Sequence[EncodedPrompt], device: torch.device) -> Roles:
    """The roles that `ppo.sharing` and `ppo.critic` ask for; all is checked before the first model is loaded.

    Errors:
        UserError: a model that the gate refuses, that does not fit the others, or that cannot be loaded.
    """
    recipe, ppo = stage.recipe, stage.recipe.ppo
    path, adapted = stage.inputs["policy"].path, ppo.sharing != "full"
    bf16 = recipe.model.dtype == "bfloat16"
    autocast = partial(torch.autocast, device.type, torch.bfloat16) if bf16 else nullcontext

    @cache
    def policy() -> PreTrainedModel:
        """A frozen base lies in the recipe's dtype; weights that are trained, and their reference, in float32."""
        model = load_policy(path, recipe.model.dtype if adapted else "float32", device)
        check_projection(model, path)
        disable_dropout(model)
        if adapted:
            add_adapter(model, POLICY, recipe.model.lora, seed=recipe.seed)
        return model.eval()

    base = policy if ppo.sharing == "lora" else None
    rewards = load_rewards(stage, encoder, prompts, device, autocast, base)
    critic = load_critic(stage, rewards, encoder, policy).to(device)
    reference = policy() if adapted else load_policy(path, "float32", device).requires_grad_(False).eval()
    disable_dropout(reference)
    if ppo.gradient_checkpointing:
        for model in (policy(), critic.trunk):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return Roles(
        policy=policy(),
        reference=reference,
        critic=critic.eval(),
        rewards=rewards,
        temperature=recipe.rollout.temperature,
        max_tokens=ppo.max_tokens_per_micro_batch,
        autocast=autocast,
    )


def save_roles(roles: Roles, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, out: Path, base: str) -> None:
    """Policy and critic as plain models in `out` and `out/critic`; an adapter also by itself, in `out/adapter`.

    `base` is the path of the policy's start, for the adapter's configuration.
    """
    dtype = recipe.model.dtype
    save_policy(roles.policy, tokenizer, out, dtype, adapter_over=base if roles.adapted else None)
    save_model(cast(roles.critic.classifier(), dtype), tokenizer, out / "critic")


def memory_by_role(roles: Roles) -> dict[str, dict[str, float]]:
    """MiB of each role: its own `weights`, and `training`, the gradients and Adam's two moments of what it trains.

    What several roles share is counted once, as `base` under `sharing: lora`.
    """
    seen: set[int] = set()
    trained = {"policy": roles.trainable(), "critic": roles.critic.trainable()}
    table: dict[str, dict[str, float]] = {}
    for role, parameters in _weights_by_role(roles).items():
        new = {p.data_ptr(): p for p in parameters if p.data_ptr() not in seen}
        seen |= new.keys()
        training = sum(3 * p.numel() * p.element_size() for p in trained.get(role, ()))
        own = sum(p.numel() * p.element_size() for p in new.values())
        table[role] = {"weights": own / MIB, "training": training / MIB}
    return table


def model_names(roles: Roles) -> list[str]:
    """The models in memory by role; on a shared base, the base and what stands on it."""
    names = ["base", "policy adapter"] if roles.adapted else ["policy", "reference"]
    critic = roles.critic
    on_base = isinstance(critic, ValueHead)
    names.append("critic" if not on_base else "critic head" if critic.adapter is None else "critic adapter")
    for name, source in roles.rewards.sources.items():
        if isinstance(source, ModelReward):
            names.append(f"reward {name} adapter" if isinstance(source, AdapterReward) else f"reward {name}")
    return names


def _weights_by_role(roles: Roles) -> Mapping[str, Iterable[nn.Parameter]]:
    """Every role's weights; those of a shared base come first, so that they count as its own."""
    first: dict[str, Iterable[nn.Parameter]] = {}
    if roles.adapted:
        first["base"] = [p for name, p in roles.policy.named_parameters() if ".lora_" not in name]
    rewards = {name: s for name, s in roles.rewards.sources.items() if isinstance(s, ModelReward)}
    return {
        **first,
        "policy": roles.trainable(),
        "reference": [] if roles.adapted else roles.reference.parameters(),
        "critic": roles.critic.trainable(),
        **{f"reward {name}": source.parameters() for name, source in rewards.items()},
    }
