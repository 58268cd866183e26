"""recipes/hh-harmless-tiny.yaml from an empty folder: one file in the format of Anthropic/hh-rlhf feeds every stage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.data import load_prompts, load_rankings
from pipeline.preferences import load_demonstrations
from pipeline.recipe import DataSection
from tests.workplace import ROOT, command_environment

RECIPE = "recipes/hh-harmless-tiny.yaml"
SHORT = {
    "sft.trainer.num_train_epochs": "1",
    "rm.trainer.num_train_epochs": "1",
    "ppo.force": "true",
    "ppo.updates": "2",
    "ppo.eval_every": "2",
    "dpo.trainer.max_steps": "4",
    "eval.prompts": "8",
    "tracking.progress": "false",
}


def test_every_stage_reads_the_same_transcripts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.hh_tiny", str(tmp_path / "rows")]
    subprocess.run(command, cwd=ROOT, env=command_environment(), check=True)
    data = DataSection(preferences=str(tmp_path / "rows"), eval_fraction=0.2)
    rankings, shown, prompts = load_rankings(data), load_demonstrations(data), load_prompts(data)
    assert (rankings.report["form"], rankings.report["rows"]) == ("chosen/rejected", 160)
    turns = [ranking.prompt.key.count("\n\nHuman:") for ranking in rankings.train + rankings.eval]
    assert (turns.count(1), turns.count(2)) == (64, 96)
    best = [(ranking.prompt, ranking.responses[0]) for ranking in rankings.train]
    assert [(example.prompt, example.response) for example in shown.train] == best
    assert {prompt.content for prompt in prompts.eval} == {ranking.prompt.content for ranking in rankings.eval}


@pytest.mark.slow
def test_the_whole_path(tmp_path: Path) -> None:
    for name in ("assets", "recipes", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    words = [word for key, value in SHORT.items() for word in (f"--{key}", value)]
    for stage in ("sft", "rm", "ppo", "dpo"):
        command = [sys.executable, "-m", "pipeline.cli", stage, RECIPE, *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=command_environment(), capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "hh-harmless-tiny"
    manifests = {name: json.loads((run / name / "manifest.json").read_text()) for name in ("sft", "rm", "ppo", "dpo")}
    assert manifests["sft"]["data"]["sft"]["conversion"]["to"] == "targets"
    assert manifests["rm"]["metrics"]
    for name in ("ppo", "dpo"):
        assert manifests[name]["inputs"]["policy"]["path"] == "../sft"
        first = json.loads((run / name / "samples.jsonl").read_text().splitlines()[0])
        assert first["prompt"].startswith("\n\nHuman:")
        assert first["prompt"].endswith("\n\nAssistant:")
