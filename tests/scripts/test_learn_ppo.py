"""The learning experiment: statistics by hand, the report on made-up outcomes, the whole of it on tiny models."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.measures import Estimate, LengthStats
from pipeline.evaluation.policy_eval import PolicyReport
from pipeline.load import load_recipe
from scripts import learn_ppo, learn_ppo_report, learn_ppo_stats
from scripts.learn_ppo_report import Arms, LengthRun, Outcome
from tests.workplace import Workplace, command_environment, make_workplace

VERDICT = {"name": "length_hacking", "update": 7, "severity": "warning", "cause": "longer", "mend": "-"}


# Statistics


def test_the_bootstrap_draws_seeds() -> None:
    """Two seeds without spread between prompts: means 0, 1/2 and 1 with probabilities 1/4, 1/2, 1/4."""
    found = learn_ppo_stats.hierarchical_bootstrap([np.zeros(50), np.ones(50)])
    assert found == pytest.approx((0.5, 0.0, 1.0), abs=1e-12)


def test_the_bootstrap_draws_prompts_within_a_seed() -> None:
    """Two equal seeds of prompts 0 and 1: a resampled mean is k/4 of four draws, and each end has 1/16 > 0.025."""
    found = learn_ppo_stats.hierarchical_bootstrap([np.array([0.0, 1.0])] * 2)
    assert found == pytest.approx((0.5, 0.0, 1.0), abs=1e-12)


def test_seeds_weigh_the_same_whatever_their_prompts() -> None:
    found = learn_ppo_stats.hierarchical_bootstrap([np.zeros(3), np.full(1, 4.0)])
    assert found.mean == 2.0


def test_one_prompt_of_one_seed_has_no_interval() -> None:
    found = learn_ppo_stats.hierarchical_bootstrap([np.array([2.0])])
    assert found.mean == 2.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)


@pytest.mark.parametrize(
    ("seeds", "between", "least", "most"),
    [(3, 0.0, 0.93, 0.999), (12, 1.0, 0.88, 0.97)],
    ids=["prompts differ", "seeds differ"],
)
def test_the_interval_covers_the_truth(seeds: int, between: float, least: float, most: float) -> None:
    """Of 200 experiments on known distributions about 95% of the intervals hold the true mean 0.3.

    Resampling a spread that is already in the seeds' means makes the first slightly wide, few seeds the second slightly
    narrow.
    """
    generator = np.random.default_rng(1)
    covered = 0
    for experiment in range(200):
        centres = 0.3 + between * generator.normal(size=seeds)
        found = learn_ppo_stats.hierarchical_bootstrap(
            [centre + generator.normal(size=40) for centre in centres], seed=experiment, resamples=400
        )
        covered += found.low <= 0.3 <= found.high
    assert least <= covered / 200 <= most


def test_student_interval_over_seeds() -> None:
    """Means 1, 2, 3: standard deviation 1, so 2 -+ 4.30265 / sqrt(3)."""
    found = learn_ppo_stats.over_seeds([np.array([0.0, 2.0]), np.array([2.0]), np.array([3.0, 3.0])])
    assert found == pytest.approx((2.0, 2.0 - 2.4841362, 2.0 + 2.4841362), abs=1e-6)
    assert learn_ppo_stats.over_seeds([np.ones(3)]) is None
    assert learn_ppo_stats.over_seeds([np.ones(3)] * 31) is None


def test_student_quantiles() -> None:
    """Half of each density's area lies above zero, and 0.475 between zero and the quantile."""
    for freedom, quantile in enumerate(learn_ppo_stats.STUDENT_975, 1):
        places = np.linspace(0.0, quantile, 200_001)
        scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        density = scale * (1 + places**2 / freedom) ** (-(freedom + 1) / 2)
        assert np.trapezoid(density, places) == pytest.approx(0.475, abs=1e-6)


def test_steps_are_paired_and_forgive_two_errors() -> None:
    """Changes by prompt (-1, 0, -2): mean -1, standard deviation 1, error 1/sqrt(3); -1 is above -2 errors."""
    first, second = np.array([10.0, 20.0, 30.0]), np.array([9.0, 20.0, 28.0])
    one, other = learn_ppo_stats.steps({"a": first, "b": second, "c": second - 0.01 * np.array([1.0, 1.0, 1.1])})
    assert one == pytest.approx(("a", "b", -1.0, 1 / math.sqrt(3)))
    assert one.rises
    assert (other.before, other.after) == ("b", "c")
    assert not other.rises


def test_a_fall_of_two_errors_is_noise_and_more_is_not() -> None:
    assert learn_ppo_stats.Step("a", "b", -2.0, 1.0).rises
    assert not learn_ppo_stats.Step("a", "b", -2.01, 1.0).rises


def test_the_kl_of_a_prompt_is_the_mean_of_its_samples() -> None:
    rows = [{"kl": value} for value in (1.0, 2.0, 5.0, 7.0)]
    found = learn_ppo_stats.per_prompt(replace(report(0.1, 0.0, 0.0), prompts=2, rows=rows), "kl")
    assert found.tolist() == [1.5, 6.0]


