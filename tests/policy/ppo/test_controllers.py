"""The KL coefficient and the scale of the scores, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from policy.ppo.controllers import AdaptiveKLController, FixedKLController, RunningScale


def test_adaptive_controller_by_hand() -> None:
    controller = AdaptiveKLController(0.1, target=6.0, horizon=1000)
    controller.update(60.0, 100)  # error clipped to +0.2: factor 1.02
    assert controller.kl_coef == pytest.approx(0.102, rel=1e-12)
    controller.update(-1.0, 50)  # clipped to -0.2: factor 0.99
    assert controller.kl_coef == pytest.approx(0.10098, rel=1e-12)
    controller.update(6.6, 10)  # error 0.1: factor 1.001
    assert controller.kl_coef == pytest.approx(0.10098 * 1.001, rel=1e-12)
    controller.update(6.0, 500)
    assert controller.kl_coef == pytest.approx(0.10098 * 1.001, rel=1e-12)


def test_controllers_resume_and_refuse_what_is_no_number() -> None:
    adaptive = AdaptiveKLController(0.1, 6.0, 1000)
    adaptive.update(9.0, 64)
    resumed = AdaptiveKLController(0.1, 6.0, 1000)
    resumed.load_state_dict(adaptive.state_dict())
    for controller in (adaptive, resumed):
        controller.update(3.0, 64)
    assert adaptive.kl_coef == resumed.kl_coef != 0.1
    fixed = FixedKLController(0.05)
    fixed.update(100.0, 64)
    assert fixed.kl_coef == 0.05
    assert fixed.state_dict() == {"kl_coef": 0.05}
    fixed.load_state_dict({"kl_coef": 0.07})
    assert fixed.kl_coef == 0.07
    with pytest.raises(ValueError, match="nan"):
        adaptive.update(math.nan, 64)
    for make in (lambda: FixedKLController(-0.1), lambda: AdaptiveKLController(0.1, 0.0, 10)):
        with pytest.raises(ValueError, match=r"got"):
            make()
    with pytest.raises(ValueError, match="kl_coef"):
        fixed.load_state_dict({"kl_coef": math.inf})


def test_running_scale_divides_by_the_deviation_of_all_scores_so_far() -> None:
    scale = RunningScale()
    assert scale.std == 1.0
    assert scale.scale(torch.tensor([5.0])).tolist() == [5.0]
    # 5, 1, 3: mean 3, variance 8 / 3; then 7, -1 too: mean 3, variance 40 / 5
    first = scale.scale(torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(first, torch.tensor([1.0, 3.0]) / math.sqrt(8 / 3))
    second = scale.scale(torch.tensor([7.0, -1.0]))
    torch.testing.assert_close(second, torch.tensor([7.0, -1.0]) / math.sqrt(8))


def test_scores_that_are_not_finite_leave_the_scale_as_it_is() -> None:
    scale = RunningScale()
    scale.scale(torch.tensor([1.0, math.nan, 3.0, math.inf]))
    assert scale.std == 1.0
    assert scale.scale(torch.tensor([math.nan])).isnan().all()
    assert scale.std == 1.0
    assert scale.scale(torch.tensor([2.0])).tolist() == pytest.approx([2.0 / math.sqrt(2 / 3)])


def test_running_scale_is_that_of_all_scores_at_once_and_resumes() -> None:
    batches = [4.0 + 3.0 * torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (1, 5, 17, 2)]
    scale, resumed = RunningScale(), RunningScale()
    for batch in batches[:3]:
        scale.scale(batch)
    resumed.load_state_dict(scale.state_dict())
    for one in (scale, resumed):
        one.scale(batches[3])
    assert scale.std == resumed.std == pytest.approx(float(torch.cat(batches).double().std(unbiased=False)), rel=1e-9)
