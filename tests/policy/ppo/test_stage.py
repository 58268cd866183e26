"""The stage in this process: what ends a run leaves its state saved, and the same stage goes on from there."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaForSequenceClassification

from pipeline.artifacts import finish
from pipeline.errors import UserError
from pipeline.ranks import Ranks
from pipeline.recipe import ModelSection
from pipeline.stage import Stage
from pipeline.tokens import load_tokenizer, tokenizer_sha256
from policy.ppo import stage as ppo_stage
from policy.ppo.stage import run
from rollout.batch import Completion
from rollout.engine import RolloutEngine, SamplingOptions
from rollout.open import open_engine
from rollout.server_client import RolloutServerError
from rollout.split import Named, SharedEngine
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


def _stage(
    place: Workplace,
    reward_model: Path,
    data: Mapping[str, Any] | None = None,
    rollout: Mapping[str, Any] | None = None,
    **ppo: Any,
) -> Stage:
    limits = {"max_prompt_tokens": 24, "max_response_tokens": 8}
    recipe: Mapping[str, Any] = {
        "name": "tiny",
        "model": {"name_or_path": "model"},
        "data": {"prompts": str(place.path / "prompts.jsonl"), **limits, **(data or {})},
        "ppo": {"rollout_batch_size": 8, "num_ppo_epochs": 2, "num_minibatches": 2, "updates": 4, **ppo},
        "rollout": {"engine": "transformers", **(rollout or {})},
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
    assert [file.name for file in stage.state.glob("update_*")] == ["update_000002"]
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


class Fragile:
    """An engine that is a server's to the stage, and that is gone from one call on."""

    def __init__(self, engine: RolloutEngine, ends: str | None, number: int) -> None:
        self.engine, self._ends, self._left = engine, ends, number
        self.name, self.version = "fragile", engine.version

    @property
    def policy_version(self) -> int:
        return self.engine.policy_version

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingOptions, seeds: Sequence[int]
    ) -> list[Completion]:
        self._count("generate")
        return self.engine.generate(prompts, sampling, seeds)

    def load_weights(self, named: Named, *, version: int | None = None) -> None:
        self._count("load_weights")
        self.engine.load_weights(named, version=version)

    def rest(self) -> None:
        self.engine.rest()

    def close(self) -> None:
        self.engine.close()

    def _count(self, method: str) -> None:
        self._left -= method == self._ends
        if self._left < 0:
            raise RolloutServerError("the server is gone.", mend="Start it.")


def _served(
    place: Workplace, reward_model: Path, ends: str | None = None, number: int = 0, async_steps: int = 0
) -> Stage:
    """A stage whose server ends after `number` calls of a method; nothing is saved unless it does."""
    ahead: dict[str, Any] = {"importance_level": "token"} if async_steps else {}
    rollout = {"mode": "server", "async_steps": async_steps}
    stage = _stage(place, reward_model, rollout=rollout, eval_every=3, save_every=9, learning_rate=1e-3, **ahead)

    def connect(*arguments: Any, ranks: Ranks) -> SharedEngine:
        return SharedEngine(Fragile(open_engine(*arguments, kind="transformers", ranks=ranks), ends, number), ranks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_stage, "open_engine", connect)
        try:
            run(stage)
        finally:
            stage.tracker.close()
    return stage


def _numbers(stage: Stage) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (stage.out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


@pytest.mark.parametrize(
    ("ends", "number", "saved"),
    [
        ("generate", 1, None),  # the first is the evaluation of SFT, the second the rollout of update 1
        ("generate", 2, 1),
        ("generate", 4, 3),  # the evaluation after update 3
        ("generate", 6, 4),  # the last evaluation
        ("load_weights", 2, 2),  # the first loads the policy that the stage starts from
        ("load_weights", 4, 4),
    ],
)
def test_a_server_that_is_lost_leaves_the_newest_state_and_a_run_that_ends_the_same(
    tmp_path: Path, ends: str, number: int, saved: int | None
) -> None:
    whole, place = make_workplace(tmp_path / "whole"), make_workplace(tmp_path / "lost")
    expected = _served(whole, _reward_model(whole))
    reward_model = _reward_model(place)
    with pytest.raises(RolloutServerError, match="gone"):
        _served(place, reward_model, ends, number)
    states = place.run / "ppo.partial" / "state"
    assert [path.name for path in states.glob("update_*")] == ([] if saved is None else [f"update_{saved:06d}"])
    assert _numbers(_served(place, reward_model)) == _numbers(expected)
    assert (place.run / "ppo.partial" / "summary.md").exists()


def test_a_server_lost_while_it_samples_ahead_leaves_the_update_that_was_computed_meanwhile(tmp_path: Path) -> None:
    """The rollout that was lost is sampled again, by the weights that the update has made."""
    place = make_workplace(tmp_path / "work")
    reward_model = _reward_model(place)
    with pytest.raises(RolloutServerError, match="gone"):
        _served(place, reward_model, "generate", 3, async_steps=1)
    assert [path.name for path in (place.run / "ppo.partial" / "state").glob("update_*")] == ["update_000002"]
    rows = [row for row in _numbers(_served(place, reward_model, async_steps=1)) if "objective/kl" in row]
    assert [row["rollout/staleness"] for row in rows] == [0.0, 1.0, 0.0, 1.0]
    assert [row["rollout/importance_weight"] == 1.0 for row in rows] == [True, False, True, False]
