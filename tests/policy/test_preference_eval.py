"""Reports of a direct method on the way, and the same ones after a run that was stopped and went on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.evaluation.saved import load_reports
from pipeline.stage import Stage
from policy.preference import run
from tests.policy.test_preference import rows_of, stage_of
from tests.workplace import make_workplace

JUDGED = {"judges": {"characters": {"function": "length_judge:characters"}}}


def test_reports_on_the_way_judge_one_sample_and_the_last_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations after 3 and 6 of 6 steps; the first one again from the checkpoint of step 2."""
    place = make_workplace(tmp_path / "work")
    monkeypatch.syspath_prepend(place.path)
    stage = stage_of(place, "dpo", evaluation=JUDGED)
    whole = stage.complete(run(stage)).rename(tmp_path / "whole")
    reports = load_reports(whole)
    assert list(reports) == [0, 3, 6]
    assert [report.samples_per_prompt for report in reports.values()] == [2, 1, 2]
    assert len({report.prompts_sha256 for report in reports.values()}) == 1
    assert [row["step"] for row in rows_of(whole, "eval/characters")] == [3, 6]
    for step, report in reports.items():
        assert report.prompts == 4
        assert report.kl_per_sequence is not None
        assert (report.kl_per_sequence.mean == 0.0) == (step == 0)
        assert report.judges["characters"].mean == pytest.approx(
            sum(len(row["response"]) for row in report.rows) / len(report.rows)
        )
    metrics = json.loads((whole / "manifest.json").read_text())["metrics"]
    assert metrics["eval/characters"] == reports[6].judges["characters"].mean

    stage = stage_of(place, "dpo", evaluation=JUDGED)
    run(stage)
    for step in (4, 6):
        shutil.rmtree(stage.state / f"checkpoint-{step}", ignore_errors=True)
    again = Stage(stage.out)
    resumed = again.complete(run(again))
    for file in sorted((whole / "evaluation").iterdir()):
        assert (resumed / "evaluation" / file.name).read_bytes() == file.read_bytes(), file.name
    assert rows_of(resumed, "eval/characters") == rows_of(whole, "eval/characters")


def test_the_kl_reads_each_prompt_in_the_form_of_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contrast SFT asks `Q: ...`, its start the bare prompt; log-probabilities of both by transformers alone."""
    place = make_workplace(tmp_path / "work")
    monkeypatch.syspath_prepend(place.path)
    texts = {
        "training": "{instruction}{prompt}{rejected} {prompt}{chosen}",
        "inference": "{instruction}{prompt}{chosen}",
    }
    stage = stage_of(place, "contrast", evaluation=JUDGED, template=texts, instruction="Q: ")
    final = stage.complete(run(stage))
    report = load_reports(final)[6]
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (final, place.path / "model")]
    tokenizer = AutoTokenizer.from_pretrained(place.path / "model")
    checked = 0
    for row in report.rows:
        given = tokenizer(row["response"], add_special_tokens=False).input_ids + [2] * row["finished"]
        if len(given) != row["tokens"] or "\ufffd" in row["response"]:
            continue  # bytes that are no text do not come back as the tokens that were sampled
        sums = []
        for model, text in zip(models, (f"Q: {row['prompt']}", row["prompt"]), strict=True):
            asked = [1, *tokenizer(text, add_special_tokens=False).input_ids]
            logp = model(torch.tensor([asked + given])).logits[0].log_softmax(-1)
            sums.append(sum(logp[len(asked) + t - 1, token].item() for t, token in enumerate(given)))
        assert row["kl"] == pytest.approx(sums[0] - sums[1], abs=1e-4)
        checked += 1
    assert checked
