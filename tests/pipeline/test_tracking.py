from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.tracking import ProgressDisplay, Tracker, progress_display, read_metrics


def recipe(**tracking: object) -> Recipe:
    return Recipe.model_validate({"name": "tiny", "model": {"name_or_path": "model"}, "tracking": tracking})


def tracker(out: Path) -> Tracker:
    return Tracker(out, recipe(), "sft")


def sample_rows(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().split("\n")[:-1]]


def test_rows_are_appended_and_written_at_once(tmp_path: Path) -> None:
    tracking = tracker(tmp_path)
    tracking.log(1, {"loss": 0.5, "kl": 2})
    tracking.log(2, {"loss": float("nan"), "kl": float("-inf")})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5, "kl": 2.0},
        {"step": 2, "loss": "nan", "kl": "-inf"},
    ]


@pytest.mark.parametrize("cut", range(1, 27))
def test_a_line_cut_off_by_a_kill_is_dropped_and_the_file_goes_on(tmp_path: Path, cut: int) -> None:
    tracking = tracker(tmp_path)
    tracking.log(1, {"loss": 0.5})
    tracking.log(2, {"loss": 0.25})
    file = tmp_path / "metrics.jsonl"
    os.truncate(file, file.stat().st_size - cut)
    resumed = tracker(tmp_path)
    resumed.log(2, {"loss": 0.25})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


def test_a_cut_inside_a_character_of_several_bytes_is_dropped(tmp_path: Path) -> None:
    tracking = tracker(tmp_path)
    tracking.samples(0, [{"response": "été"}, {"response": "é"}])
    file = tmp_path / "samples.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[: content.rindex("é".encode()) + 1])
    tracker(tmp_path)
    assert sample_rows(tmp_path) == [{"step": 0, "response": "été"}]


def test_rewind_drops_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    tracking = tracker(tmp_path)
    for step in range(4):
        tracking.log(step, {"loss": step})
        tracking.samples(step, [{"response": "a"}, {"response": "b"}])
    tracker(tmp_path).rewind(2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]
    assert [row["step"] for row in sample_rows(tmp_path)] == [0, 0, 1, 1, 2, 2]
    tracker(tmp_path).rewind(-1)
    assert read_metrics(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_a_step_is_never_there_twice(tmp_path: Path) -> None:
    """SFT logs its validation loss after the last step, which a resumed run repeats without rewinding past it."""
    for value in (1.0, 2.0):
        tracking = tracker(tmp_path)
        tracking.rewind(5)
        tracking.log(5, {"validation_loss": value})
        tracking.samples(0, [{"response": str(value)}])
    tracking.log(5, {"loss": 3.0})
    assert read_metrics(tmp_path) == [{"step": 5, "validation_loss": 2.0}, {"step": 5, "loss": 3.0}]
    assert sample_rows(tmp_path) == [{"step": 0, "response": "2.0"}]


def test_texts_with_line_separators_stay_one_row(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\x0bd\ne"
    tracker(tmp_path).samples(0, [{"response": text, "score": float("nan")}])
    tracker(tmp_path).rewind(0)
    assert sample_rows(tmp_path) == [{"step": 0, "response": text, "score": "nan"}]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        tracker(tmp_path)


def test_plain_lines_show_six_numbers_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_display(Console(), "ppo", 100, enabled=True) as display:
        assert isinstance(display, ProgressDisplay)
        display.update(1, {f"n{i}": i / 10 for i in range(9)})
        display._last_line = -1e9
        display.update(50, {"loss": 1234.5})
        display.update(100, {"loss": 2})
    first, half, last = capsys.readouterr().out.splitlines()
    assert first == "ppo 1/100  n0 0  n1 0.1  n2 0.2  n3 0.3  n4 0.4  n5 0.5"
    assert half.startswith("ppo 50/100  ")
    assert " left  loss 1234" in half
    assert last == "ppo 100/100  loss 2"


def test_lines_are_rare(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_display(Console(), "sft", 1000, enabled=False) as display:
        for step in range(1, 100):
            display.update(step, {})
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_terminal_gets_a_live_display() -> None:
    console = Console(force_terminal=True, width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with progress_display(console, "ppo", 10, enabled=True) as display:
        display.update(5, {"kl": 0.25})
    shown = console.export_text()
    assert "5/10" in shown
    assert "kl 0.25" in shown


@pytest.mark.slow
def test_wandb_offline_keeps_its_run_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    out = tmp_path / "tiny" / "sft.partial"
    out.mkdir(parents=True)
    for step in (1, 2):
        tracking = Tracker(out, recipe(wandb="offline"), "sft")
        tracking.log(step, {"loss": 0.5})
        tracking.samples(step, [{"prompt": "a", "response": "b"}])
        tracking.summary({"validation_loss": 1.0})
        tracking.alert("tiny: clipfrac_high", "the policy moves too far")
        tracking.close(failed=step == 1)
        tracking.close()
    identifier = (out / "wandb_id.txt").read_text()
    runs = list((tmp_path / "tiny" / "wandb").glob("offline-run-*"))
    assert runs
    assert all(run.name.endswith(identifier) for run in runs)
    assert [row["step"] for row in read_metrics(out)] == [1, 2]
    shutil.rmtree(tmp_path / "tiny" / "wandb")
