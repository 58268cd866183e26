"""Masked reductions, padding and token log-probabilities: tensors in, tensors out.

Masks are boolean and True on the entries that count. What stands outside a mask never reaches a
result or a gradient, not even when it is NaN or infinite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Reduction = Literal["token_mean", "sequence_mean", "fixed_length"]


def masked_sum(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Sum of `x` over the True entries of `mask`, a scalar."""
    return torch.where(mask, x, 0.0).sum()


def masked_mean(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    denominator: float | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Sum of `x` over the mask divided by `denominator`, a scalar.

    `denominator` None means the number of True entries, at least 1 (so an empty mask gives 0). A
    given denominator is used as it is: the count of the whole optimiser step, so that the results
    of its micro-batches add up to the mean of the step. A number <= 0 raises ValueError.
    """
    if denominator is None:
        return masked_sum(x, mask) / mask.sum().clamp(min=1)
    if not isinstance(denominator, Tensor) and not denominator > 0:
        raise ValueError(f"denominator must be a positive count, got {denominator}")
    return masked_sum(x, mask) / denominator


def masked_var(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], unbiased: bool = False) -> Float[Tensor, ""]:
    """Variance of `x` over the mask: sum((x - mean)^2) / n, or / (n - 1) when `unbiased`.

    The divisor is at least 1, so that 0 and 1 entries have variance 0.
    """
    centred = torch.where(mask, x, 0.0) - masked_mean(x, mask)
    n = mask.sum()
    return masked_sum(centred.square(), mask) / (n - 1 if unbiased else n).clamp(min=1)


def masked_whiten(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    shift_mean: bool = True,
    unbiased: bool = False,
    eps: float = 1e-8,
) -> Float[Tensor, "*shape"]:
    """(x - mean) / sqrt(var + eps) over the mask, plus the mean again without `shift_mean`.

    Zero outside the mask. Defined for any count: one entry whitens to 0 (to itself without
    `shift_mean`), none at all to zeros. `shift_mean=False` rescales without moving the mean (for
    rewards). Sources: openai/lm-human-preferences `whiten` (population variance, the default
    here); trl `masked_whiten` (`unbiased=True`).
    """
    x = torch.where(mask, x, 0.0)
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_var(x, mask, unbiased) + eps)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)


def masked_reduce(
    x: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    reduction: Reduction = "token_mean",
    denominator: float | Tensor | None = None,
) -> Float[Tensor, ""]:
    """One loss value from per-token values [B,T], by a named reduction.

    `token_mean`: sum over tokens / number of tokens. `sequence_mean`: sum over sequences of the
    mean over the sequence's tokens / number of sequences that have a token. `fixed_length`: sum
    over tokens / (T * number of sequences that have a token), which weighs every token alike
    whatever the lengths (Dr. GRPO, arXiv:2503.20783, section 3.1). `denominator` replaces that
    divisor (by the one of a whole optimiser step).
    """
    if reduction == "fixed_length":
        if denominator is None:
            denominator = (x.shape[-1] * mask.any(-1).sum()).clamp(min=1)
        return masked_mean(x, mask, denominator)
    if reduction == "token_mean":
        return masked_mean(x, mask, denominator)
    if reduction == "sequence_mean":
        counts = mask.sum(-1)
        per_sequence = torch.where(mask, x, 0.0).sum(-1) / counts.clamp(min=1)
        return masked_mean(per_sequence, counts > 0, denominator)
    raise ValueError(f"reduction must be token_mean, sequence_mean or fixed_length, got {reduction!r}")


def left_aligned(ids: Int[Tensor, "batch total"], mask: Bool[Tensor, "batch total"]) -> Int[Tensor, "batch width"]:
    """The real tokens of every row from its first column on, [B,W], W those of the longest row.

    `mask` is True on one unbroken stretch of each row. What follows a row's tokens is arbitrary ids of the row: causal
    attention never looks there, so that neither a mask nor position ids are needed.
    """
    counts = mask.sum(1)
    columns = torch.arange(int(counts.max()), device=ids.device)
    first = mask.int().argmax(1, keepdim=True)
    return ids.gather(1, (first + columns).clamp(max=ids.shape[1] - 1))


def _pad(
    rows: Sequence[Sequence[int]], pad_id: int, *, left: bool
) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    if not rows:
        raise ValueError("cannot pad an empty list of rows")
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        start = width - len(row) if left else 0
        ids[i, start : start + len(row)] = torch.tensor(list(row), dtype=torch.long)
        mask[i, start : start + len(row)] = True
    return ids, mask


def left_pad(
    rows: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """Ids [B,P] (long) and mask [B,P] (bool, True on real tokens), padding before the tokens.

    The mask comes from the lengths, so a real token equal to `pad_id` stays real. Raises
    ValueError when there are no rows.
    """
    return _pad(rows, pad_id, left=True)


def right_pad(
    rows: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """Ids [B,R] (long) and mask [B,R] (bool, True on real tokens), padding after the tokens.

    The mask comes from the lengths, so a real token equal to `pad_id` stays real. Raises
    ValueError when there are no rows.
    """
    return _pad(rows, pad_id, left=False)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")


def at_least_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`x` in float32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def logprobs_from_logits(
    logits: Float[Tensor, "*shape vocab"], ids: Int[Tensor, "*shape"], temperature: float = 1.0
) -> Float[Tensor, "*shape"]:
    """log softmax(logits / temperature) at `ids`, in nats: the gathered logit minus logsumexp.

    Computed and returned in float32 (float64 for float64 logits). The caller aligns the two:
    the logits at position t - 1 belong to the token at t.
    """
    _check_temperature(temperature)
    scaled = at_least_float32(logits) / temperature
    return scaled.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


class TokenScores(NamedTuple):
    """What a policy says of N tokens.

    `logprobs` [N]: log-probability of the token, nats. `entropy` [N]: entropy of the distribution
    it was drawn from, nats.
    """

    logprobs: Tensor
    entropy: Tensor


class _Options(NamedTuple):
    temperature: float
    chunk_size: int
    with_entropy: bool
    dtype: torch.dtype


class _ChunkedTokenScores(torch.autograd.Function):
    """Log-probability and entropy per row, with the logits of one chunk alive at a time.

    z = (hidden W^T + b) / T, p = softmax(z), logprob = z_y - logsumexp(z), H = -sum p log p;
    d logprob/dz = onehot(y) - p and dH/dz = -p (log p + H). The backward pass makes z again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor]:
        temperature, chunk_size, with_entropy, dtype = options
        kind = torch.promote_types(dtype, torch.float32)
        logprobs = hidden.new_empty(len(hidden), dtype=kind)
        entropy = hidden.new_full((len(hidden),), float("nan"), dtype=kind)
        matrix = weight.to(dtype)
        for rows in _chunks(len(hidden), chunk_size):
            logp = _chunk_logp(hidden[rows].to(dtype), matrix, bias, temperature)
            logprobs[rows] = logp.gather(-1, ids[rows, None]).squeeze(-1)
            if with_entropy:
                entropy[rows] = -_p_logp(logp.exp(), logp).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.options = options
        ctx.set_materialize_grads(False)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator is untyped)
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = grad_outputs
        hidden, weight, bias, ids = ctx.saved_tensors
        temperature, chunk_size, _, dtype = ctx.options
        if grad_logprobs is None:
            grad_logprobs = torch.zeros(len(hidden), dtype=torch.promote_types(dtype, torch.float32), device=ids.device)
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        matrix = weight.to(dtype)
        d_hidden = torch.empty_like(hidden) if want_hidden else None
        accumulate = torch.promote_types(weight.dtype, torch.float32)
        d_weight = torch.zeros_like(weight, dtype=accumulate) if want_weight else None
        d_bias = torch.zeros_like(bias, dtype=accumulate) if want_bias else None
        for rows in _chunks(len(hidden), chunk_size):
            h = hidden[rows].to(dtype)
            logp = _chunk_logp(h, matrix, bias, temperature)
            p = logp.exp()
            slope = -grad_logprobs[rows, None] * p
            if grad_entropy is not None:
                p_logp = _p_logp(p, logp)
                slope -= grad_entropy[rows, None] * (p_logp - p * p_logp.sum(-1, keepdim=True))
            slope.scatter_add_(-1, ids[rows, None], grad_logprobs[rows, None])
            slope /= temperature
            if d_bias is not None:
                d_bias += slope.sum(0).to(accumulate)
            slope = slope.to(dtype)
            if d_hidden is not None:
                d_hidden[rows] = (slope @ matrix).to(d_hidden.dtype)
            if d_weight is not None:
                d_weight += (slope.t() @ h).to(accumulate)
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None


