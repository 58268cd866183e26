"""The generate stage on a tiny policy with the transformers engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluation.policy_eval import SampledResponses
from pipeline.recipe import ModelSection
from pipeline.records import Prompt
from pipeline.tokens import Encoder, load_tokenizer
from rollout.batch import Completion
from rollout.generate import sample_rows
from tests.tiny_stage import demonstrations, prepare_stage, save_tiny_policy, write_rows


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def _generate(policy: Path, out: Path, **sections: Any) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    from pipeline.stage import Stage
    from rollout.generate import run

    out.parent.mkdir(parents=True, exist_ok=True)
    rows = write_rows(out.parent / "sft.jsonl", demonstrations(32))
    recipe = {
        "name": "tiny",
        "model": {"name_or_path": str(policy)},
        "data": {"sft": str(rows), "max_prompt_tokens": 24, "max_response_tokens": 10},
        "rollout": {"engine": "transformers"},
        "eval": {"prompts": 3, "samples_per_prompt": 2},
        "tracking": {"progress": False},
        **sections,
    }
    stage = Stage(prepare_stage(out, recipe, "generate", {"policy": policy}))
    metrics = run(stage)
    final = stage.complete(metrics)
    manifest = json.loads((final / "manifest.json").read_text())
    return [json.loads(line) for line in (final / "samples.jsonl").read_text().splitlines()], metrics, manifest


def test_rows_metrics_and_manifest(policy: Path, tmp_path: Path) -> None:
    rows, metrics, manifest = _generate(policy, tmp_path / "generate.partial")
    assert [row["prompt"] for row in rows] == [
        prompt for prompt in ("row 0 this", "row 4 quiet", "row 8 cast") for _ in range(2)
    ]
    assert all(row.keys() == {"prompt", "response", "finished", "tokens", "logprob"} for row in rows)
    assert all(row["finished"] or row["tokens"] == 10 for row in rows)
    assert metrics["responses"] == 6
    assert metrics["tokens"] == sum(row["tokens"] for row in rows)
    assert metrics["mean_length"] == pytest.approx(metrics["tokens"] / 6)
    assert metrics["eos_rate"] == pytest.approx(sum(row["finished"] for row in rows) / 6)
    assert manifest["engine"]["name"] == "transformers"
    assert manifest["engine"]["tokens_per_second"] == pytest.approx(metrics["tokens_per_second"], abs=0.06)
    assert manifest["data"]["prompts"]["eval"] == 8


def test_logprob_is_the_sum_over_the_response(policy: Path) -> None:
    tokenizer = load_tokenizer(policy, ModelSection(name_or_path=str(policy)))
    encoder = Encoder(tokenizer, 24, 10)
    prompt = Prompt("this film")
    ids, _ = encoder.response_ids(" is")
    whole = Completion(tuple(ids), tuple(-0.25 * (n + 1) for n in range(len(ids))), True)
    cut = Completion(tuple(ids[:1]), (-3.5,), False)
    rows = sample_rows(SampledResponses([prompt], [encoder.prompt_ids(prompt)], [[whole, cut]]), encoder)
    assert [row["logprob"] for row in rows] == [-0.25 * len(ids) * (len(ids) + 1) / 2, -3.5]
    assert [(row["tokens"], row["finished"]) for row in rows] == [(len(ids), True), (1, False)]
    assert rows[0]["response"] == " is"


def test_samples_depend_on_the_seed_alone(policy: Path, tmp_path: Path) -> None:
    first, _, _ = _generate(policy, tmp_path / "a" / "generate.partial")
    again, _, _ = _generate(policy, tmp_path / "b" / "generate.partial")
    other, _, _ = _generate(policy, tmp_path / "c" / "generate.partial", seed=9)
    assert first == again
    assert [row["response"] for row in first] != [row["response"] for row in other]
