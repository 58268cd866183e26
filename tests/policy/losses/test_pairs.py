"""DPO, IPO, SimPO and ORPO: three pairs by hand, what they share, and their limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policy.losses.dpo import dpo_loss
from policy.losses.ipo import ipo_loss
from policy.losses.orpo import orpo_loss
from policy.losses.pairs import PairLogprobs, row_mean
from policy.losses.simpo import simpo_loss

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
LN2 = math.log(2)


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual.detach().double(), tensor(expected), rtol=tolerance, atol=tolerance)


def nll(margin: float) -> float:
    """-log sigmoid(margin)."""
    return math.log1p(math.exp(-margin))


def three() -> PairLogprobs:
    """Log-ratios 1, -2, 0 of the chosen and -1, 1, 0 of the rejected; averages -2, -3, -1.5 and -2, -2, -2."""
    return PairLogprobs(
        chosen=tensor([-4.0, -9.0, -6.0]).requires_grad_(),
        rejected=tensor([-10.0, -8.0, -6.0]).requires_grad_(),
        chosen_tokens=torch.tensor([2, 3, 4]),
        rejected_tokens=torch.tensor([5, 4, 3]),
        ref_chosen=tensor([-5.0, -7.0, -6.0]),
        ref_rejected=tensor([-9.0, -9.0, -6.0]),
    )


def test_dpo_by_hand() -> None:
    batch = three()
    loss, metrics = dpo_loss(batch, beta=0.5)
    close(loss, (nll(1) + nll(-1.5) + LN2) / 3)
    expected = {
        "rewards/chosen": [0.5, -1.0, 0.0],
        "rewards/rejected": [-0.5, 0.5, 0.0],
        "rewards/margins": [1.0, -1.5, 0.0],
        "rewards/accuracies": [1.0, 0.0, 0.0],
        "logps/chosen": [-4.0, -9.0, -6.0],
        "logps/rejected": [-10.0, -8.0, -6.0],
    }
    assert metrics.keys() == expected.keys()
    for name, values in expected.items():
        assert not metrics[name].requires_grad
        close(metrics[name], values)
    loss.backward()
    pull = [0.5 / (3 * (1 + math.exp(margin))) for margin in (1, -1.5, 0)]
    assert batch.chosen.grad is not None
    assert batch.rejected.grad is not None
    close(-batch.chosen.grad, pull)
    close(batch.rejected.grad, pull)


def test_dpo_variants_by_hand() -> None:
    loss, _ = dpo_loss(three(), beta=0.5, label_smoothing=0.2)
    close(loss, (0.8 * (nll(1) + nll(-1.5)) + 0.2 * (nll(-1) + nll(1.5)) + LN2) / 3)
    loss, _ = dpo_loss(three(), beta=0.5, label_smoothing=0.2, variant="robust")
    close(loss, ((0.8 * (nll(1) + nll(-1.5)) - 0.2 * (nll(-1) + nll(1.5))) / 0.6 + LN2) / 3)
    loss, _ = dpo_loss(three(), beta=1.0, variant="hinge")  # margins 2, -3 and 0
    close(loss, (0 + 4 + 1) / 3)


def test_ipo_by_hand_in_both_forms() -> None:
    # target 1 / (2 beta) = 1; per token 1/2 + 1/5, -2/3 - 1/4 and 0, per response 2, -3 and 0
    loss, metrics = ipo_loss(three(), beta=0.5)
    close(loss, ((0.7 - 1) ** 2 + (-11 / 12 - 1) ** 2 + 1) / 3)
    close(metrics["rewards/chosen"], [0.5, -1.0, 0.0])
    close(metrics["rewards/rejected"], [-0.5, 0.5, 0.0])
    loss, metrics = ipo_loss(three(), beta=0.5, length_normalize=False)
    close(loss, (1 + 16 + 1) / 3)
    close(metrics["rewards/margins"], [1.0, -1.5, 0.0])
    close(ipo_loss(three(), beta=0.25)[0], ((0.7 - 2) ** 2 + (-11 / 12 - 2) ** 2 + 4) / 3)


def test_simpo_by_hand() -> None:
    # margins of the averages 0, -1 and 0.5, less 0.25, times 2
    loss, metrics = simpo_loss(three(), beta=2.0, gamma_beta_ratio=0.25)
    close(loss, (nll(-0.5) + nll(-2.5) + nll(0.5)) / 3)
    close(metrics["rewards/chosen"], [-4.0, -6.0, -3.0])
    close(metrics["rewards/rejected"], [-4.0, -4.0, -4.0])
    close(metrics["rewards/accuracies"], [0.0, 0.0, 1.0])
    loss, _ = simpo_loss(three(), beta=2.0, gamma_beta_ratio=0.0, label_smoothing=0.1)
    close(loss, (LN2 + 0.9 * (nll(-2) + nll(1)) + 0.1 * (nll(2) + nll(-1))) / 3)
    loss, _ = simpo_loss(three(), beta=2.0, gamma_beta_ratio=0.25, variant="hinge")
    close(loss, (1.5 + 3.5 + 0.5) / 3)
    # margins of the sums 6, -1 and 0
    loss, metrics = simpo_loss(three(), beta=0.5, gamma_beta_ratio=1.0, length_normalize=False)
    close(loss, (nll(2.5) + nll(-1) + nll(-0.5)) / 3)
    close(metrics["rewards/chosen"], [-2.0, -4.5, -3.0])
    plain, _ = simpo_loss(three(), beta=2.0, gamma_beta_ratio=0.25, denominator=5)
    loss, _ = simpo_loss(
        three(), beta=2.0, gamma_beta_ratio=0.25, sft_weight=0.5, chosen_nll=tensor(3.0), denominator=5
    )
    close(loss - plain, 1.5)


def odds(average: float) -> float:
    return math.exp(average) / (1 - math.exp(average))


def test_orpo_by_hand() -> None:
    averages = [(-2.0, -2.0), (-3.0, -2.0), (-1.5, -2.0)]
    log_odds = [math.log(odds(c) / odds(r)) for c, r in averages]
    loss, metrics = orpo_loss(three(), beta=0.25, chosen_nll=tensor(1.5))
    close(loss, 1.5 + 0.25 * sum(nll(o) for o in log_odds) / 3)
    close(metrics["log_odds_chosen"], log_odds)
    close(metrics["log_odds_ratio"], [-nll(o) for o in log_odds])
    close(metrics["rewards/chosen"], [-0.5, -0.75, -0.375])
    close(metrics["rewards/rejected"], [-0.5, -0.5, -0.5])
    assert not any(value.requires_grad for value in metrics.values())
    loss, _ = orpo_loss(three(), beta=0.25, chosen_nll=tensor(0.0), denominator=6)
    close(loss, 0.25 * sum(nll(o) for o in log_odds) / 6)


def test_orpo_keeps_the_odds_of_near_certain_answers() -> None:
    """In float32 1 - exp(-1e-7) has no correct digit left; the odds are 1e7 to 9 digits or so."""
    one = torch.ones(2, dtype=torch.long)
    batch = PairLogprobs(torch.tensor([-1e-7, 0.0]), torch.tensor([-LN2, -LN2]), one, one)
    _, metrics = orpo_loss(batch, beta=0.1, chosen_nll=torch.tensor(0.0))
    close(metrics["log_odds_chosen"], [7 * math.log(10), 9 * math.log(10)], 1e-6)


NLL = tensor(1.5)
LOSSES: dict[str, Loss] = {
    "dpo": lambda batch, **given: dpo_loss(batch, beta=0.3, **given),
    "cdpo": lambda batch, **given: dpo_loss(batch, beta=0.3, label_smoothing=0.1, **given),
    "robust": lambda batch, **given: dpo_loss(batch, beta=0.3, label_smoothing=0.1, variant="robust", **given),
    "hinge": lambda batch, **given: dpo_loss(batch, beta=0.3, variant="hinge", **given),
    "ipo": lambda batch, **given: ipo_loss(batch, beta=0.3, **given),
    "ipo_sum": lambda batch, **given: ipo_loss(batch, beta=0.3, length_normalize=False, **given),
    "simpo": lambda batch, **given: simpo_loss(batch, beta=2.0, gamma_beta_ratio=0.3, label_smoothing=0.1, **given),
    "simpo_hinge": lambda batch, **given: simpo_loss(batch, beta=2.0, gamma_beta_ratio=0.3, variant="hinge", **given),
    "orpo": lambda batch, **given: orpo_loss(batch, beta=0.1, chosen_nll=0 * NLL, **given),
}
logprob = st.floats(-60.0, -0.01)
pair = st.tuples(logprob, logprob, st.integers(1, 9), st.integers(1, 9), logprob, logprob)


def batch_of(rows: list[tuple[Any, ...]]) -> PairLogprobs:
    columns = list(zip(*rows, strict=True))
    counts = torch.tensor(columns[2]), torch.tensor(columns[3])
    return PairLogprobs(
        tensor(columns[0]), tensor(columns[1]), counts[0], counts[1], tensor(columns[4]), tensor(columns[5])
    )


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(pair, min_size=2, max_size=6), cut=st.integers(1, 5))
@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up_and_metrics_are_per_row(name: str, rows: list[tuple[Any, ...]], cut: int) -> None:
    cut = min(cut, len(rows) - 1)
    whole, metrics = LOSSES[name](batch_of(rows))
    parts = [LOSSES[name](batch_of(part), denominator=len(rows)) for part in (rows[:cut], rows[cut:])]
    close(parts[0][0] + parts[1][0], whole.item(), 1e-9)
    for key, values in metrics.items():
        close(torch.cat([part[key] for _, part in parts]), values.tolist())
        assert len(values) == len(rows)


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(pair, min_size=1, max_size=4), shift=st.floats(-20.0, 20.0))
@pytest.mark.parametrize("name", ["dpo", "cdpo", "robust", "hinge", "ipo_sum"])
def test_a_shift_of_both_answers_changes_nothing(name: str, rows: list[tuple[Any, ...]], shift: float) -> None:
    batch = batch_of(rows)
    shifted = replace(batch, chosen=batch.chosen + shift, rejected=batch.rejected + shift)
    close(LOSSES[name](shifted)[0], LOSSES[name](batch)[0].item(), 1e-9)


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(pair, min_size=1, max_size=4))
def test_full_smoothing_does_not_know_which_answer_was_chosen(rows: list[tuple[Any, ...]]) -> None:
    turned = [(r, c, rn, cn, rr, cr) for c, r, cn, rn, cr, rr in rows]
    one, other = (dpo_loss(batch_of(each), beta=0.3, label_smoothing=0.5)[0] for each in (rows, turned))
    close(one, other.item(), 1e-9)
    one, other = (
        simpo_loss(batch_of(each), beta=2.0, gamma_beta_ratio=0.0, label_smoothing=0.5)[0] for each in (rows, turned)
    )
    close(one, other.item(), 1e-9)


def test_at_the_start_dpo_is_ln_2_and_ipo_the_square_of_its_target() -> None:
    batch = three()
    start = replace(batch, ref_chosen=batch.chosen.detach(), ref_rejected=batch.rejected.detach())
    for smoothing in (0.0, 0.3):
        close(dpo_loss(start, beta=0.7, label_smoothing=smoothing)[0], LN2)
    close(dpo_loss(start, beta=0.7, label_smoothing=0.3, variant="robust")[0], LN2)
    close(ipo_loss(start, beta=0.1)[0], 25.0)
    assert dpo_loss(start, beta=0.7)[1]["rewards/accuracies"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_log_probabilities_stay_finite(name: str) -> None:
    chosen = torch.tensor([-1.0, -9000.0, 0.0, -1e-30, -1e-8, -9000.0]).requires_grad_()
    rejected = torch.tensor([-9000.0, -1.0, -9000.0, 0.0, -3.0, -9000.0]).requires_grad_()
    tokens, reference = torch.ones(6, dtype=torch.long), torch.full((6,), -50.0)
    loss, metrics = LOSSES[name](PairLogprobs(chosen, rejected, tokens, tokens, reference, reference))
    loss.backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert all(value.isfinite().all() for value in (loss, chosen.grad, rejected.grad, *metrics.values()))


def test_half_precision_is_lifted() -> None:
    batch = three()
    half = PairLogprobs(
        batch.chosen.detach().bfloat16(), batch.rejected.detach().bfloat16(), batch.chosen_tokens,
        batch.rejected_tokens, tensor([-5.0, -7.0, -6.0]).bfloat16(), tensor([-9.0, -9.0, -6.0]).bfloat16(),
    )  # fmt: skip
    for name in LOSSES:
        loss, _ = LOSSES[name](half)
        assert loss.dtype in (torch.float32, torch.float64)
        close(loss, LOSSES[name](batch)[0].item(), 1e-6)


def test_what_does_not_fit_is_refused() -> None:
    batch = three()
    with pytest.raises(ValueError, match=r"rejected_tokens has shape \(2,\), chosen \(3,\)"):
        replace(batch, rejected_tokens=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="ref_chosen has shape"):
        replace(batch, ref_chosen=tensor([1.0, 2.0]), ref_rejected=tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="together"):
        replace(batch, ref_rejected=None)
    free = replace(batch, ref_chosen=None, ref_rejected=None)
    for loss in (dpo_loss, ipo_loss):
        with pytest.raises(ValueError, match="needs the log-probabilities of the reference"):
            loss(free, beta=0.1)
    simpo_loss(free, beta=2.0, gamma_beta_ratio=0.3)
    with pytest.raises(ValueError, match="denominator"):
        row_mean(tensor([1.0]), 0)


WRONG: list[tuple[Loss, dict[str, Any], str]] = [
    (dpo_loss, {"beta": 0.0}, "beta"),
    (ipo_loss, {"beta": -1.0}, "beta"),
    (simpo_loss, {"beta": 0.0, "gamma_beta_ratio": 0.0}, "beta"),
    (orpo_loss, {"beta": 0.0, "chosen_nll": NLL}, "beta"),
    (dpo_loss, {"beta": 1.0, "label_smoothing": 0.6}, "label_smoothing"),
    (dpo_loss, {"beta": 1.0, "label_smoothing": -0.1}, "label_smoothing"),
    (dpo_loss, {"beta": 1.0, "label_smoothing": 0.5, "variant": "robust"}, "robust"),
    (dpo_loss, {"beta": 1.0, "label_smoothing": -0.1, "variant": "robust"}, "robust"),
    (dpo_loss, {"beta": 1.0, "label_smoothing": 0.1, "variant": "hinge"}, "hinge"),
    (dpo_loss, {"beta": 1.0, "variant": "ipo"}, "sigmoid, robust, hinge"),
    (simpo_loss, {"beta": 1.0, "gamma_beta_ratio": 0.1, "variant": "robust"}, "sigmoid, hinge"),
    (simpo_loss, {"beta": 1.0, "gamma_beta_ratio": 0.1, "label_smoothing": 0.1, "variant": "hinge"}, "hinge"),
    (simpo_loss, {"beta": 1.0, "gamma_beta_ratio": -0.1}, "gamma_beta_ratio"),
    (simpo_loss, {"beta": 1.0, "gamma_beta_ratio": 0.1, "sft_weight": -1.0, "chosen_nll": NLL}, "sft_weight"),
    (simpo_loss, {"beta": 1.0, "gamma_beta_ratio": 0.1, "sft_weight": 1.0}, "chosen_nll"),
]


@pytest.mark.parametrize(("loss", "settings", "message"), WRONG)
def test_wrong_settings_are_refused(loss: Loss, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(three(), **settings)


def test_no_pairs_cost_nothing() -> None:
    none, count = tensor([]), torch.zeros(0, dtype=torch.long)
    loss, metrics = dpo_loss(PairLogprobs(none, none, count, count, none, none), beta=0.1)
    close(loss, 0.0)
    assert metrics["rewards/chosen"].shape == (0,)
