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
from pipeline.errors import UserError
from pipeline.ranks import Ranks
from pipeline.recipe import Recipe
from pipeline.sharding import is_sharded, load_in_turn, own_part, wanted, whole
from pipeline.stage import Stage
from pipeline.tokens import EncodedPrompt, Encoder
from policy.critics import Critic, ValueHead
from policy.models import POLICY, cast, check_projection, disable_dropout, load_policy, save_model, save_policy
from policy.ppo.critic import load_critic
from policy.ppo.rewards import AdapterReward, ModelReward, Rewards, load_rewards

MIB = 1024**2


@dataclass(frozen=True)
class Roles:
    """The four roles of PPO, on one device.

    Attributes:
        policy: trained, itself or by its adapter; reference: its frozen start, which is the same object where an
            adapter is trained; critic: trained; rewards: frozen models and functions.
        sharded: policy, reference or critic lie in parts on the ranks, which then run equally many forwards.
    """

    policy: PreTrainedModel
    reference: PreTrainedModel
    critic: Critic
    rewards: Rewards
    temperature: float
    max_tokens: int
    autocast: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)
    ranks: Ranks = field(default_factory=Ranks)
    sharded: bool = False

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
        return merged_weights(self.policy, POLICY) if self.adapted else whole(self.policy.state_dict().items())

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
    recipe, ppo, ranks = stage.recipe, stage.recipe.ppo, stage.ranks
    path, adapted = stage.inputs["policy"].path, ppo.sharing != "full"
    bf16 = recipe.model.dtype == "bfloat16"
    autocast = partial(torch.autocast, device.type, torch.bfloat16) if bf16 else nullcontext
    _refuse_sharded_adapters(stage)

    def placed(role: str, load: Callable[[torch.device | str], PreTrainedModel]) -> PreTrainedModel:
        if wanted(role, ppo.shard, ranks):
            return load_in_turn(partial(load, "cpu"), ranks, recipe.model.dtype)
        return load(device)

    def load(where: torch.device | str) -> PreTrainedModel:
        """A frozen base lies in the recipe's dtype; weights that are trained, and their reference, in float32."""
        model = load_policy(path, recipe.model.dtype if adapted else "float32", where)
        check_projection(model, path)
        disable_dropout(model)
        return model.eval()

    @cache
    def policy() -> PreTrainedModel:
        model = placed("policy", load)
        if adapted:
            add_adapter(model, POLICY, recipe.model.lora, seed=recipe.seed)
        return model

    rewards = load_rewards(stage, encoder, prompts, device, autocast, policy if ppo.sharing == "lora" else None)
    critic = _placed_critic(stage, partial(load_critic, stage, rewards, encoder, policy)).to(device)
    reference = policy() if adapted else placed("reference", load).requires_grad_(False)
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
        ranks=ranks,
        sharded=any(map(is_sharded, (policy(), reference, critic))),
    )


def _placed_critic(stage: Stage, load: Callable[[], Critic]) -> Critic:
    """The critic, its trunk sharded unless that is the policy's."""
    ppo = stage.recipe.ppo
    if ppo.critic == "shared" or ppo.sharing == "lora" or not wanted("critic", ppo.shard, stage.ranks):
        return load()
    made: list[Critic] = []

    def trunk() -> PreTrainedModel:
        made.append(load())
        return made[0].trunk

    load_in_turn(trunk, stage.ranks, stage.recipe.model.dtype)
    return made[0]


def _refuse_sharded_adapters(stage: Stage) -> None:
    ppo = stage.recipe.ppo
    if ppo.sharing != "full" and any(wanted(role, ppo.shard, stage.ranks) for role in ("policy", "reference")):
        raise UserError(
            f"ppo.shard names the policy or the reference, and under ppo.sharing: {ppo.sharing} both are one frozen "
            "base that carries adapters; that base is not sharded.",
            mend="Set ppo.shard: [rewards] (or [critic, rewards] under lora_policy), or ppo.sharing: full.",
        )


def save_roles(roles: Roles, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, out: Path, base: str) -> None:
    """Policy and critic as plain models in `out` and `out/critic`; an adapter also by itself, in `out/adapter`.

    `base` is the path of the policy's start, for the adapter's configuration.
    """
    dtype, ranks = recipe.model.dtype, roles.ranks
    save_policy(roles.policy, tokenizer, out, dtype, adapter_over=base if roles.adapted else None, ranks=ranks)
    save_model(cast(roles.critic.classifier(ranks), dtype), tokenizer, out / "critic", ranks=ranks)


def memory_by_role(roles: Roles) -> dict[str, dict[str, float]]:
    """MiB of each role: its own `weights`, and `training`, the gradients and Adam's two moments of what it trains.

    What several roles share is counted once, as `base` under `sharing: lora`; of sharded models this rank's part.
    """
    seen: set[int] = set()
    trained = {"policy": roles.trainable(), "critic": roles.critic.trainable()}
    table: dict[str, dict[str, float]] = {}
    for role, parameters in _weights_by_role(roles).items():
        new = {p.data_ptr(): p for p in map(own_part, parameters) if p.data_ptr() not in seen}
        seen |= new.keys()
        training = sum(3 * p.numel() * p.element_size() for p in map(own_part, trained.get(role, ())))
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


def sharded_models(roles: Roles) -> list[str]:
    """The models that lie in parts on the ranks."""
    own = {"policy": roles.policy, "critic": roles.critic} | ({} if roles.adapted else {"reference": roles.reference})
    rewards = {f"reward {n}": s.model for n, s in roles.rewards.sources.items() if isinstance(s, ModelReward)}
    return [name for name, model in (own | rewards).items() if is_sharded(model)]


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
