"""Load a reward model and score responses with it: one number per (prompt, response), read at the last token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.artifacts import Artifact
from pipeline.errors import UserError
from pipeline.sharding import through

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD_NAMES = ("score", "classifier")
"""Attributes under which transformers' *ForSequenceClassification classes keep their head."""


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Mean and standard deviation of a reward model's scores on samples of the SFT policy.

    Only score differences are identified by the ranking loss, so scores mean nothing before (s - mean) / std.
    Source: openai/lm-human-preferences, which fits gain and bias to the same end.
    """

    mean: float
    std: float

    def apply(self, scores: Tensor) -> Tensor:
        """(scores - mean) / std, in the shape of `scores`."""
        return (scores - self.mean) / self.std


def read_normalisation(artifact: Artifact) -> Normalisation:
    """The normalisation in a reward model's manifest.

    Raises UserError when the manifest has none, or a mean or standard deviation that no score can be divided by.
    """
    entry = artifact.manifest.get("normalisation")
    if entry is None:
        raise UserError(
            f"{artifact.path}: no score normalisation is stored with this reward model, so its scores have no scale.",
            mend="Train it with `tristage rm`, which scores SFT samples and stores their mean and standard deviation.",
        )
    normalisation = Normalisation(mean=float(entry["mean"]), std=float(entry["std"]))
    if not (math.isfinite(normalisation.mean) and 0.0 < normalisation.std < math.inf):
        raise UserError(
            f"{artifact.path}: manifest.json stores normalisation mean {normalisation.mean} and std "
            f"{normalisation.std}; the mean must be finite, the std finite and above zero.",
            mend="Train the reward model again.",
        )
    return normalisation


def load_reward_model(path: str | Path, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """A sequence classifier with one output from a directory or hub id, in eval mode and without dropout.

    Raises UserError when it cannot be loaded, has another number of outputs, or stores no head.
    """
    from transformers import AutoModelForSequenceClassification

    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            str(path), dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: no reward model could be loaded from here ({reason}).",
            mend="Give the directory of an `rm` stage or of a sequence classifier with one output.",
        ) from error
    if model.config.num_labels != 1 or report["missing_keys"]:
        lacks = ", ".join(sorted(report["missing_keys"])) or "none"
        raise UserError(
            f"{path}: not a reward model: {model.config.num_labels} outputs, weights missing from it: {lacks}.",
            mend="Give a sequence classifier with num_labels = 1 whose head was trained and saved.",
        )
    backbone_and_head(model)
    disable_dropout(model)
    return model.to(device).eval()


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to zero, in training mode too.

    Attention of transformers reads `attention_dropout` as a plain number, so that is set as well.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(vars(module).get("attention_dropout"), float):
            vars(module)["attention_dropout"] = 0.0


def backbone_and_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Linear]:
    """The transformer body and the linear head of any `*ForSequenceClassification`.

    `head(backbone(input_ids, attention_mask=...).last_hidden_state)` is the score, or value, at every position.
    Raises UserError naming the architecture when its head is not one linear layer.
    """
    modules = dict(model.named_children())
    heads = [modules[name] for name in HEAD_NAMES if name in modules]
    body = modules.get(model.base_model_prefix)
    if body is None or len(heads) != 1 or not isinstance(heads[0], nn.Linear):
        raise UserError(
            f"{type(model).__name__}: expected a body named {model.base_model_prefix!r} and one linear head named "
            f"{' or '.join(HEAD_NAMES)}, found {', '.join(modules)}.",
            mend="Use a causal architecture whose sequence classifier is body + linear head (Llama, Qwen, GPT-2 ...).",
        )
    return body, heads[0]


def read_head(directory: Path) -> nn.Linear:
    """The head of the sequence classifier saved in `directory`, in float32, without the rest of the model."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            found |= {k: weights.get_tensor(k).float() for k in weights.keys() if k.partition(".")[0] in HEAD_NAMES}  # noqa: SIM118
    state = {key.partition(".")[2]: tensor for key, tensor in found.items()}
    if "weight" not in state:
        raise UserError(
            f"{directory}: its weights hold no head named {' or '.join(HEAD_NAMES)}.",
            mend="Give the directory of an `rm` stage.",
        )
    head = nn.Linear(state["weight"].shape[1], state["weight"].shape[0], bias="bias" in state)
    head.load_state_dict(state)
    return head.requires_grad_(False)


@torch.no_grad()
def score_responses(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
    *,
    max_tokens: int = 16384,
    forwards: Callable[[int], int] = int,
) -> Tensor:
    """`score_with` the backbone and the head of a sequence classifier, which may be sharded.

    `forwards` says for the number of forwards that this rank needs how many all ranks run.
    """
    backbone, head = backbone_and_head(model)
    return score_with(backbone, head, prompt_ids, response_ids, max_tokens=max_tokens, owner=model, forwards=forwards)


@torch.no_grad()
def score_with(
    backbone: nn.Module,
    head: nn.Linear,
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
    *,
    max_tokens: int = 16384,
    owner: nn.Module | None = None,
    forwards: Callable[[int], int] = int,
) -> Tensor:
    """Raw scores [B], float32 on the CPU, each read at the last token of prompt + response.

    Sequences are sorted by length and right-padded in batches of at most `max_tokens` padded tokens (a longer one
    goes alone), which never changes a score. The last token is found by length, not by looking for padding, so a
    response may hold the padding token. Raises ValueError for an empty response.
    Source: vwxyzjn/summarize_from_feedback_details, `get_reward` (position of the score).
    """
    rows = [[*prompt, *answer] for prompt, answer in zip(prompt_ids, response_ids, strict=True)]
    empty = [index for index, answer in enumerate(response_ids) if not len(answer)]
    if empty:
        raise ValueError(f"response {empty[0]} has no tokens; a score is read at its last one")
    device = head.weight.device

    def forward(chosen: Sequence[Sequence[int]]) -> Tensor:
        input_ids, attention_mask = right_pad(chosen)
        last = attention_mask.sum(dim=1) - 1
        hidden = backbone(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            use_cache=False,
        ).last_hidden_state
        at_last = hidden[torch.arange(len(chosen), device=hidden.device), last.to(hidden.device)]
        return head(at_last).squeeze(-1)

    scores = torch.empty(len(rows), dtype=torch.float32)
    batches = list(token_batches([len(row) for row in rows], max_tokens))
    idle = forwards(len(batches)) - len(batches)
    module = backbone if owner is None else owner
    for batch in batches:
        scores[batch] = through(module, module, forward, [rows[index] for index in batch]).float().cpu()
    for _ in range(idle):
        through(module, module, forward, [[0]])
    return scores


def token_batches(lengths: Sequence[int], max_tokens: int, enough: int | None = None) -> Iterator[list[int]]:
    """Indices in batches of similar length: batch size x longest length <= `max_tokens`, longest first.

    A single sequence over the limit is a batch of its own. A batch of `enough` tokens also ends before a sequence
    shorter than 7/8 of its longest.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        full = batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens
        padded = batch and enough is not None and len(batch) * lengths[batch[0]] >= enough
        if full or (padded and 8 * lengths[index] < 7 * lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def right_pad(rows: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask` [B, longest], int64, padded with `pad_id` on the right."""
    longest = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row)
        attention_mask[index, : len(row)] = 1
    return input_ids, attention_mask
