"""The direct methods' experiment: likelihoods by hand, findings on made-up reports, the whole on tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.evaluation.measures import Estimate, LengthStats
from pipeline.evaluation.policy_eval import PolicyReport
from pipeline.load import load_recipe
from scripts import learn_direct
from scripts.learn_direct import SUMS, Arm, Likelihoods
from tests.workplace import command_environment, make_workplace

EVEN = Likelihoods(spearman=0.0, ranking_accuracy=0.5, reward_accuracy=0.5, agreement=0.5)


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


def test_likelihoods_are_those_of_each_answer_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_workplace(tmp_path / "work")
    monkeypatch.chdir(place.path)
    other = AutoModelForCausalLM.from_pretrained("model")
    with torch.no_grad():
        for number, parameter in enumerate(other.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    other.save_pretrained("policy")
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.save_pretrained("policy")
    held_out = [{"prompt": f"row {n}", "split": "eval" if n else "train", **answers(n)} for n in range(9)]
    (place.path / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    got = learn_direct.likelihoods(
        load_recipe("recipe.yaml", ["--data.max_response_tokens", "64"]), Path("policy"), Path("model")
    )

    models = [AutoModelForCausalLM.from_pretrained(name) for name in ("policy", "model")]
    means, lengths, ordered = [], [], []
    for row in held_out[1:]:
        found = [log_probs(models, tokenizer, row["prompt"], answer) for answer in row["responses"]]
        means += [policy / tokens for policy, _, tokens in found]
        lengths += [tokens for *_, tokens in found]
        for a, b in combinations(range(len(found)), 2):
            if row["ranks"][a] == row["ranks"][b]:
                continue
            (p, q, n), (r, s, m) = (found[a], found[b]) if row["ranks"][a] < row["ranks"][b] else (found[b], found[a])
            ordered.append((p / n > r / m, p - q > r - s))
    by_mean, by_reward = np.array(ordered).T
    assert got.spearman == pytest.approx(np.corrcoef(shared_ranks(means), shared_ranks(lengths))[0, 1], abs=1e-6)
    assert got.ranking_accuracy == pytest.approx(by_mean.mean())
    assert got.reward_accuracy == pytest.approx(by_reward.mean())
    assert got.agreement == pytest.approx((by_mean == by_reward).mean())
    assert by_mean.mean() != by_reward.mean()


def shared_ranks(values: list[float]) -> list[float]:
    """Equal values share the mean of their ranks."""
    return [sum(other < own for other in values) + sum(other == own for other in values) / 2 for own in values]


def answers(n: int) -> dict[str, list[object]]:
    words = ["good", "bad", "film", "plot", "actor", "slow", "great"]
    texts = [" " + " ".join(words[(n * k + j) % 7] for j in range(count)) for k, count in ((1, 1), (2, 3), (3, 5))]
    return {"responses": list(texts), "ranks": [n % 3, 1, 1]}


def log_probs(models: list[Any], tokenizer: Any, prompt: str, answer: str) -> tuple[float, float, int]:
    """sum log p of the answer and its EOS under both models, nats, and its tokens."""
    asked = [1, *tokenizer(prompt, add_special_tokens=False).input_ids]
    given = [*tokenizer(answer, add_special_tokens=False).input_ids, 2]
    sums = []
    for model in models:
        logits = model(torch.tensor([asked + given])).logits[0].log_softmax(-1)
        sums.append(sum(logits[len(asked) + t - 1, token].item() for t, token in enumerate(given)))
    return sums[0], sums[1], len(given)


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
