"""The frozen lake: its world and losses by hand, training that keeps the seeds apart, the report on made-up figures."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts import frozen_lake, frozen_lake_report
from scripts.frozen_lake import Lesson, Policies, Settings
from scripts.frozen_lake_report import PAPER, Outcome
from scripts.frozen_lake_world import (
    ACTIONS,
    LAKES,
    action_values,
    make_world,
    optimal_policy,
    squared_distances,
    walk,
)

SQUARE = make_world(("SF", "FG"))
TINY = Settings(seeds=2, steps=3, hidden=4)


# The world


def test_moves_of_a_square() -> None:
    """Cells 0 1 / 2 3, the goal is 3: moves off the grid stay, and so do all from the goal."""
    assert SQUARE.next_states.tolist() == [[0, 2, 1, 0], [0, 3, 1, 1], [2, 2, 3, 0], [3, 3, 3, 3]]
    assert SQUARE.terminal.tolist() == [False, False, False, True]
    assert (SQUARE.start, SQUARE.goal) == (0, 3)


def test_a_map_has_one_start_and_one_goal() -> None:
    with pytest.raises(ValueError, match="not 2 and 0"):
        make_world(("SFS",))


def test_value_iteration_by_hand() -> None:
    """Discount 1/2. Next to the goal V = 1, at the start 1/2: a move that stays is worth half of its cell's V."""
    expected = [[0.25, 0.5, 0.5, 0.25], [0.25, 1.0, 0.5, 0.5], [0.5, 0.5, 1.0, 0.25], [0.0] * 4]
    assert action_values(SQUARE, 0.5).tolist() == expected


def test_value_iteration_avoids_the_hole() -> None:
    """S F G over F H F, discount 1/2: right, right; the hole is worth nothing, and the way back 1/2 of its cell."""
    world = make_world(("SFG", "FHF"))
    assert action_values(world, 0.5)[1].tolist() == [0.25, 0.0, 1.0, 0.5]
    assert action_values(world, 0.5)[4].tolist() == [0.0] * 4


