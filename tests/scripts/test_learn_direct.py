"""The direct methods' experiment: findings on made-up reports, the whole on tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.evaluation.measures import Estimate, LengthStats
from pipeline.evaluation.policy_eval import PolicyReport
from policy.likelihoods import Likelihoods
from scripts import learn_direct
from scripts.learn_direct import SUMS, Arm
from tests.workplace import command_environment, make_workplace

EVEN = Likelihoods(spearman=0.0, ranking_accuracy=0.5, reward_accuracy=0.5, agreement=0.5, pairs=8)


def report(gold: float, tokens: float = 9.0) -> PolicyReport:
    """Eight prompts whose judge spreads by -+ 0.1 around `gold`."""
    values = [gold + 0.1 * (-1) ** index for index in range(8)]
    return PolicyReport(
        prompts=8,
        samples_per_prompt=1,
        prompts_sha256="p",
        judges={"gold": Estimate(gold, gold - 0.1, gold + 0.1)},
        score=None,
        kl_per_sequence=Estimate(1.0, 0.9, 1.1),
        kl_per_token=0.1,
        length=LengthStats(tokens, tokens, tokens, 3, 14),
        eos_rate=1.0,
        empty_rate=0.0,
        distinct_1=0.2,
        distinct_2=0.5,
        repetition=0.0,
        per_prompt={"gold": values},
        rows=[{"gold": value, "kl": 1.0} for value in values],
    )


def arm(gain: float, tokens: float = 9.0, likelihoods: Likelihoods = EVEN) -> Arm:
    return Arm(report(0.2), report(0.2 + gain, tokens), {}, likelihoods)


def test_a_judge_is_raised_only_where_seeds_and_prompts_bear_it_out() -> None:
    """Gains of 0.1 to 0.12 are clear; 0.1 and 0.9 are, by prompts, and with two seeds Student's t spans zero."""
    assert learn_direct.judge_change([arm(0.1), arm(0.12)], "gold")[2] == "not clearly changed"
    assert learn_direct.judge_change([arm(0.1), arm(0.11), arm(0.12)], "gold")[2] == "raised"
    assert learn_direct.judge_change([arm(-0.1), arm(-0.11), arm(-0.12)], "gold")[2] == "lowered"
    assert learn_direct.judge_change([arm(0.1), arm(0.9), arm(0.2)], "gold")[2] == "not clearly changed"


def test_findings_say_what_is_longer_and_how_often_the_rewards_agree() -> None:
    dpo = replace(EVEN, agreement=0.75, reward_accuracy=0.625)
    simpo = replace(EVEN, ranking_accuracy=0.7, spearman=-0.25)
    arms = {
        "dpo": [arm(0.1, likelihoods=dpo)],
        "simpo": [arm(0.1, 9.0, simpo)],
        SUMS: [arm(0.1, 12.0, replace(simpo, spearman=0.5))],
    }
    lines = learn_direct.findings(arms)
    assert lines[0] == "dpo: gold raised (1 seed)"
    assert lines[3].startswith(f"{SUMS}: answers of 12.00 tokens instead of 9.00 (longer;")
    assert "Spearman +0.500 instead of -0.250 (higher;" in lines[3]
    assert lines[4] == "dpo's implicit reward orders 75.0% of the held-out pairs as its likelihood does"
    assert lines[5] == "held-out accuracy of their own rewards: dpo 0.625, simpo 0.700"
    arms[SUMS] = [arm(0.1, 8.0, replace(simpo, spearman=-0.5))]
    assert "(not longer;" in learn_direct.findings(arms)[3]
    assert "(not higher;" in learn_direct.findings(arms)[3]


@pytest.mark.slow
def test_the_whole_experiment_on_tiny_models(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    words = [sys.executable, "-m", "scripts.learn_direct", "recipe.yaml", "--quick", "--methods", "dpo,simpo"]
    words += ["--gammas", "0", "--tracking.progress", "false"]
    done = subprocess.run(
        words, cwd=place.path, env=command_environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = place.path / "runs" / "learn"
    numbers = json.loads((out / "learn_direct.json").read_text())
    assert list(numbers["arms"]) == ["dpo", "simpo", SUMS, "simpo, gamma/beta 0"]
    assert len(numbers["commands"]) == 1 + 4
    ablated = json.loads((out / "seed0-length_normalize-false" / "simpo" / "manifest.json").read_text())
    assert ablated["fingerprint"]["sections"]["simpo"]["length_normalize"] is False
    assert all(line in (out / "learn_direct.md").read_text() for line in numbers["findings"])
