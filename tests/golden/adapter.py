"""Maps each `fn` of a golden file to the function of the project that computes it.

A case holds `inputs` (lists and numbers), `params` and `expected`. An adapter takes the inputs,
their float arrays already float64 tensors, and the params as keywords, and returns a mapping with
at least the keys that `expected` may name. A function the project does not have is absent; single
cases that it has no option for are in UNBOUND, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from policy.ppo.controllers import AdaptiveKLController
from policy.ppo.maths import (
    PolicyLossOptions,
    gae,
    kl_estimate,
    policy_loss,
    token_rewards,
    value_loss,
)
from policy.tensors import (
    logprobs_from_hidden,
    logprobs_from_logits,
    masked_mean,
    masked_reduce,
    masked_whiten,
)
from reward_model.losses import (
    bradley_terry_loss,
    pairs_of_ranks,
    plackett_luce_loss,
    ranking_loss,
)
from tests.golden.adapter_direct import DIRECT, UNBOUND

__all__ = ["ADAPTERS", "AS_GIVEN", "UNBOUND"]

Adapter = Callable[..., Mapping[str, Any]]

IGNORED = -100
REDUCTIONS = {"token": "token_mean", "seq": "sequence_mean"}


def _shift(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at t beside the label at t + 1, and the mask of the labels that count."""
    labels = labels[:, 1:].long()
    mask = labels != IGNORED
    return logits[:, :-1], labels.where(mask, 0), mask


def sequence_logps(logits: Tensor, labels: Tensor) -> Mapping[str, Any]:
    logits, ids, mask = _shift(logits, labels)
    token_logps = logprobs_from_logits(logits, ids).where(mask, 0.0)
    flat = logits.flatten(0, 1)
    identity = torch.eye(flat.shape[1], dtype=flat.dtype)
    scores = logprobs_from_hidden(flat, identity, ids.flatten(), chunk_size=5)
    torch.testing.assert_close(scores.logprobs.view(mask.shape).where(mask, 0.0), token_logps)
    total, count = token_logps.sum(1), mask.sum(1)
    return {
        "token_logps": token_logps,
        "mask": mask,
        "count": count,
        "sum": total,
        "mean": total / count,
        "entropy": scores.entropy.view(mask.shape).where(mask, 0.0),
    }


def sft_token_mean(logits: Tensor, labels: Tensor) -> Mapping[str, Any]:
    logits, ids, mask = _shift(logits, labels)
    return {"loss": masked_reduce(-logprobs_from_logits(logits, ids), mask, "token_mean")}


def sft_sequence_mean(logits: Tensor, labels: Tensor) -> Mapping[str, Any]:
    logits, ids, mask = _shift(logits, labels)
    return {"loss": masked_reduce(-logprobs_from_logits(logits, ids), mask, "sequence_mean")}


def bt_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None, center: float | None = None) -> Mapping[str, Any]:
    loss, metrics = bradley_terry_loss(chosen, rejected, margin=margin, centering=center)
    return {"loss": loss, **metrics}


def _ranks(groups: list[list[int]]) -> Tensor:
    """Ranks [K] of answers given as groups of indices, best group first."""
    ranks = torch.zeros(sum(len(group) for group in groups), dtype=torch.long)
    for rank, group in enumerate(groups):
        ranks[torch.tensor(group)] = rank
    return ranks


def kwise_bt(scores: Tensor, groups: list[list[int]]) -> Mapping[str, Any]:
    ranks = _ranks(groups)
    loss, metrics = ranking_loss(scores[None], ranks[None], torch.ones(1, len(ranks)).bool())
    better, worse = pairs_of_ranks(ranks)
    return {"loss": loss, "pairs": torch.stack([better, worse], dim=1), **_without_pairs(metrics)}


def _without_pairs(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in metrics.items() if key != "pairs"}


