from __future__ import annotations

import numpy as np
import pytest

from pipeline.compare.answers import prompts_and_answers, side_by_side
from pipeline.compare.contrasts import by_decisions, by_scores, differences, ranking, win_rates
from pipeline.evaluation.contests import EQUAL, Contest, Decision
from tests.pipeline.compare.build import gathered


def decided(
    a: str, b: str, seed: int, prompt: int, outcome: float | None, texts: tuple[str, str] = ("x", "y")
) -> Decision:
    contest = Contest(prompt, 0, seed, a, b, "prompt", *texts)
    return Decision(contest, outcome)


def test_outcomes_are_over_all_pairs_of_samples_and_the_length_control_over_twins() -> None:
    found = by_scores(
        gathered(
            {"sft": [[[0.0, 2.0]]], "dpo": [[[1.0, 2.0]]]},
            {"sft": [[["ab", "abc"]]], "dpo": [[["abcd", "a"]]]},
        ),
        "gold",
    )
    won = found["sft", "dpo"]
    # sft's 0 loses twice; its 2 beats 1 and ties with 2: (0 + 0 + 1 + .5) / 4
    assert won.outcome.tolist() == [[0.375]]
    assert won.preferences.tolist() == [[[0.0, 0.5]]]
    assert won.lengths.tolist() == [[[-2.0, 2.0]]]


def test_both_directions_of_a_win_rate_agree() -> None:
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(shift, 1, (3, 40, 2)) for name, shift in (("sft", 0.0), ("dpo", 1.0), ("kto", 1.0))}
    rates = win_rates(by_scores(gathered(scores), "gold"), "gold", 0)
    ahead, behind = rates["dpo"]["sft"], rates["sft"]["dpo"]
    assert ahead["mean"] > 0.6
    assert behind["mean"] == pytest.approx(1 - ahead["mean"])
    assert (behind["low"], behind["high"]) == pytest.approx((1 - ahead["high"], 1 - ahead["low"]))
    assert behind["p_holm"] == ahead["p_holm"] < 0.05 < rates["dpo"]["kto"]["p_holm"]
    one, other = ahead["length_controlled"], behind["length_controlled"]
    assert (other["rate"], other["low"], other["high"]) == pytest.approx(
        (1 - one["rate"], 1 - one["high"], 1 - one["low"])
    )
    assert "no significant difference" in rates["dpo"]["kto"]["says"]


def test_differences_are_paired_with_the_baseline_and_corrected_over_the_methods() -> None:
    start = np.random.default_rng(1).normal(0, 1, (2, 30, 2))
    steady = {"sft": start, "dpo": start + 0.25, "kto": start - 0.5}
    found = differences(gathered(steady), ["gold"], 0)["gold"]
    assert found["dpo"]["mean"] == pytest.approx(0.25)
    assert found["dpo"]["per_seed"] == pytest.approx([0.25, 0.25])
    assert found["kto"]["mean"] == pytest.approx(-0.5)
    assert found["dpo"]["says"].startswith("dpo scores higher than sft on gold: difference +0.25")
    assert found["kto"]["says"].startswith("kto scores lower than sft on gold: difference -0.5")
    assert found["dpo"]["p_holm"] >= found["dpo"]["p"]


def test_ranking_is_best_first_and_absent_when_a_method_was_not_compared() -> None:
    rng = np.random.default_rng(2)
    scores = {name: rng.normal(shift, 1, (2, 60, 1)) for name, shift in (("sft", 0.0), ("dpo", 0.5), ("ppo", 1.5))}
    won = by_scores(gathered(scores), "gold")
    assert [row["method"] for row in ranking(won, ["sft", "dpo", "ppo"], 0)] == ["ppo", "dpo", "sft"]
    assert ranking({("sft", "dpo"): won["sft", "dpo"]}, ["sft", "dpo", "ppo"], 0) == []


def test_decisions_become_a_table_of_the_prompts_that_every_seed_decided() -> None:
    made = [
        decided("sft", "dpo", 0, 0, 1.0, ("abc", "a")),
        decided("sft", "dpo", 1, 0, 0.0, ("ab", "abc")),
        decided("sft", "dpo", 0, 1, 0.5),
        decided("sft", "dpo", 1, 1, None),
    ]
    won = by_decisions(made, [0, 1], as_one_seed=False)["sft", "dpo"]
    assert won.outcome.tolist() == [[1.0], [0.0]]
    assert won.lengths.tolist() == [[[2.0]], [[-1.0]]]
    assert by_decisions(made[2:], [0, 1], as_one_seed=False) == {}


def test_every_vote_counts_whichever_seed_it_is_of() -> None:
    made = [
        decided("dpo", "sft", 0, 3, 1.0, ("abc", "a")),
        decided("dpo", "sft", 1, 3, 0.0, ("a", "a b c")),
        decided("dpo", "sft", 1, 7, 0.0),
        decided("dpo", "sft", 1, 9, None),
    ]
    won = by_decisions(made, [0, 1], as_one_seed=True)["dpo", "sft"]
    assert won.prompts == (3, 7)
    assert won.outcome.tolist() == [[0.5, 0.0]]
    assert won.lengths.tolist() == [[[-1.0], [0.0]]]  # the mean of 2 and -4


def test_equal_answers_are_ties_only_where_all_others_were_voted_on() -> None:
    voted = decided("dpo", "sft", 0, 0, 1.0)
    equal = Decision(decided("dpo", "sft", 0, 1, 0.5, ("x", "x")).contest, 0.5, reason=EQUAL)
    missing = decided("dpo", "sft", 0, 2, None)
    assert by_decisions([voted, equal], [0], as_one_seed=True)["dpo", "sft"].outcome.tolist() == [[1.0, 0.5]]
    assert by_decisions([voted, equal, missing], [0], as_one_seed=True)["dpo", "sft"].outcome.tolist() == [[1.0]]
    assert by_decisions([equal, missing], [0], as_one_seed=True) == {}


def test_votes_on_different_prompts_are_ranked_together() -> None:
    made = [decided("dpo", "sft", 0, prompt, 1.0) for prompt in range(6)]
    made += [decided("ppo", "sft", 0, prompt, outcome) for prompt, outcome in ((2, 1.0), (7, 0.0), (9, 0.5))]
    won = by_decisions(made, [0], as_one_seed=True)
    assert won["ppo", "sft"].prompts == (2, 7, 9)
    assert ranking(won, ["sft", "dpo", "ppo"], 0)[0]["method"] == "dpo"
    assert ranking(won, ["sft", "dpo", "ppo", "kto"], 0) == []


def test_answers_keep_their_places() -> None:
    prompts, answers = prompts_and_answers(gathered({name: np.zeros((2, 3, 2)) for name in ("sft", "dpo")}))
    assert prompts == ["prompt 0", "prompt 1", "prompt 2"]
    assert answers["dpo"][1] == [[f"dpo 1 {p} {k}" for k in (0, 1)] for p in (0, 1, 2)]


def test_samples_stand_side_by_side() -> None:
    rows = list(side_by_side(gathered({"sft": np.zeros((2, 2, 2)), "dpo": np.ones((2, 2, 2))}), ["gold"]))
    assert len(rows) == 4
    assert rows[3]["prompt_index"] == rows[3]["sample"] == 1
    assert [answer["seed"] for answer in rows[3]["answers"]["dpo"]] == [0, 1]
    assert rows[3]["answers"]["dpo"][1]["response"] == "dpo 1 1 1"
    assert rows[3]["answers"]["dpo"][1]["scores"] == {"gold": 1.0}
