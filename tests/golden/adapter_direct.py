"""The golden functions of the direct-preference methods; see `tests.golden.adapter`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from policy.losses.contrast_sft import TEMPLATES
from policy.losses.dpo import dpo_loss
from policy.losses.ift import further_tokens, ift_loss, ift_weights, temporal_residual
from policy.losses.ipo import ipo_loss
from policy.losses.kto import kto_loss, kto_reference_point, mismatched
from policy.losses.orpo import orpo_loss
from policy.losses.pairs import PairLogprobs
from policy.losses.simpo import simpo_loss
from policy.tensors import logprobs_from_logits, masked_reduce

IGNORED = -100


def _pairs(
    chosen: Tensor,
    rejected: Tensor,
    lengths: tuple[Tensor | None, Tensor | None] = (None, None),
    reference: tuple[Tensor | None, Tensor | None] = (None, None),
) -> PairLogprobs:
    """Pairs of sums; without lengths every response has one token, so that sums are averages."""
    one = torch.ones(len(chosen), dtype=torch.long)
    tokens = [one if length is None else length.long() for length in lengths]
    return PairLogprobs(chosen, rejected, tokens[0], tokens[1], *reference)


def _losses(of_one: Callable[[slice], Tensor], n: int) -> Tensor:
    """The loss of every row, each alone in its batch."""
    return torch.stack([of_one(slice(i, i + 1)) for i in range(n)])


def _rewards(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        "chosen_rewards": metrics["rewards/chosen"],
        "rejected_rewards": metrics["rewards/rejected"],
        "margins": metrics["rewards/margins"],
        "accuracy": metrics["rewards/accuracies"].mean(),
    }


def dpo(  # noqa: PLR0913 - the names are those of the file
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    kind: Any = "sigmoid",
    len_c: Tensor | None = None,
    len_r: Tensor | None = None,
) -> Mapping[str, Any]:
    def loss_of(rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        lengths = (None, None) if len_c is None or len_r is None else (len_c[rows], len_r[rows])
        reference = (ref_chosen[rows], ref_rejected[rows])
        batch = _pairs(policy_chosen[rows], policy_rejected[rows], lengths, reference)
        if kind.startswith("ipo"):
            return ipo_loss(batch, beta=beta, length_normalize=kind == "ipo_avg")
        return dpo_loss(batch, beta=beta, label_smoothing=label_smoothing, variant=kind)

    n = len(policy_chosen)
    loss, metrics = loss_of(slice(n))
    return {"loss": loss, "losses": _losses(lambda rows: loss_of(rows)[0], n), **_rewards(metrics)}


def simpo(  # noqa: PLR0913 - the names are those of the file
    avg_chosen: Tensor,
    avg_rejected: Tensor,
    beta: float,
    gamma_beta_ratio: float,
    label_smoothing: float = 0.0,
    kind: Any = "sigmoid",
    sft_weight: float = 0.0,
    sft_nll: float | None = None,
) -> Mapping[str, Any]:
    def loss_of(rows: slice, sft_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        return simpo_loss(
            _pairs(avg_chosen[rows], avg_rejected[rows]),
            beta=beta,
            gamma_beta_ratio=gamma_beta_ratio,
            label_smoothing=label_smoothing,
            variant=kind,
            sft_weight=sft_weight,
            chosen_nll=None if sft_nll is None else torch.tensor(sft_nll, dtype=torch.float64),
        )

    n = len(avg_chosen)
    loss, metrics = loss_of(slice(n), sft_weight)
    return {"loss": loss, "losses": _losses(lambda rows: loss_of(rows, 0.0)[0], n), **_rewards(metrics)}


def orpo(avg_chosen: Tensor, avg_rejected: Tensor, nll: float, lam: float) -> Mapping[str, Any]:
    chosen_nll = torch.tensor(nll, dtype=torch.float64)
    loss, metrics = orpo_loss(_pairs(avg_chosen, avg_rejected), beta=lam, chosen_nll=chosen_nll)
    return {"loss": loss, "log_odds": metrics["log_odds_chosen"], "ratio": metrics["log_odds_ratio"]}


def kto(  # noqa: PLR0913 - the names are those of the file
    policy: Tensor,
    ref: Tensor,
    label: Tensor,
    policy_kl: Tensor,
    ref_kl: Tensor,
    beta: float,
    wd: float,
    wu: float,
    z_how: str,
) -> Mapping[str, Any]:
    # HALOs divides by the number of non-zero rows, which is a denominator like any other.
    denominator = (policy_kl != 0).sum() if z_how == "nonzero" else None
    z = kto_reference_point(policy_kl, ref_kl, denominator)

    def loss_of(rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        return kto_loss(
            policy[rows],
            ref[rows],
            label.bool()[rows],
            z,
            beta=beta,
            desirable_weight=wd,
            undesirable_weight=wu,
        )

    loss, metrics = loss_of(slice(len(policy)))
    # A zero times policy_kl gives it a gradient to compare, 0 if the reference point has none.
    loss = loss + 0.0 * policy_kl.sum()
    losses = _losses(lambda rows: loss_of(rows)[0], len(policy))
    rewards = torch.empty_like(losses)
    for side, rows in (("chosen", label.bool()), ("rejected", ~label.bool())):
        rewards[rows] = metrics[f"rewards/{side}"].to(rewards.dtype)
    return {"loss": loss, "losses": losses, "rewards": rewards, "z_ref": z}


def mismatch_index(n: int) -> Mapping[str, Any]:
    # trl shifts the other way round, which is the inverse permutation.
    return {"halos": mismatched(n), "trl": mismatched(n).argsort()}


def ift(logps: Tensor, mask: Tensor, gamma: float = 0.95, ptype: str = "loss") -> Mapping[str, Any]:
    # Types loss and logps differ by a factor per sequence, which the norm takes out again.
    assert ptype in ("loss", "logps")
    loss, _ = ift_loss(logps, mask.bool(), gamma=gamma)
    return {"loss": loss, "weight": ift_weights(logps, mask.bool(), gamma)}


def ift_step(  # noqa: PLR0913 - the names are those of the file
    E: Tensor, W1: Tensor, b1: Tensor, W2: Tensor, ids: Tensor, labels: Tensor, lam: float, gamma: float
) -> Mapping[str, Any]:
    def logits(embedded: Tensor) -> Tensor:
        """The file's toy model: the mean of the embeddings so far, then two layers."""
        seen = torch.arange(1, embedded.shape[1] + 1)
        mean = embedded.cumsum(1) / seen[:, None]
        return torch.tanh(mean @ W1 + b1) @ W2

    ids, mask = ids.long(), labels.long() != IGNORED
    embedded = E[ids]
    further = further_tokens(logits(embedded).argmax(-1), ids, mask)
    fused = temporal_residual(embedded, E[further], lam)
    plain, mixed = (logprobs_from_logits(logits(x)[:, :-1], ids[:, 1:]) for x in (embedded, fused))
    mask = mask[:, 1:]
    return {
        "tokens_further": further,
        "fused": fused,
        "token_logps": mixed.where(mask, 0.0),
        "sft_loss": masked_reduce(-plain, mask, "sequence_mean"),
        "further_loss": masked_reduce(-mixed, mask, "sequence_mean"),
        "loss": ift_loss(mixed, mask, gamma=gamma)[0],
    }


