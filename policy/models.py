"""The only `from_pretrained` of the policy packages: policies, the frozen reference and the value model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline.errors import UserError
from policy.tensors import TokenScores, logprobs_from_hidden, position_ids, shifted_response_hidden
from reward_model.score import HEAD_NAMES, Normalisation, backbone_and_head, load_reward_model
from rollout.batch import RolloutBatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROBE_TOLERANCE = 1e-2
AFFINE = "value_mean_and_std"
"""Key of a critic's configuration under which `ValueModel` keeps its affine map."""


def cast(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """The same model with its weights in `dtype`, a recipe's name of one."""
    nn.Module.to(model, DTYPES[dtype])
    return model


def load_policy(path: str | Path, dtype: str, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A causal language model in `dtype` on `device`.

    Errors:
        UserError: `path` holds no causal language model.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype])
    except (OSError, ValueError) as error:
        raise UserError(
            f"no causal language model could be loaded from {path}: {error}",
            mend="Check the path or hub id, and that the directory holds config.json and weights.",
        ) from error
    nn.Module.to(model, device)
    return model


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0, so that a forward in training mode is deterministic.

    With dropout on, the first ratio of an update is not 1 (vwxyzjn/summarize_from_feedback_details, `disable_dropout`).
    Attention reads its probability as a plain attribute in transformers, so those are set too.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(vars(module).get("attention_dropout"), float):
            vars(module)["attention_dropout"] = 0.0


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Writes weights, configuration and tokenizer so that `from_pretrained(directory)` works as it is.

    The generation configuration names the special tokens only: sampling settings belong to the recipe.
    """
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def response_scores(
    model: PreTrainedModel, batch: RolloutBatch, temperature: float, *, with_entropy: bool = True
) -> TokenScores:
    """Log-probabilities and entropies [B,R] of the response tokens under `model` at `temperature`.

    Runs the trunk once and projects response positions only: [B,S,V] logits never exist.
    """
    hidden = _trunk(model, batch)
    hidden = shifted_response_hidden(hidden, batch.prompt_ids.shape[1], batch.response_ids.shape[1])
    mask = batch.response_mask
    head = output_head(model)
    scores = logprobs_from_hidden(
        hidden[mask],
        head.weight,
        batch.response_ids[mask],
        bias=head.bias,
        temperature=temperature,
        with_entropy=with_entropy,
    )
    empty = torch.zeros(mask.shape, dtype=scores.logprobs.dtype, device=mask.device)
    return TokenScores(empty.masked_scatter(mask, scores.logprobs), empty.masked_scatter(mask, scores.entropy))


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The vocabulary projection of a causal language model."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"{type(model).__name__} has no linear output head.", mend="Use an architecture with one, such as Llama."
        )
    return head


def check_projection(model: PreTrainedModel, path: str | Path) -> None:
    """Refuses models whose logits are not `hidden @ weight + bias` (soft-capped or scaled heads).

    Their log-probabilities would be wrong in `response_scores`; a probe of a few tokens tells.
    """
    ids = torch.arange(1, 9, device=model.device).unsqueeze(0) % model.config.vocab_size
    head = output_head(model)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits.float()
        got = head(model.base_model(input_ids=ids).last_hidden_state).float()
    if not torch.allclose(wanted, got, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE):
        raise UserError(
            f"ppo.policy: {path} ({type(model).__name__}) changes its logits after the output projection.",
            mend="Use an architecture with a plain output head, such as Llama, Qwen2, Mistral or GPT-NeoX.",
        )


class ValueModel(nn.Module):
    """The critic: a sequence classifier's trunk and scalar head, read before every response token.

    The outputs pass through the same affine map (score - mean) / std as the reward model's scores, so that a critic
    started from the reward model predicts normalised scores from the first update on. The configuration keeps the map,
    for a run that starts from the saved critic.
    """

    def __init__(self, model: PreTrainedModel, mean: float, std: float) -> None:
        super().__init__()
        self.model = model
        self.mean, self.std = mean, std
        model.config.update({AFFINE: [mean, std]})

    def forward(self, batch: RolloutBatch) -> Tensor:
        """Values [B,R], in float32 at least: entry t is the value of the state before response token t."""
        _, head = backbone_and_head(self.model)
        hidden = _trunk(self.model, batch)
        hidden = shifted_response_hidden(hidden, batch.prompt_ids.shape[1], batch.response_ids.shape[1])
        values = head(hidden).squeeze(-1)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return ((values - self.mean) / self.std) * batch.response_mask


def load_value_model(
    path: str | Path, dtype: str, *, mean: float, std: float, head: Literal["reward_model", "zero"]
) -> ValueModel:
    """A critic started from the sequence classifier with one output at `path`, its head kept or set to zero."""
    model = load_reward_model(path, DTYPES[dtype], "cpu")
    model.requires_grad_(True)
    if head == "zero":
        _zero_head(model)
        mean, std = 0.0, 1.0
    disable_dropout(model)
    return ValueModel(model, mean, std)


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
    return ValueModel(model, 0.0, 1.0)


def saved_affine(path: str | Path) -> Normalisation | None:
    """The map that a critic saved at `path` was trained behind; None for another classifier."""
    kept = AutoConfig.from_pretrained(path).to_dict().get(AFFINE)
    return None if kept is None else Normalisation(*kept)


def _zero_head(model: PreTrainedModel) -> None:
    for parameter in backbone_and_head(model)[1].parameters():
        nn.init.zeros_(parameter)


def _trunk(model: PreTrainedModel, batch: RolloutBatch) -> Tensor:
    mask = batch.attention_mask
    return model.base_model(
        input_ids=batch.input_ids, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False
    ).last_hidden_state