def test_best_actions_share_the_probability() -> None:
    assert optimal_policy(SQUARE).tolist()[:3] == [[0.0, 0.5, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]


def shortest(rows: tuple[str, ...], start: int) -> int:
    """Moves from a cell to the goal, by breadth-first search over the letters."""
    width, cells = len(rows[0]), "".join(rows)
    distance, reached = 0, {start}
    while not any(cells[cell] == "G" for cell in reached):
        sideways = {cell + step for cell in reached for step in (-1, 1) if 0 <= cell % width + step < width}
        upright = {cell + step for cell in reached for step in (-width, width) if 0 <= cell + step < len(cells)}
        reached |= {cell for cell in sideways | upright if cells[cell] != "H"}
        distance += 1
    return distance


@pytest.mark.parametrize("name", LAKES)
def test_the_optimal_policy_takes_shortest_ways(name: str) -> None:
    rows = LAKES[name].rows
    world, cells = make_world(rows), "".join(rows)
    for state, policy in enumerate(optimal_policy(world)):
        if cells[state] in "SF":
            wanted = shortest(rows, state) - 1
            ways = [cell for cell in world.next_states[state].tolist() if cells[cell] in "SFG"]
            nearer = {cell for cell in ways if shortest(rows, cell) == wanted}
            assert set(world.next_states[state, policy > 0].tolist()) == nearer
            assert float(policy.sum()) == 1.0


def test_how_many_best_actions_the_lakes_have() -> None:
    counts = {name: (optimal_policy(make_world(lake.rows)) == 1).any(1) for name, lake in LAKES.items()}
    ordinary = {name: ~make_world(lake.rows).terminal for name, lake in LAKES.items()}
    assert int((ordinary["4x4"] & ~counts["4x4"]).sum()) == 2
    assert not (ordinary["unique"] & ~counts["unique"]).any()


@pytest.mark.parametrize("name", LAKES)
def test_the_walks_of_the_lakes(name: str) -> None:
    lake = LAKES[name]
    world = make_world(lake.rows)
    chosen, rejected = walk(world, lake.optimal), walk(world, lake.sub_optimal)
    assert len(chosen.actions) == shortest(lake.rows, world.start) < len(rejected.actions)
    assert (optimal_policy(world)[chosen.states, chosen.actions] > 0).all()
    assert 3 in rejected.states.tolist()  # the corner
    for taken in (chosen, rejected):
        after = world.next_states[taken.states, taken.actions]
        assert after.tolist() == [*taken.states.tolist()[1:], world.goal]


@pytest.mark.parametrize(
    ("actions", "message"),
    [("DRR", "over after 2"), ("D", "not end at the goal"), ("DX", "other letters than LDRU"), ("", "not end")],
)
def test_walks_that_are_none(actions: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        walk(SQUARE, actions)


def test_a_walk_by_hand() -> None:
    taken = walk(SQUARE, "URLDR")
    assert taken.states.tolist() == [0, 0, 1, 0, 2]
    assert "".join(ACTIONS[action] for action in taken.actions) == "URLDR"


def test_squared_distances_by_hand() -> None:
    """The optimal policy is 0 away from itself; 1/4 each is (9/16 + 3/16) / 4 from one action, 1/16 from two halves."""
    target = optimal_policy(SQUARE)
    uniform = torch.full((4, 4), 0.25)
    both = torch.stack([uniform, target.float()])
    assert squared_distances(both, target, ~SQUARE.terminal).tolist() == [(3 / 16 + 3 / 16 + 1 / 16) / 3, 0.0]
    assert squared_distances(both, target, torch.tensor([0])).tolist() == [1 / 16, 0.0]


# The methods, on networks whose actions are known


def fixed(matrix: Tensor) -> Policies:
    """Networks with the probabilities of `matrix` [K,S,A]: hidden unit s is cell s."""
    seeds, states, _ = matrix.shape
    policies = Policies(seeds, states, states)
    with torch.no_grad():
        policies.inner.copy_(torch.eye(states).expand_as(policies.inner))
        policies.inner_bias.zero_()
        policies.outer.copy_(matrix.log())
        policies.outer_bias.zero_()
    return policies


KNOWN = torch.tensor(
    [[1 / 8, 1 / 4, 1 / 2, 1 / 8], [1 / 16, 1 / 4, 1 / 4, 7 / 16], [1 / 8, 1 / 8, 1 / 2, 1 / 4], [1 / 4] * 4]
)
"""At the start right is the best action, in cell 2 as well."""


def lesson(reference: float = 0.0) -> Lesson:
    """Chosen D, R (cells 0, 2), rejected R, L, D, R (cells 0, 1, 0, 2), for two seeds."""
    references = [torch.full((2,), reference), torch.full((2,), 2 * reference)]
    return Lesson(TINY, SQUARE, walk(SQUARE, "DR"), walk(SQUARE, "RLDR"), *references)


def test_sft_by_hand() -> None:
    """-(log 1/4 + log 1/2) / 2 for each seed."""
    policies = fixed(KNOWN.expand(2, 4, 4))
    assert frozen_lake.sft(policies, lesson()).item() == pytest.approx(2 * 1.5 * np.log(2), rel=1e-6)


def test_imitation_weighs_actions_alike() -> None:
    """3 log 2 over 2 actions and 8 log 2 over 4: 11/6 log 2 each, not the 7/4 log 2 of walks that weigh alike."""
    policies = fixed(KNOWN.expand(2, 4, 4))
    found = frozen_lake.imitation(policies, lesson().chosen, lesson().rejected)
    assert found.item() == pytest.approx(2 * 11 / 6 * np.log(2), rel=1e-6)


def test_dpo_by_hand() -> None:
    """Sums -3 log 2 and -8 log 2, references -0.3 and -0.6: h = 5 log 2 - 0.3, beta 2."""
    policies = fixed(KNOWN.expand(2, 4, 4))
    margin = 2 * (5 * np.log(2) - 0.3)
    given = replace(lesson(-0.3), settings=replace(TINY, dpo_beta=2.0))
    assert frozen_lake.dpo(policies, given).item() == pytest.approx(2 * np.log1p(np.exp(-margin)), rel=1e-6)


def test_orpo_by_hand() -> None:
    """Averages -1.5 log 2 and -2 log 2: odds 0.353553 / 0.646447 and 1/3; SFT + 0.25 log(1 + 1 / ratio) per seed."""
    policies = fixed(KNOWN.expand(2, 4, 4))
    penalty = 0.25 * np.log(1 + 0.6464466094 / 0.3535533906 / 3)
    assert frozen_lake.orpo(policies, lesson()).item() == pytest.approx(2 * (1.5 * np.log(2) + penalty), rel=1e-6)


def test_ift_by_hand() -> None:
    """From the start the best action leads to cell 1, not 2: cell 2 is mixed, 4/5 of its logits and 1/5 of cell 1's.

    Logits there: 0.8 log p(. | 2) + 0.2 log p(. | 1), normalised. Of the first cell nothing changes. The losses l weigh
    W = 2 c / sum(c), c = (l0 + 0.95 l1, l1).
    """
    policies = fixed(KNOWN.expand(2, 4, 4))
    logits = 0.8 * np.log(KNOWN[2].numpy()) + 0.2 * np.log(KNOWN[1].numpy())
    first, second = np.log(4.0), np.log(np.exp(logits).sum()) - logits[2]
    future = np.array([first + 0.95 * second, second])
    weights = 2 * future / future.sum()
    expected = (weights * np.array([first, second])).mean()
    assert frozen_lake.ift(policies, lesson()).item() == pytest.approx(2 * expected, rel=1e-6)


def test_ift_without_residual_and_weights_is_sft() -> None:
    settings = replace(TINY, ift_residual=0.0, ift_gamma=0.0)
    policies = fixed(KNOWN.expand(2, 4, 4))
    plain = replace(lesson(), settings=settings)
    assert torch.allclose(frozen_lake.ift(policies, plain), frozen_lake.sft(policies, plain))


def test_seeds_do_not_touch_each_other() -> None:
    """A seed's whole run is the same alone with another and among three."""
    two, three = (frozen_lake.run(replace(TINY, seeds=seeds, steps=12)) for seeds in (2, 3))
    assert two.steps == three.steps == [0, 10, 12]
    for method in PAPER:
        assert two.distances[method].shape == (3, 2, 2)
        np.testing.assert_allclose(three.distances[method][..., :2], two.distances[method], rtol=1e-5)
        assert len(set(three.distances[method][0, 0])) == 3


def test_the_distances_are_those_of_the_policy() -> None:
    """The base's, by loops: over the 11 frozen cells and over the 6 of the walk D, D, R, D, R, R."""
    lake = LAKES["4x4"]
    world = make_world(lake.rows)
    base = frozen_lake.make_base(TINY, world, (walk(world, lake.optimal), walk(world, lake.sub_optimal)))
    policies, target = base(torch.eye(16)).exp().tolist(), optimal_policy(world).tolist()
    found = frozen_lake.run(TINY)
    for measure, cells in enumerate(([0, 1, 2, 3, 4, 6, 8, 9, 10, 13, 14], [0, 4, 8, 9, 13, 14])):
        for seed, policy in enumerate(policies):
            errors = [(policy[cell][action] - target[cell][action]) ** 2 for cell in cells for action in range(4)]
            assert found.final("base", measure)[seed] == pytest.approx(np.mean(errors), rel=1e-5)


def test_every_method_starts_from_the_base_and_goes_elsewhere() -> None:
    found = frozen_lake.run(TINY)
    starts = [curve[0] for curve in found.distances.values()]
    assert all((start == starts[0]).all() for start in starts)
    assert len({curve[-1].tobytes() for curve in found.distances.values()}) == len(PAPER)
    fresh = frozen_lake.run(replace(TINY, steps=1))
    assert (fresh.distances["sft"][0] != starts[0]).all()  # the base trains too


def test_the_base_learns_both_walks() -> None:
    """Actions that only the sub-optimal walk takes become likely too."""
    walks = walk(SQUARE, "DR"), walk(SQUARE, "RLDR")
    base = frozen_lake.make_base(replace(TINY, steps=300, hidden=16, learning_rate=0.01), SQUARE, walks)
    with torch.no_grad():
        found = base(torch.eye(4)).exp()
    assert (found[:, 0, 1:3] > 0.2).all()
    assert (found[:, 1, 0] > 0.9).all()


def test_a_policy_sure_of_the_walk_is_away_where_two_actions_are_best() -> None:
    """On 4x4 two of the walk's six cells have two best actions: 2 (1/4 + 1/4) / (6 * 4)."""
    assert frozen_lake.run(TINY).followed == pytest.approx(1 / 24)


# The report


def outcome(**levels: float) -> Outcome:
    """Two steps, both measures alike, 3 seeds that differ by 0.01; SFT by twice that."""
    steps = {"sft": 0.02, "orpo": 0.01, "ift": 0.01, "dpo": 0.01}
    defaults = {"sft": 0.4, "orpo": 0.3, "ift": 0.2, "dpo": 0.1, **levels}
    curves = {}
    for name, level in defaults.items():
        seeds = level + steps[name] * np.array([-1.0, 0.0, 1.0])
        curves[name] = np.array([[np.full(3, 0.5)] * 2, [seeds] * 2])
    return Outcome(asdict(Settings(seeds=3)), [0, 5], curves, 0.0)


def test_the_order_and_the_paired_differences() -> None:
    """ORPO - SFT: -0.1 by seeds +0.01, 0, -0.01, so -0.1 -+ 4.30265 * 0.01 / sqrt(3); IFT - ORPO has no spread."""
    found = outcome()
    assert found.ranking(0) == list(PAPER)
    last, between = found.differences(0)[-1], found.differences(0)[-3]
    assert (last.one, last.other) == ("orpo", "sft")
    assert last.estimate == pytest.approx((-0.1, -0.1 - 0.0248414, -0.1 + 0.0248414), abs=1e-6)
    assert (between.one, between.other) == ("ift", "orpo")
    assert between.estimate == pytest.approx((-0.1, -0.1, -0.1))
    assert all(difference.told_apart for difference in found.differences(1))


def test_pairs_within_the_noise_are_not_told_apart() -> None:
    found = outcome(orpo=0.38)
    assert [(d.one, d.other) for d in found.differences(0) if not d.told_apart] == [("orpo", "sft")]


@pytest.mark.parametrize(("ift", "holds"), [(0.39, True), (0.4, True), (0.41, False)])
def test_the_claim(ift: float, holds: bool) -> None:
    assert outcome(ift=ift).claim().holds is holds


def test_the_claim_looks_at_all_states() -> None:
    found = outcome()
    found.distances["ift"][-1, 0] = 0.9
    assert not found.claim().holds


def test_one_seed_has_no_interval() -> None:
    with pytest.raises(ValueError, match="1 seeds"):
        frozen_lake_report.interval(np.ones(1))


def test_the_report_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim = frozen_lake_report.write(tmp_path, outcome(orpo=0.38, dpo=0.5), "the command")
    assert claim.holds
    text, shown = (tmp_path / "frozen_lake_4x4.md").read_text(), capsys.readouterr().out
    for line in (
        "holds: IFT ends no farther",
        "Over all states: IFT < ORPO < SFT < DPO; not the paper's order, DPO < IFT < ORPO < SFT.",
        "Not told apart over all states: ORPO and SFT.",
    ):
        assert line in text
        assert line in shown
    assert "| 1 | IFT | IFT | DPO |" in text
    assert "| DPO | 0.5 [0.475, 0.525] | 0.5 [0.475, 0.525] |" in text
    assert "| BASE | 0.5 [0.5, 0.5] |" in text
    assert "$ the command" in text
    frozen_lake_report.write(tmp_path, outcome(), "the command")
    text = (tmp_path / "frozen_lake_4x4.md").read_text()
    assert "DPO < IFT < ORPO < SFT; the paper's order." in text
    assert "Not told apart over all states: no pair." in text


@pytest.mark.parametrize("name", LAKES)
def test_the_command_writes_all_files(name: str, tmp_path: Path) -> None:
    words = ["--seeds", "2", "--steps", "3", "--map", name, "--out", str(tmp_path / "new")]
    code = frozen_lake.main(words)
    out = tmp_path / "new" / f"frozen_lake_{name}"
    found = json.loads(out.with_suffix(".json").read_text())
    assert code == (0 if found["claim"]["holds"] else 1)
    assert found["settings"]["sub_optimal"] == LAKES[name].sub_optimal
    assert found["command"].endswith(f"--out {tmp_path / 'new'}")
    assert len(found["all states"]["distances"]["base"]["each_seed"]) == 2
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "## Command" in out.with_suffix(".md").read_text()


def test_exit_code_of_a_claim_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A way there and back on 4x4, with the settings that the module names."""
    assert frozen_lake.main(["--seeds", "2", "--sub-optimal", "RRLLDDRDRR", "--out", str(tmp_path)]) == 1
    assert "claim fails: IFT ends no farther" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1"], "--seeds must lie between 2 and 30"),
        (["--seeds", "31"], "--seeds must lie between 2 and 30"),
        (["--steps", "0"], "--steps above 0"),
        (["--sub-optimal", "RD"], "RD does not end at the goal"),
        (["--sub-optimal", "RRDDDR"], "no longer than DDRDRR"),
    ],
)
def test_refusals(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        frozen_lake.main(words)
    assert message in capsys.readouterr().err