def contrast_text(instruction: str, question: str, negative: str, positive: str) -> Mapping[str, Any]:
    prompt = TEMPLATES["chinese"].training_prompt(instruction, question, negative)
    return {"prompt": prompt, "target": positive, "text": prompt + positive, "loss_char_start": len(prompt)}


DIRECT: dict[str, Callable[..., Mapping[str, Any]]] = {
    "dpo": dpo,
    "simpo": simpo,
    "orpo": orpo,
    "kto": kto,
    "mismatch_index": mismatch_index,
    "ift_loss": ift,
    "ift_step": ift_step,
    "contrast_text": contrast_text,
}
_NORM = "IFT has the code's default norm alone, L1"
_SIDE = "IFT has the code's default side alone, left: the sum over the future"
# Cases of these functions that the project has no option for, and why.
UNBOUND = {
    "ift_normL2": _NORM,
    "ift_normlog": _NORM,
    "ift_normsoftmax": "IFT's norm softmax cannot train: its gradient breaks in the code",
    "ift_ptypemask": "IFT has the code's default propagation alone, that of the losses",
    "ift_sideright": _SIDE,
    "ift_sideright_normL2": _SIDE,
    "ift_sideright_normlog": _SIDE,
    "ift_sideright_gamma1.0": _SIDE,
    "ift_default_detached_weight": "the code's weights carry gradient; test_ift looks that ours do",
    "ift_paper_eq21": "the paper's equation; the code, which was measured, does something else",
    "ift_lambda": "there is no schedule of lambda; test_ift has the disturbed and the bounded value",
}