def _chunks(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _p_logp(p: Tensor, logp: Tensor) -> Tensor:
    return torch.where(p == 0, 0.0, p * logp)


def _chunk_logp(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = at_least_float32(hidden @ weight.t())
    if bias is not None:
        logits = logits + bias
    return torch.log_softmax(logits / temperature, dim=-1)


def logprobs_from_hidden(
    hidden: Float[Tensor, "rows dim"],
    weight: Float[Tensor, "vocab dim"],
    ids: Int[Tensor, " rows"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    with_entropy: bool = True,
) -> TokenScores:
    """Log-probabilities of `ids` and entropies from hidden states, never holding all logits.

    log softmax((hidden weight^T + bias) / temperature) at `ids` [N], and the entropy of that
    distribution, both in float32 (float64 for float64 input), nats. Rows go through the output
    matrix `chunk_size` at a time, in the forward and again in the backward pass, so at most
    [chunk_size, V] logits exist. Gradients into `hidden`, `weight` and `bias` are exact, of both
    results; second derivatives are not available. The matrix product runs in the autocast dtype
    where autocast is on, else in the wider dtype of `hidden` and `weight`. `with_entropy=False`
    skips the entropy and fills it with NaN. Raises ValueError for temperature <= 0 or
    chunk_size < 1.
    """
    _check_temperature(temperature)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        options = _Options(temperature, chunk_size, with_entropy, dtype)
        logprobs, entropy = _ChunkedTokenScores.apply(hidden, weight, bias, ids, options)
    return TokenScores(logprobs, entropy)


def shifted_response_hidden(
    hidden: Float[Tensor, "batch width dim"], prompt_lengths: Int[Tensor, " batch"], response_length: int
) -> Float[Tensor, "batch response dim"]:
    """The hidden states [B,R,D] that predict R response tokens, from those [B,W,D] of left-aligned rows.

    Position t - 1 predicts token t, so these are positions P - 1 .. P + R - 2 of a row with a prompt of P tokens; past
    the row's end, where no response token is, the last one again. Raises ValueError when a prompt is empty.
    """
    if not (prompt_lengths > 0).all():
        raise ValueError("a response needs at least one prompt position before it")
    columns = torch.arange(response_length, device=hidden.device)
    positions = (prompt_lengths[:, None] - 1 + columns).clamp(max=hidden.shape[1] - 1)
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
