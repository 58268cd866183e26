"""Critics: a scalar head read before every response token, on a trunk of its own or on the policy's."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from pipeline.adapters import adapter_parameters, merged_weights, using
from pipeline.errors import UserError
from pipeline.ranks import ALONE, Ranks
from pipeline.sharding import through, whole
from policy.models import DTYPES, POLICY, disable_dropout, response_hidden
from reward_model.score import HEAD_NAMES, Normalisation, backbone_and_head, load_reward_model
from rollout.batch import RolloutBatch

AFFINE = "value_mean_and_std"
"""Key of a critic's configuration under which its affine map is kept."""
PLAIN = Normalisation(mean=0.0, std=1.0)


class Critic(nn.Module, ABC):
    """Values of the states before every response token: a scalar head on the last hidden states.

    The outputs pass through the same affine map (score - mean) / std as the reward model's scores, so that a critic
    started from the reward model predicts normalised scores from the first update on. The configuration of a saved
    critic keeps the map, for a run that starts from it.

    Attributes:
        on_policy: the hidden states are the policy's own, and one forward serves both.
    """

    on_policy = False

    def __init__(self, head: nn.Linear, affine: Normalisation) -> None:
        super().__init__()
        self.head, self.affine = head, affine

    def forward(self, batch: RolloutBatch) -> Tensor:
        """Values [B,R], in float32 at least: entry t is the value of the state before response token t."""
        with self.acting():
            return through(self.trunk, self.trunk, lambda: self.values(response_hidden(self.trunk, batch), batch))

    def values(self, hidden: Tensor, batch: RolloutBatch) -> Tensor:
        """Values [B,R] from the hidden states [B,R,D] before the response tokens."""
        values = self.head(hidden).squeeze(-1)
        return self.affine.apply(values.to(torch.promote_types(values.dtype, torch.float32))) * batch.response_mask

    @property
    @abstractmethod
    def trunk(self) -> PreTrainedModel:
        """The model whose `base_model` gives the hidden states."""

    def acting(self) -> AbstractContextManager[None]:
        """What the forward and the backward pass of the critic must stand in."""
        return nullcontext()

    def trainable(self) -> list[nn.Parameter]:
        """The weights that the critic's optimiser moves."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @abstractmethod
    def classifier(self, ranks: Ranks = ALONE) -> PreTrainedModel:
        """The critic as a sequence classifier with one output, to be saved; all ranks ask, the first gets it whole."""


class ValueModel(Critic):
    """A critic that is a sequence classifier of its own."""

    def __init__(self, model: PreTrainedModel, affine: Normalisation) -> None:
        super().__init__(backbone_and_head(model)[1], affine)
        self.model = model

    @property
    def trunk(self) -> PreTrainedModel:
        return self.model

    def classifier(self, ranks: Ranks = ALONE) -> PreTrainedModel:
        self.model.config.update({AFFINE: [self.affine.mean, self.affine.std]})
        return self.model


class ValueHead(Critic):
    """A critic on the policy's base: behind the adapter `adapter` of its own, or, without one, on the policy's trunk.

    The policy is no part of this module: its parameters and its state are the head's.
    """

    def __init__(self, policy: PreTrainedModel, head: nn.Linear, affine: Normalisation, adapter: str | None) -> None:
        super().__init__(head, affine)
        self._policy = (policy,)
        self.adapter = adapter
        self.on_policy = adapter is None

    @property
    def trunk(self) -> PreTrainedModel:
        return self._policy[0]

    def acting(self) -> AbstractContextManager[None]:
        return nullcontext() if self.adapter is None else using(self.trunk, self.adapter)

    def trainable(self) -> list[nn.Parameter]:
        head = list(self.head.parameters())
        return head if self.adapter is None else [*adapter_parameters(self.trunk, self.adapter), *head]

    def classifier(self, ranks: Ranks = ALONE) -> PreTrainedModel:
        config = copy.deepcopy(self.trunk.config)
        config.update({"num_labels": 1, AFFINE: [self.affine.mean, self.affine.std]})
        state: dict[str, Tensor] = {}
        for name, tensor in whole(merged_weights(self.trunk.base_model, self.adapter or POLICY)):
            state |= {name: tensor.cpu()} if ranks.is_main else {}
        with nullcontext() if ranks.is_main else torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        if ranks.is_main:
            body, head = backbone_and_head(model)
            body.load_state_dict(state)
            head.load_state_dict(self.head.state_dict())
        return model


def zero_head(policy: PreTrainedModel) -> nn.Linear:
    """A head for `policy`'s hidden states that gives 0 everywhere."""
    head = nn.Linear(policy.config.get_text_config().hidden_size, 1, bias=False, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    return head.to(policy.device)


def load_value_model(
    path: str | Path, dtype: str, affine: Normalisation, head: Literal["reward_model", "zero"]
) -> ValueModel:
    """A critic started from the sequence classifier with one output at `path`, its head kept or set to zero."""
    model = load_reward_model(path, DTYPES[dtype], "cpu")
    model.requires_grad_(True)
    if head == "zero":
        _zero_head(model)
        affine = PLAIN
    disable_dropout(model)
    return ValueModel(model, affine)


def load_value_model_of_policy(path: str | Path, dtype: str) -> ValueModel:
    """A critic with the trunk of the policy at `path` and a zero head, so that every value starts at 0.

    Errors:
        UserError: the architecture has no sequence classifier, or the trunk's weights are not in `path`.
    """
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype=DTYPES[dtype], output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"no critic could be made of the policy {path}: {error}",
            mend="Set ppo.critic to the directory of a sequence classifier with one output.",
        ) from error
    lost = sorted(key for key in report["missing_keys"] if key.partition(".")[0] not in HEAD_NAMES)
    if lost:
        raise UserError(
            f"{path}: its weights do not fit {type(model).__name__}; missing: {', '.join(lost[:4])}.",
            mend="Set ppo.critic to the directory of a sequence classifier with one output.",
        )
    _zero_head(model)
    disable_dropout(model)
    return ValueModel(model, PLAIN)


def saved_affine(path: str | Path) -> Normalisation | None:
    """The map that a critic saved at `path` was trained behind; None for another classifier."""
    kept = AutoConfig.from_pretrained(path).to_dict().get(AFFINE)
    return None if kept is None else Normalisation(*kept)


def _zero_head(model: PreTrainedModel) -> None:
    for parameter in backbone_and_head(model)[1].parameters():
        nn.init.zeros_(parameter)