def test_best_of_takes_the_highest_of_each_group() -> None:
    assert learn_ppo_stats.best_of([1.0, 3.0, 2.0, 5.0, 5.0, -1.0], 3) == [1, 3]
    with pytest.raises(ValueError, match="4 scores are not groups of 3"):
        learn_ppo_stats.best_of([1.0] * 4, 3)


def test_best_of_kl_bound() -> None:
    assert learn_ppo_stats.best_of_kl_bound(1) == 0.0
    assert learn_ppo_stats.best_of_kl_bound(2) == pytest.approx(0.6931471806 - 0.5)


# Report


def report(gold: float, score: float, kl: float) -> PolicyReport:
    """Eight prompts with two samples: values spread by -+ 0.1 around the given means."""
    spread = [0.1 * (-1) ** index for index in range(8)]
    wide = [own + more for own in spread for more in (-0.05, 0.05)]
    rows = [{"gold": gold + d, "score": score + d, "kl": kl + d} for d in wide]
    columns = {"gold": [gold + d for d in spread], "score": [score + d for d in spread]}
    around = {name: Estimate(mean, mean - 0.1, mean + 0.1) for name, mean in (("gold", gold), ("score", score))}
    return PolicyReport(
        prompts=8,
        samples_per_prompt=2,
        prompts_sha256="p",
        judges={"gold": around["gold"]},
        score=around["score"],
        kl_per_sequence=Estimate(kl, kl - 0.1, kl + 0.1),
        kl_per_token=0.1,
        length=LengthStats(9.0, 9.0, 12.0, 3, 14),
        eos_rate=1.0,
        empty_rate=0.0,
        distinct_1=0.2,
        distinct_2=0.5,
        repetition=0.0,
        per_prompt=columns,
        rows=rows,
    )


def outcome(**changes: Any) -> Outcome:
    """Two seeds, a frontier of three and a length run in which every claim holds."""
    sft, best = report(0.1, 0.0, 0.0), replace(report(0.4, 1.5, 0.0), kl_per_sequence=None)
    sound: dict[str, Any] = {
        "arms": {seed: Arms(sft, best, report(0.6 + seed / 100, 2.5, 10.9), ()) for seed in (0, 1)},
        "frontier": {0.4: report(0.3, 1.0, 3.0), 0.2: report(0.5, 2.0, 6.0), 0.1: report(0.6, 2.5, 9.0)},
        "length": LengthRun({0: sft, 5: report(0.1, 6.0, 20.0)}, (VERDICT,)),
        "best_of": 16,
        "kl_target": 10.0,
        "commands": ("tristage sft recipe.yaml",),
    }
    return Outcome(**{**sound, **changes})


def failing(found: Outcome) -> list[str]:
    return [claim.text for claim in learn_ppo_report.all_claims(found) if not claim.holds]


def test_sound_numbers_bear_out_every_claim() -> None:
    claims = list(learn_ppo_report.all_claims(outcome()))
    assert len(claims) == 1 + 2 + 2 + 3
    assert all(claim.holds for claim in claims)


