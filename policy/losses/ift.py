"""Intuitive fine-tuning: target answers alone, each token weighed by the loss that it leads to.

One step: embed the ids with a frozen copy of the input embedding; without gradient, predict the
next tokens; mix their embeddings in (`further_tokens`, `temporal_residual`); score the TRUE tokens
from the mixture, with gradient; `ift_loss`.

Shapes: B sequences, T positions, D embedding dimensions; `mask` [B,T] is True on response tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from policy.tensors import at_least_float32, masked_reduce

SMALLEST_TOTAL = 1e-12


def further_tokens(
    predicted: Int[Tensor, "batch time"], ids: Int[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]
) -> Int[Tensor, "batch time"]:
    """The token that the model would have put at each response position, the given id elsewhere, [B,T].

    `predicted` at t is the argmax of the logits at t, thus the model's choice for t + 1. `mask` is
    True where `ids` are response tokens; position 0 keeps its id. Source: TsinghuaC3I/
    Intuitive-Fine-Tuning `trainers.py` `get_batch_metrics`.
    """
    chosen = torch.cat([ids[:, :1], predicted[:, :-1]], dim=1)
    return torch.where(mask, chosen, ids)


def temporal_residual(
    embedded: Float[Tensor, "batch time dim"], further: Float[Tensor, "batch time dim"], weight: float
) -> Float[Tensor, "batch time dim"]:
    """(1 - weight) * embedded + weight * further, [B,T,D]: embeddings of the ids and of the `further_tokens`.

    Usual weight (the paper's lambda): 0.2. Pitfall: both come from a copy of the input embedding
    that is frozen and copied anew after every optimiser step. Source: Hua et al. 2024
    (arXiv:2405.11870), temporal residual connection.
    """
    return (1 - weight) * embedded + weight * further


def residual_weight(base: float, noise: float, standard_normal_draw: float) -> float:
    """The noisy lambda of a step: base + noise * draw * base, bounded to [0, 1]; `noise` 0 leaves `base`.

    Usual value: noise 0.5. Source: Intuitive-Fine-Tuning `trainers.py` `update_lambda`.
    """
    return min(max(base + noise * standard_normal_draw * base, 0.0), 1.0)


def ift_weights(
    logprobs: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"], gamma: float
) -> Float[Tensor, "batch time"]:
    """W_t = n c_t / sum(c), [B,T]: n response tokens in the row, c_t = sum_{k >= t} gamma^(k - t) (-logprobs_k).

    The mean over a row's response tokens is 1; 0 elsewhere, and in a row without loss. `gamma` 0
    switches the weights off: 1 everywhere, which is not the limit of small gammas. The weights
    carry gradient. Raises ValueError for gamma outside [0, 1]. Source: Intuitive-Fine-Tuning
    `trainers.py` `get_cumsum_weight` (type loss, side left, norm L1).
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    losses = torch.where(mask, -at_least_float32(logprobs), 0.0)
    if gamma == 0:
        return torch.ones_like(losses)
    future, reach = losses, 1
    while reach < losses.shape[1]:  # `future` sums `reach` tokens; each pass doubles that
        future = future + gamma**reach * F.pad(future[:, reach:], (0, reach))
        reach *= 2
    future = torch.where(mask, future, 0.0)
    total = future.sum(-1, keepdim=True).clamp(min=SMALLEST_TOTAL)
    return mask.sum(-1, keepdim=True) * future / total


def ift_loss(
    logprobs: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    gamma: float,
    denominator: float | Tensor | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The IFT loss, a scalar, and the metric `logps` [B], the summed log-probabilities.

    Per sequence the mean over its response tokens of -logprobs_t W_t, with `ift_weights`; sum over
    the sequences / `denominator` (None: the sequences with a token). Raises ValueError for gamma outside [0, 1].

    Usual values: gamma 0.95, residual weight 0.2. Pitfalls: the code is followed, not the paper's
    eq. 21: early tokens weigh more, the loss is quadratic in the log-probabilities, and the
    gradient goes through the weights; gamma 0 without residual is plain SFT by sequence mean; the
    step costs two forwards. Sources: Hua et al. 2024 (arXiv:2405.11870), dynamic relation
    propagation; Intuitive-Fine-Tuning `trainers.py` `get_batch_metrics`.
    """
    losses = torch.where(mask, -at_least_float32(logprobs), 0.0)
    weighed = losses * ift_weights(logprobs, mask, gamma)
    metrics = {"logps": -losses.detach().sum(-1)}
    return masked_reduce(weighed, mask, "sequence_mean", denominator), metrics
