from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.compare.arms import Step
from pipeline.compare.run import Options, _refuse_uncounted, compare
from pipeline.errors import UserError
from pipeline.load import load_recipe
from pipeline.recipe import Recipe
from tests.workplace import ROOT


def demo(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / "demo.yaml", overrides)


def finished(tmp_path: Path, metrics: dict[str, float]) -> Step:
    step = Step("dpo", demo("--output_dir", str(tmp_path)), {})
    step.out.mkdir(parents=True)
    manifest = {"version": 1, "kind": "dpo", "files": {}, "fingerprint": {"sha256": "0"}, "metrics": metrics}
    (step.out / "manifest.json").write_text(json.dumps(manifest))
    return step


def test_a_stage_that_counted_nothing_is_refused_before_others_are_trained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="demo/dpo was made by an earlier version"):
        _refuse_uncounted(finished(tmp_path / "old", {"steps": 3.0}))
    _refuse_uncounted(finished(tmp_path / "new", {"trained_tokens": 9.0}))


def test_a_judge_that_ppo_maximises_cannot_lead() -> None:
    rewards = '{"mine": {"function": "scripts.demo_judges:vader"}}'
    keys = ("--ppo.rewards", rewards, "--compare.headline_judge", "vader")
    with pytest.raises(UserError, match=r"headline_judge: vader is a function of ppo\.rewards: PPO is trained on it"):
        compare(demo(*keys), Options(["tristage"]))