SFT, LONG = report(0.1, 0.0, 0.0), report(0.1, 6.0, 20.0)
BROKEN: dict[str, tuple[Mapping[str, Any], str]] = {
    "no gain": ({"arms": {0: Arms(SFT, SFT, report(0.1, 2.5, 9.0), ())}}, "PPO above SFT by gold"),
    "two seeds that gain, but differ as much": (
        {"arms": {seed: Arms(SFT, SFT, report(0.2 + seed, 2.5, 9.0), ()) for seed in (0, 1)}},
        "PPO above SFT by gold",
    ),
    "over the target": ({"arms": {0: Arms(SFT, SFT, report(0.6, 2.5, 11.01), ())}}, "seed 0 ends at 11.01 nats"),
    "KL falls": (
        {"frontier": {0.4: report(0.3, 1.0, 3.0), 0.2: report(0.5, 2.0, 2.9)}},
        "KL rises as kl_coef falls, within 2 standard errors, but not from 0.4 to 0.2 (-0.100, error 0.000)",
    ),
    "score falls": ({"frontier": {0.4: SFT, 0.2: report(0.5, -1.0, 1.0)}}, "reward-model score rises as"),
    "broken score does not rise": (
        {"length": LengthRun({0: report(0.4, 6.0, 0.0), 5: report(0.1, 5.0, 9.0)}, (VERDICT,))},
        "the broken reward's score rises",
    ),
    "judge follows": ({"length": LengthRun({0: SFT, 5: report(0.9, 6.0, 9.0)}, (VERDICT,))}, "gold ends below PPO"),
    "health is silent": ({"length": LengthRun({0: SFT, 5: LONG}, ())}, "health reports length_hacking: no such"),
    "another verdict": (
        {"length": LengthRun({0: SFT, 5: LONG}, ({**VERDICT, "name": "exploding_kl"},))},
        "health reports length_hacking: no such",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_claim_fails_by_name(what: str) -> None:
    changes, text = BROKEN[what]
    assert any(found.startswith(text) for found in failing(outcome(**changes))), failing(outcome(**changes))


def test_reports_of_other_prompts_are_refused() -> None:
    other = replace(report(0.6, 2.5, 9.0), prompts_sha256="q")
    with pytest.raises(ValueError, match="different prompts"):
        failing(outcome(arms={0: Arms(SFT, SFT, other, ())}))


def test_the_report_holds_all_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learn_ppo_report.write(tmp_path, outcome())
    numbers = json.loads((tmp_path / "learn_ppo.json").read_text())
    pooled = numbers["pooled"]["ppo - best"]["gold"]
    assert pooled["bootstrap"]["mean"] == pytest.approx(0.205)
    assert pooled["each_seed"] == pytest.approx([0.2, 0.21])
    assert [step["difference"] for step in numbers["steps"]["kl"]] == pytest.approx([3.0, 3.0])
    assert numbers["length"]["gains"]["gold"]["mean"] == 0.0
    assert numbers["length"]["gains"]["score"]["mean"] == pytest.approx(6.0 / math.sqrt(0.1**2 + 0.05**2))
    markdown, shown = (tmp_path / "learn_ppo.md").read_text(), capsys.readouterr().out
    for text in ("holds: seed 1 ends at 10.90 nats", "tristage sft recipe.yaml", "| 0 | best of 16 | <= 1.84 |"):
        assert text in markdown
    assert "holds: PPO above SFT by gold" in shown
    assert (tmp_path / "learn_ppo.png").read_bytes().startswith(b"\x89PNG")


# Runs


def test_words_of_the_recipe_and_of_the_experiment() -> None:
    words = ["--ppo.updates", "3", "--quick", "r.yaml", "--rm.margin=0", "--seeds", "4,5"]
    experiment = learn_ppo._parse(words)
    assert (experiment.recipe, list(experiment.seeds)) == ("r.yaml", [4])
    assert list(experiment.overrides) == ["--ppo.updates", "3", "--rm.margin=0", *learn_ppo.QUICK]


def test_length_rankings_put_the_longest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_workplace(tmp_path)
    monkeypatch.chdir(place.path)
    rows = [
        {"prompt": "a", "responses": [" x y", " x", " x y z", " p q"], "ranks": [0, 1, 2, 3], "split": "train"},
        {"prompt": "b", "responses": [" x", " x y"], "ranks": [0, 1], "split": "train"},
        {"prompt": "c", "responses": [" x", " x y"], "ranks": [0, 1], "split": "eval"},
    ]
    (place.path / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = learn_ppo.length_rankings(load_recipe("recipe.yaml"), 1)
    assert [(row["prompt"], row["ranks"], row["split"]) for row in made] == [
        ("a", [1, 3, 0, 1], "train"),
        ("c", [1, 0], "eval"),
    ]


def experiment(place: Workplace) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "scripts.learn_ppo", "recipe.yaml", "--quick", "--frontier", "0.1,0.4"]
    words += ["--best-of", "4", "--ppo.force", "true", "--tracking.progress", "false"]
    return subprocess.run(
        words, cwd=place.path, env=command_environment(), capture_output=True, text=True, timeout=500, check=False
    )


@pytest.mark.slow
def test_the_whole_experiment_on_tiny_models(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    done = experiment(place)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "claim fails: health reports length_hacking" in done.stderr
    out = place.path / "runs" / "learn"
    numbers = json.loads((out / "learn_ppo.json").read_text())
    assert [point["kl_coef"] for point in numbers["frontier"]] == [0.4, 0.1]
    assert list(numbers["length"]["reports"]) == ["0", "1", "2"]
    assert len(numbers["commands"]) == 3 + 2 + 2
    manifest = json.loads((out / "kl_coef-0.4" / "ppo" / "manifest.json").read_text())
    assert manifest["inputs"]["reward_model"]["path"] == "../../seed0/rm"
    assert manifest["fingerprint"]["sections"]["ppo"]["kl_target_per_sequence"] is None
    assert not (out / "kl_coef-0.4" / "rm").exists()
    saved = json.loads((out / "seed0" / "best_of_4.json").read_text())["report"]
    sft = json.loads((out / "seed0" / "ppo" / "evaluation" / "update_000000.json").read_text())
    assert saved["prompts_sha256"] == sft["prompts_sha256"]
    assert len(saved["rows"]) == len(sft["rows"])
    # SFT's samples are among those that the first slot of each prompt is chosen from
    assert all(best >= plain for best, plain in zip(first_slots(saved), prompt_maxima(sft), strict=True))

    again = experiment(place)
    assert again.stdout.count("done already, skipped") == 7
    assert json.loads((out / "learn_ppo.json").read_text()) == numbers


def first_slots(saved: Mapping[str, Any]) -> list[float]:
    return [row["score"] for row in saved["rows"][:: saved["samples_per_prompt"]]]


def prompt_maxima(saved: Mapping[str, Any]) -> list[float]:
    count = saved["samples_per_prompt"]
    scores = [row["score"] for row in saved["rows"]]
    return [max(scores[start : start + count]) for start in range(0, len(scores), count)]
