from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import pytest

from pipeline.report import samples as module
from pipeline.report.facts import Facts
from pipeline.report.samples import pack, sample_browser
from tests.pipeline.report.fixture import results, samples


def unpacked(text: str) -> dict[str, Any]:
    return json.loads(zlib.decompress(base64.b64decode(text)))


def test_packed_answers_come_back_as_they_were() -> None:
    found = results(["sft", "dpo"], seeds=2)
    rows = samples(found, prompts=3, per_prompt=2)
    del rows[1]["answers"]["dpo"][1]
    packed = unpacked(pack(Facts(found), rows))
    assert packed["rows"] == [[row["prompt_index"], row["sample"], row["prompt"]] for row in rows]
    assert packed["judges"] == ["vader", "naive_bayes", "reward model (trained on)", "KL"]
    columns = packed["answers"]["dpo"][1]
    assert columns["text"][1] is None
    assert columns["values"][0][1] is None
    answer = rows[2]["answers"]["dpo"][1]
    assert columns["text"][2] == answer["response"]
    assert columns["tokens"][2] == answer["tokens"]
    expected = [answer["scores"]["vader"], answer["scores"]["naive_bayes"], answer["score"], answer["kl"]]
    assert [values[2] for values in columns["values"]] == pytest.approx(expected, abs=5e-4)


def test_what_does_not_fit_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = results(["sft", "dpo"])
    facts, rows = Facts(found), samples(found, prompts=40, per_prompt=4)
    monkeypatch.setattr(module, "PACKED_LIMIT", int(len(pack(facts, rows)) * 0.6))
    browser = sample_browser(facts, rows)
    assert browser is not None
    assert {row[1] for row in unpacked(browser.packed)["rows"]} == {0, 1}
    assert browser.note == (
        "The page holds 2 of 4 samples of 40 of 40 prompts; samples.jsonl holds all (40 prompts, 4 samples each)."
    )
    monkeypatch.setattr(module, "PACKED_LIMIT", len(pack(facts, rows)) // 10)
    browser = sample_browser(facts, rows)
    assert browser is not None
    kept = unpacked(browser.packed)["rows"]
    assert len(browser.packed) <= module.PACKED_LIMIT
    assert 0 < len(kept) < 40
    assert f"1 of 4 samples of {len(kept)} of 40 prompts" in browser.note


def test_no_samples_no_browser() -> None:
    assert sample_browser(Facts(results()), []) is None
