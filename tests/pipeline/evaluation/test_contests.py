"""Contests: which are made, in which order, and what names them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.evaluation.contests import Contest, Selection, contests_between

PROMPTS = ["p0", "p1"]
ANSWERS = {
    "ppo": {0: [["ppo00", "ppo01"], ["ppo10", "ppo11"]], 1: [["ppo'0"], ["ppo'1"]]},
    "sft": {0: [["sft00", "sft01"], ["sft10", "sft11"]], 1: [["sft'0"], ["sft'1"]]},
    "dpo": {0: [["dpo00", "dpo01"], ["dpo10", "dpo11"]]},
}


def test_every_method_meets_the_baseline_on_the_same_prompt_sample_and_seed() -> None:
    contests = contests_between(PROMPTS, ANSWERS, "sft", Selection(samples_per_prompt=2))
    assert [(c.a, c.b, c.response_a, c.response_b) for c in contests] == [
        ("ppo", "sft", "ppo00", "sft00"),
        ("ppo", "sft", "ppo01", "sft01"),
        ("ppo", "sft", "ppo10", "sft10"),
        ("ppo", "sft", "ppo11", "sft11"),
        ("ppo", "sft", "ppo'0", "sft'0"),
        ("ppo", "sft", "ppo'1", "sft'1"),
        ("dpo", "sft", "dpo00", "sft00"),
        ("dpo", "sft", "dpo01", "sft01"),
        ("dpo", "sft", "dpo10", "sft10"),
        ("dpo", "sft", "dpo11", "sft11"),
    ]
    assert contests[3] == Contest(1, 1, 0, "ppo", "sft", "p1", "ppo11", "sft11")


def test_all_pairs_one_prompt_one_sample() -> None:
    contests = contests_between(PROMPTS, ANSWERS, "sft", Selection("all", prompts=1))
    assert [(c.a, c.b, c.seed, c.response_a) for c in contests] == [
        ("ppo", "sft", 0, "ppo00"),
        ("ppo", "sft", 1, "ppo'0"),
        ("dpo", "sft", 0, "dpo00"),
        ("dpo", "ppo", 0, "dpo00"),
    ]


def test_an_unknown_baseline_and_missing_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="baseline kto is none of ppo, sft, dpo"):
        contests_between(PROMPTS, ANSWERS, "kto", Selection())
    with pytest.raises(ValueError, match="ppo, seed 0: responses to 2 prompts, not to 3"):
        contests_between([*PROMPTS, "p2"], ANSWERS, "sft", Selection())


def test_ids_are_those_of_texts_and_names() -> None:
    contest = Contest(1, 1, 0, "ppo", "sft", "p", "good", "bad")
    assert contest.id == "bbd88c03e6086f07"  # printf '["p", [["ppo", "good"], ["sft", "bad"]]]' | sha256sum
    assert replace(contest, seed=3, sample=0, prompt_index=9).id == contest.id
    assert Contest(1, 1, 0, "sft", "ppo", "p", "bad", "good").id == contest.id
    others = [replace(contest, prompt="q"), replace(contest, response_a="bad"), replace(contest, a="dpo")]
    others.append(replace(contest, response_a="bad", response_b="good"))
    assert len({contest.id, *(other.id for other in others)}) == 5
