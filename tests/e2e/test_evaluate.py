"""`tristage evaluate`: a policy is measured as PPO measured it, once, and the same again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from pipeline.evaluation.saved import load_report
from tests.workplace import Workplace

WORDS = ("evaluate", "recipe.yaml", "--eval.reward_model", "runs/tiny/rm")


def test_it_says_of_ppos_policy_what_ppo_said(copied: Callable[..., Workplace]) -> None:
    place = copied()
    done = place.tristage(*WORDS)
    assert done.returncode == 0, done.stderr[-3000:]
    last = load_report(place.run / "ppo", 7)
    found = json.loads((place.run / "evaluate" / "evaluation.json").read_text())
    report = found["report"]
    assert report["prompts_sha256"] == last.prompts_sha256
    assert last.score is not None
    assert last.kl_per_sequence is not None
    assert report["judges"]["characters"]["mean"] == last.judges["characters"].mean
    assert report["score"]["mean"] == pytest.approx(last.score.mean, abs=1e-5)
    assert report["kl_per_sequence"]["mean"] == pytest.approx(last.kl_per_sequence.mean, abs=1e-5)
    rows = place.rows("evaluate", "samples.jsonl")
    assert [row["response"] for row in rows] == [row["response"] for row in last.rows]
    assert "runs/tiny/ppo: 4 held-out prompts x 2 samples" in done.stdout
    inputs = place.manifest("evaluate")["inputs"]
    assert {role: entry["path"] for role, entry in inputs.items()} == {
        "policy": "../ppo",
        "reference": "../sft",
        "reward_model": "../rm",
    }
    assert "evaluate: done already, skipped" in place.tristage(*WORDS).stdout


@pytest.mark.slow
def test_equal_runs_write_equal_bytes_and_sfts_perplexity_is_its_validation_loss(
    copied: Callable[..., Workplace],
) -> None:
    place = copied()
    written = []
    for _ in range(2):
        done = place.tristage(*WORDS, "--policy", "runs/tiny/sft", "--overwrite")
        assert done.returncode == 0, done.stderr[-3000:]
        folder = place.run / "evaluate"
        written.append([(folder / name).read_bytes() for name in ("evaluation.json", "samples.jsonl")])
    assert written[0] == written[1]
    loss = place.manifest("sft")["metrics"]["validation_loss"]
    assert math.log(json.loads(written[0][0])["sft_perplexity"]) == pytest.approx(loss, abs=1e-5)