def kwise_batch(scores: list[list[float]], groups: list[list[list[int]]], how: str) -> Mapping[str, Any]:
    width = max(len(row) for row in scores)
    padded = torch.full((len(scores), width), torch.nan, dtype=torch.float64)
    ranks = torch.zeros(len(scores), width, dtype=torch.long)
    for i, row in enumerate(scores):
        padded[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
        ranks[i, : len(row)] = _ranks(groups[i])
    assert how in ("prompt_mean", "pair_mean")
    return {"loss": ranking_loss(padded, ranks, ~padded.isnan(), reduction=how)[0]}


def plackett_luce(scores: Tensor, order: list[int]) -> Mapping[str, Any]:
    ranks = _ranks([[answer] for answer in order])[None]
    mask = torch.ones_like(ranks).bool()
    loss, _ = plackett_luce_loss(scores[None], ranks, mask)
    pair_loss, _ = ranking_loss(scores[None], ranks, mask)
    return {"loss": loss, "bt": pair_loss}


def best_of_k(scores: Tensor, best: int) -> Mapping[str, Any]:
    ranks = torch.ones_like(scores)
    ranks[best] = 0
    mask = torch.ones_like(scores).bool()
    return {"loss": plackett_luce_loss(scores[None], ranks[None], mask[None])[0]}


def kl_est(logp: Tensor, ref_logp: Tensor, kind: Any) -> Mapping[str, Any]:
    # The padding of this case is where both log-probabilities are zero.
    kl = kl_estimate(logp, ref_logp, kind)
    return {"kl": kl, "mean": masked_mean(kl, logp != 0)}


def shaped_rewards(
    score: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, kl_coef: float, kind: Any
) -> Mapping[str, Any]:
    rewards, kl = token_rewards(score, logp, ref_logp, mask.bool(), kl_coef, kind)
    return {"rewards": rewards, "kl": kl}


def gae_case(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Mapping[str, Any]:
    advantages, returns = gae(rewards, values, mask.bool(), gamma, lam)
    return {"advantages": advantages, "returns": returns}


def whiten(x: Tensor, mask: Tensor, unbiased: bool = False, shift_mean: bool = True) -> Mapping[str, Any]:
    whitened = masked_whiten(x, mask.bool(), unbiased=unbiased, shift_mean=shift_mean)
    return {"whitened": whitened}


def ppo_policy(  # noqa: PLR0913 - the names are those of the file
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    how: str = "token",
) -> Mapping[str, Any]:
    options = PolicyLossOptions(clip_low, clip_high, dual_clip, _reduction(how))
    loss, metrics = policy_loss(logp, old_logp, advantages, mask.bool(), options)
    k1 = masked_mean(kl_estimate(old_logp, logp, "k1"), mask.bool())
    return {
        "loss": loss,
        "clipfrac": metrics["clipfrac"],
        "approx_kl_k1": k1,
        "approx_kl_k2": metrics["approx_kl"],
    }


def ppo_value(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None = 0.2,
    how: str = "token",
) -> Mapping[str, Any]:
    loss, metrics = value_loss(
        values, old_values, returns, mask.bool(), cliprange_value=clip, reduction=_reduction(how)
    )
    return {"loss": loss, "clipfrac": metrics["clipfrac"]}


def _reduction(how: str) -> Any:
    return REDUCTIONS[how]


def adaptive_kl(steps: list[tuple[float, int]], value: float, target: float, horizon: float) -> Mapping[str, Any]:
    controller = AdaptiveKLController(value, target, horizon)
    values = []
    for kl, n in steps:
        controller.update(kl, int(n))
        values.append(controller.kl_coef)
    return {"values": values}


def distinct_n(seqs: list[list[int]]) -> Mapping[str, Any]:
    # The definition of the file: pooled over the corpus. Different n-grams of all sequences
    # together, over all n-grams of all sequences (no n-gram crosses a sequence border): the three
    # sequences hold 12 tokens of 4 kinds (4/12), 9 bigrams of 4 kinds, 6 trigrams of 4 kinds.
    # It is not the mean over sequences of per-sequence shares.
    from pipeline.evaluation.measures import distinct_n as measure

    return {f"distinct_{n}": measure(seqs, n) for n in (1, 2, 3)}


def wilson(k: int, n: int) -> Mapping[str, Any]:
    from pipeline.evaluation.measures import wilson_interval

    return {"interval": wilson_interval(k, n)}


ADAPTERS: dict[str, Adapter] = {
    "sequence_logps": sequence_logps,
    "sft_token_mean": sft_token_mean,
    "sft_sequence_mean": sft_sequence_mean,
    "bt_loss": bt_loss,
    "kwise_bt": kwise_bt,
    "kwise_batch": kwise_batch,
    "plackett_luce": plackett_luce,
    "best_of_k": best_of_k,
    "kl_est": kl_est,
    "shaped_rewards": shaped_rewards,
    "gae": gae_case,
    "whiten": whiten,
    "ppo_policy": ppo_policy,
    "ppo_value": ppo_value,
    "adaptive_kl": adaptive_kl,
    "distinct_n": distinct_n,
    "wilson": wilson,
    **DIRECT,
}
# Inputs that are lists of indices or of token ids, of uneven length, or counted pairs.
AS_GIVEN = {
    "kwise_bt": {"groups"},
    "kwise_batch": {"scores", "groups"},
    "plackett_luce": {"order"},
    "adaptive_kl": {"steps"},
    "distinct_n": {"seqs"},
}
