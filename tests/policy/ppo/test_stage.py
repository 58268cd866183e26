"""The stage in this process: a run whose critic overflows stops with its state saved, and goes on when allowed to."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaForSequenceClassification

from pipeline.artifacts import finish
from pipeline.errors import UserError
from pipeline.recipe import ModelSection
from pipeline.stage import Stage
from pipeline.tokens import load_tokenizer, tokenizer_sha256
from policy.ppo.stage import run
from tests.tiny_stage import prepare_stage
from tests.workplace import Workplace, make_workplace


def _reward_model(place: Workplace, **changes: Any) -> Path:
    """An artifact of the rm stage with a random model, which passes the gate."""
    partial, final = place.run / "rm.partial", place.run / "rm"
    shutil.copytree(place.path / "model", partial)
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(partial, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(partial)
    manifest = {
        "kind": "rm",
        "fingerprint": {"sha256": "made by hand"},
        "tokenizer_sha256": tokenizer_sha256(load_tokenizer(partial, ModelSection(name_or_path="model"))),
        "chat_template_sha256": None,
        "normalisation": {"mean": 0.0, "std": 1.0},
        "metrics": {"eval/accuracy": 0.8, "eval/accuracy_low": 0.7, "eval/accuracy_high": 0.9, "eval/pairs": 50},
        **changes,
    }
    finish(partial, final, manifest)
    return final


def _stage(place: Workplace, reward_model: Path, data: Mapping[str, Any] | None = None, **ppo: Any) -> Stage:
    limits = {"max_prompt_tokens": 24, "max_response_tokens": 8}
    recipe: Mapping[str, Any] = {
        "name": "tiny",
        "model": {"name_or_path": "model"},
        "data": {"prompts": str(place.path / "prompts.jsonl"), **limits, **(data or {})},
        "ppo": {"rollout_batch_size": 8, "num_ppo_epochs": 2, "num_minibatches": 2, "updates": 4, **ppo},
        "rollout": {"engine": "transformers"},
        "eval": {"prompts": 2, "samples_per_prompt": 1},
    }
    inputs = {"policy": place.path / "model", "reward_model": reward_model}
    return Stage(prepare_stage(place.run / "ppo.partial", recipe, "ppo", inputs))


def test_an_overflow_stops_with_the_state_saved_and_more_skips_go_on_from_there(tmp_path: Path) -> None:
    """The first of four steps moves the critic to 1e30: 3 steps are skipped in update 1, 4 in each after it."""
    place = make_workplace(tmp_path / "work")
    reward_model = _reward_model(place)
    stage = _stage(place, reward_model, critic_learning_rate=1e30)
    with pytest.raises(UserError, match=r"^update 2: 7 optimiser steps were skipped.*max_skipped_steps is 3") as caught:
        run(stage)
    assert str(stage.state) in caught.value.message
    assert [file.name for file in stage.state.glob("update_*")] == ["update_000002.pt"]
    log = (stage.out / "log.txt").read_text()
    assert "1 update = 8 sequences, 2 epochs x 2 minibatches = 4 optimiser steps of 4 sequences" in log
    assert log.count("the optimiser step was skipped") == 7
    assert "8 of 8 rows did it: 0, 1, 2, 3 ...; prompt of row 0: '" in log
    assert "health, update 2: skipped_steps" in log
    stage.tracker.close()

    allowed = _stage(place, reward_model, critic_learning_rate=1e30, max_skipped_steps=100)
    final = allowed.complete(run(allowed))
    assert "resumed after update 2 of 4" in (final / "log.txt").read_text()
    rows = [json.loads(line) for line in (final / "metrics.jsonl").read_text().splitlines()]
    assert [row["policy/skipped_steps"] for row in rows if "objective/kl" in row] == [3.0, 7.0, 11.0, 15.0]
    said = [
        (verdict["name"], verdict["update"]) for verdict in json.loads((final / "manifest.json").read_text())["health"]
    ]
    assert ("skipped_steps", 2) in said
    assert said == sorted(said, key=lambda verdict: verdict[1])


def test_a_forced_start_says_what_it_overrides(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    stage = _stage(place, _reward_model(place, metrics={}, normalisation=None), updates=1, force=True)
    run(stage)
    log = (stage.out / "log.txt").read_text()
    assert "ppo.force overrides" in log
    assert "its held-out accuracy has no interval" in log
    assert "no score normalisation is stored" in log


def test_an_update_logs_the_cpu_seconds_of_its_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of sleep in the reward of each rollout batch is wall time of the experience and no CPU time."""
    (tmp_path / "sleepy.py").write_text(
        "import time\n\ndef score(prompts, responses, columns):\n"
        "    time.sleep(1.0 if len(prompts) == 8 else 0.0)\n    return [0.0] * len(prompts)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    place = make_workplace(tmp_path / "work")
    rewards = {"rm": {"model": "rm"}, "sleepy": {"function": "sleepy:score"}}
    stage = _stage(place, _reward_model(place), updates=2, rewards=rewards)
    before = time.process_time()
    run(stage)
    spent = time.process_time() - before
    rows = [json.loads(line) for line in (stage.out / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if "time/update" in row]
    assert len(updates) == 2
    for row in updates:
        assert row["time/experience"] > 1.0
        assert 0.0 < row["time/cpu_seconds"] < 1.0
    assert sum(row["time/cpu_seconds"] for row in updates) < spent
