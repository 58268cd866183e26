"""Policies and the frozen reference: loaded, saved, and asked for the log-probabilities of responses."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline.adapters import FOLDER, merged_weights, save_adapter
from pipeline.errors import UserError
from pipeline.ranks import ALONE, Ranks
from pipeline.sharding import is_sharded, own_part, through, whole
from policy.tensors import TokenScores, left_aligned, logprobs_from_hidden, shifted_response_hidden
from rollout.batch import RolloutBatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
POLICY = "policy"
"""Name of the policy's adapter."""
PROBE_TOLERANCE = 1e-2


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


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    weights: Iterable[tuple[str, Tensor]] | None = None,
    *,
    ranks: Ranks = ALONE,
) -> None:
    """Writes weights, configuration and tokenizer so that `from_pretrained(directory)` works as it is.

    `weights` stand in for the model's own, as where an adapter was merged. The generation configuration names the
    special tokens only: sampling settings belong to the recipe. All ranks call it, and the first one writes; sharded
    weights are gathered in its main memory.
    """
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    state = None if weights is None else {name: tensor.cpu() for name, tensor in weights if ranks.is_main}
    if is_sharded(model):
        state = _whole_state(model, ranks)
    if ranks.is_main:
        model.save_pretrained(directory, state_dict=state)
        tokenizer.save_pretrained(directory)
    ranks.barrier()


def _whole_state(model: PreTrainedModel, ranks: Ranks) -> dict[str, Tensor]:
    """All weights of a sharded model in the first rank's main memory, tied ones once; none on the others."""
    state: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for name, part in model.state_dict().items():
        tied = seen.setdefault(own_part(part).data_ptr(), name)
        for _, tensor in whole([(name, part)]):
            if ranks.is_main:
                state[name] = state[tied] if tied in state else tensor.cpu()
    return state


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    dtype: str,
    *,
    adapter_over: str | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """A trained policy as a plain model in `dtype`.

    With `adapter_over`, the path of the policy's start, the adapter that was trained is merged, and also written by
    itself into `directory/adapter`.
    """
    if adapter_over is None:
        save_model(cast(model, dtype), tokenizer, directory, ranks=ranks)
    else:
        if ranks.is_main:
            save_adapter(model, POLICY, directory / FOLDER, base=adapter_over)
        save_model(model, tokenizer, directory, merged_weights(model, POLICY), ranks=ranks)


def response_scores(
    model: PreTrainedModel, batch: RolloutBatch, temperature: float, *, with_entropy: bool = True
) -> TokenScores:
    """Log-probabilities and entropies [B,R] of the response tokens under `model` at `temperature`.

    Runs the trunk once and projects response positions only: [B,S,V] logits never exist.
    """

    def forward() -> TokenScores:
        return token_scores(model, response_hidden(model, batch), batch, temperature, with_entropy=with_entropy)

    return through(model, model, forward)


def response_hidden(model: PreTrainedModel, batch: RolloutBatch) -> Tensor:
    """The trunk's last hidden states [B,R,D], each before the response token that it predicts.

    Rows are as wide as the longest prompt and response together, and attention is causal without a mask of its own.
    """
    ids = left_aligned(batch.input_ids, batch.attention_mask)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return shifted_response_hidden(hidden, batch.prompt_mask.sum(1), batch.response_ids.shape[1])


def token_scores(
    model: PreTrainedModel, hidden: Tensor, batch: RolloutBatch, temperature: float, *, with_entropy: bool = True
) -> TokenScores:
    """`response_scores` from the hidden states [B,R,D] that `response_hidden` gave."""
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
