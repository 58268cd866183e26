"""The objectives on a model: IFT and contrast written out, IFT's noise, KTO's weights and reference point."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import embedding

from pipeline.recipe import Recipe
from pipeline.recipe_direct import IftSection, KtoSection
from policy.answers import Group
from policy.models import disable_dropout, load_policy
from policy.objectives import IftObjective, KtoObjective, Sizes, Step, make_objective
from policy.preference_data import Row, RowCollator

ROWS = [
    Row(Group([1, 5, 6], [[7, 8, 9, 2]])),
    Row(Group([1, 10], [[11, 2]])),
    Row(Group([1, 12, 13, 14], [[15, 16, 2]])),
]
ALONE = Step(0, lambda tensor: tensor)


def recipe(**ift: float) -> Recipe:
    return Recipe.model_validate({"name": "t", "model": {"name_or_path": "m"}, "ift": ift})


@pytest.mark.parametrize(("weight", "gamma"), [(0.0, 0.0), (0.2, 0.95), (1.0, 0.5)])
def test_ift_is_two_passes_with_the_models_own_guesses_mixed_in(policy_dir: Path, weight: float, gamma: float) -> None:
    model = load_policy(policy_dir, "float32")
    disable_dropout(model)
    objective = make_objective("ift", recipe(residual_weight=weight, gamma=gamma), shared=False, labels=(0, 0))
    inputs = RowCollator(0, shared=False)(ROWS)
    objective.begin_step(model, [inputs], ALONE)
    loss, metrics = objective.loss(model, inputs, Sizes(3.0, 9.0))
    loss.backward()
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    table = model.get_input_embeddings().get_parameter("weight").detach().clone()
    losses = []
    for row in ROWS:
        start, ids = len(row.group.prompt_ids), torch.tensor([[*row.group.prompt_ids, *row.group.answer_ids[0]]])
        with torch.no_grad():
            guesses = model(inputs_embeds=embedding(ids, table)).logits.argmax(-1)
        further = ids.clone()
        further[0, start:] = guesses[0, start - 1 : -1]
        mixed = (1 - weight) * embedding(ids, table) + weight * embedding(further, table)
        logprobs = model(inputs_embeds=mixed).logits[0].log_softmax(-1)
        nll = -torch.stack([logprobs[t - 1, ids[0, t]] for t in range(start, ids.shape[1])])
        discounts = [gamma ** torch.arange(len(nll) - t) for t in range(len(nll))]
        future = torch.stack([(discount * nll[t:]).sum() for t, discount in enumerate(discounts)])
        share = future / future.sum() if gamma else torch.full_like(nll, 1 / len(nll))
        losses.append((nll * share).sum())
    expected = torch.stack(losses).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["logps"].shape == (3,)
    for one, two in zip(got, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        assert (one - two).norm() <= 1e-4 * two.norm()


def test_the_noise_on_the_residual_depends_on_the_step_alone(policy_dir: Path) -> None:
    def losses(*steps: int) -> list[float]:
        model = load_policy(policy_dir, "float32").eval()
        objective = make_objective("ift", recipe(residual_noise=2.0), shared=False, labels=(0, 0))
        inputs, found = RowCollator(0, shared=False)(ROWS), []
        for step in steps:
            objective.begin_step(model, [inputs], Step(step, lambda tensor: tensor))
            found.append(objective.loss(model, inputs, Sizes(3.0, 9.0))[0].item())
        return found

    first, second, third = losses(0, 1, 2)
    assert len({first, second, third}) == 3
    assert losses(2) == [third]


def test_the_noise_on_the_residual_is_normal(policy_dir: Path) -> None:
    """Of 400 steps half lie below the given weight, and 68% within a standard deviation."""
    objective = IftObjective(IftSection(residual_weight=0.2, residual_noise=0.5), seed=0)
    model, drawn = load_policy(policy_dir, "float32"), []
    for step in range(400):
        objective.begin_step(model, [], Step(step, lambda tensor: tensor))
        drawn.append(objective.weight)
    assert sum(weight < 0.2 for weight in drawn) / 400 == pytest.approx(0.5, abs=0.08)
    assert sum(abs(weight - 0.2) < 0.1 for weight in drawn) / 400 == pytest.approx(0.683, abs=0.08)


def test_contrast_is_the_mean_over_all_answer_tokens(policy_dir: Path) -> None:
    model = load_policy(policy_dir, "float32").eval()
    objective = make_objective("contrast", recipe(), shared=False, labels=(0, 0))
    inputs = RowCollator(0, shared=False)(ROWS)
    rows, tokens = objective.sizes(inputs)
    loss, _ = objective.loss(model, inputs, Sizes(float(rows), float(tokens)))
    nll = []
    for row in ROWS:
        asked, given = row.group.prompt_ids, row.group.answer_ids[0]
        logits = model(torch.tensor([[*asked, *given]])).logits[0].log_softmax(-1)
        nll += [-logits[len(asked) + t - 1, token].item() for t, token in enumerate(given)]
    assert (rows, tokens) == (len(ROWS), len(nll))
    assert loss.item() == pytest.approx(sum(nll) / len(nll), rel=1e-5)


def test_kto_balances_its_labels_unless_told_otherwise() -> None:
    automatic = KtoObjective(KtoSection(), desirable=10, undesirable=40)
    assert (automatic.desirable_weight, automatic.undesirable_weight) == (4.0, 1.0)
    chosen = KtoObjective(KtoSection(desirable_weight=0.7), desirable=10, undesirable=40)
    assert (chosen.desirable_weight, chosen.undesirable_weight) == (0.7, 1.0)


def test_the_reference_point_of_a_step_is_over_all_its_mismatches(policy_dir: Path) -> None:
    """Batches of one and of two rows; their own bounded means would not add up to the step's."""
    model = load_policy(policy_dir, "float32").eval()
    rows = [
        Row(row.group, other=Group(row.group.prompt_ids, ROWS[(k + 1) % 3].group.answer_ids), reference=(-9.0, value))
        for k, (row, value) in enumerate(zip(ROWS, (-40.0, -1.0, -30.0), strict=True))
    ]
    collate, points = RowCollator(0, shared=False), []
    for split in ([rows], [rows[:1], rows[1:]]):
        objective = KtoObjective(KtoSection(), 2, 1)
        objective.begin_step(model, [collate(part) for part in split], ALONE)
        assert objective.reference_point is not None
        points.append(objective.reference_point.item())
    assert points[0] > 0.0
    assert points[1] == pytest.approx(points[0], rel=1e-6)
