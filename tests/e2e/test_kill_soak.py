"""A short soak: four kills on one process, and the plan of a long one."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.checkpoints import SEAL
from scripts.kill_moments import MOMENTS
from scripts.kill_soak import STAGES, Soak, differences, left_over, main, plan
from tests.e2e.test_kill import kill_stage, run_to_the_end
from tests.workplace import Workplace, make_workplace


def test_kills_are_spread_over_stages_and_moments() -> None:
    kills = plan(28, STAGES, 0, 2)
    assert kills == plan(28, STAGES, 0, 2) != plan(28, STAGES, 1, 2)
    assert Counter((kill.stage, kill.moment) for kill in kills) == Counter(
        (stage, moment) for stage in STAGES for moment in MOMENTS
    )
    assert {kill.target for kill in kills} == {"group", "command", "rank"}
    assert {kill.rank for kill in kills} == {0, 1}
    assert {kill.target for kill in plan(28, STAGES, 0, 1)} == {"group", "command"}
    order = [(STAGES.index(kill.stage), MOMENTS.index(kill.moment)) for kill in kills]
    assert order == sorted(order)


def test_what_differs_or_is_left_over_is_found(finished_run: Workplace, tmp_path: Path) -> None:
    """A soak that sees nothing would be content with anything."""
    from rich.console import Console

    place = Workplace(Path(shutil.copytree(finished_run.path, tmp_path / "work")))
    soak = Soak(place, (), Console(quiet=True))
    assert differences(place, finished_run, "ppo") == []
    assert left_over(soak, set()) == []
    manifest = place.run / "ppo" / "manifest.json"
    weights = finished_run.manifest("ppo")["files"]["model.safetensors"]
    manifest.write_text(manifest.read_text().replace(weights, "0" * 64))
    metrics = place.run / "ppo" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step": 3', '"step": 4'))
    assert differences(place, finished_run, "ppo") == ["ppo: model.safetensors differs", "ppo: metrics.jsonl differs"]
    (place.run / "dpo.partial").mkdir()
    (place.run / "ppo" / "requeue.json").touch()
    assert sorted(left_over(soak, set())) == ["dpo.partial is left over", "ppo/requeue.json is left over"]
    assert differences(make_workplace(tmp_path / "empty"), finished_run, "ppo") == ["ppo is not complete"]


@pytest.mark.slow
def test_four_kills_leave_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--kills", "4", "--seed", "3", "--stages", "sft,ppo"])
    out = capsys.readouterr().out
    assert code == 0, out
    assert "4 kills" in out
    assert "nothing is left over" in out


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_a_stage_killed_after_its_last_step_takes_no_further_one(
    copied: Callable[..., Workplace], finished_run: Workplace, stage: str
) -> None:
    """Its twelfth step is not the end of a pass over the data."""
    place = copied(stage)
    checkpoint = place.run / f"{stage}.partial" / "state" / "checkpoint-12"
    kill_stage(place, (stage, "recipe.yaml"), (checkpoint / SEAL).exists)
    assert "resuming from checkpoint-12" in run_to_the_end(place, stage, "recipe.yaml")
    assert differences(place, finished_run, stage) == []
    assert [row["step"] for row in place.rows(stage) if "loss" in row] == list(range(1, 13))
