"""The rm stage end to end on a tiny policy: what it leaves behind, what it refuses, a kill in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from pipeline.adapters import base_sha256
from pipeline.artifacts import open_artifact
from pipeline.checkpoints import newest_complete_checkpoint
from pipeline.errors import UserError
from pipeline.records import Prompt
from pipeline.stage import Stage
from pipeline.tokens import EncodedRanking, Encoder, load_tokenizer
from reward_model.report import RankingData, normalise, ranked_samples
from reward_model.score import load_reward_model, read_normalisation, score_responses
from reward_model.train import run
from tests.tiny_stage import prepare_stage, save_tiny_policy, write_rows

ROOT = Path(__file__).resolve().parents[2]


PROJECTIONS = [f"self_attn.{letter}" for letter in "qkvo"] + [f"mlp.{name}" for name in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def rows(count: int) -> list[dict[str, Any]]:
    """Rankings of two or three answers; the one with more "good" in it is better, a quarter is held out."""
    made = []
    for index in range(count):
        answers = [f" plot {index}", f" good plot {index}", f" good good plot {index}"][: 2 + index % 2]
        scores = [2.0 * answer.count("good") for answer in answers]
        made.append(
            {
                "prompt": f"film {index}",
                "responses": answers,
                "ranks": [len(answers) - 1 - k for k in range(len(answers))],
                "scores": scores,
                "split": "eval" if index % 4 == 0 else "train",
            }
        )
    return made


def recipe(policy: Path, data: Path, trainer: Mapping[str, Any] | None = None, **rm: Any) -> dict[str, Any]:
    settings = {"per_device_train_batch_size": 4, "learning_rate": 0.01, "max_steps": 8, "logging_steps": 2}
    return {
        "name": "tiny",
        "model": {"name_or_path": str(policy)},
        "data": {"preferences": str(data), "max_prompt_tokens": 24, "max_response_tokens": 24},
        "rm": {"normalisation_samples": 24, **rm, "trainer": {**settings, **(trainer or {})}},
        "rollout": {"engine": "transformers"},
        "tracking": {"progress": False},
    }


def open_stage(
    tmp_path: Path, policy: Path, data: list[dict[str, Any]], trainer: Mapping[str, Any] | None = None, **rm: Any
) -> Stage:
    file = write_rows(tmp_path / "rankings.jsonl", data)
    return Stage(prepare_stage(tmp_path / "rm.partial", recipe(policy, file, trainer, **rm), "rm", {"policy": policy}))


def test_the_artifact_is_complete(policy: Path, tmp_path: Path) -> None:
    stage = open_stage(tmp_path, policy, [*rows(32), tied_row()])
    done = stage.complete(run(stage))
    artifact = open_artifact(done, kinds=["rm"], wanted_as="ppo.reward_model")
    present = {file.name for file in done.iterdir()}
    plots = {"calibration.png", "accuracy_by_margin.png", "score_vs_length.png", "score_hist.png"}
    assert plots | {"model.safetensors", "config.json", "tokenizer.json", "evaluation.json", "samples.jsonl"} <= present
    assert not present & {"training_args.bin", "state", "job.json"}
    assert all((done / name).stat().st_size > 5_000 for name in plots)

    manifest = artifact.manifest
    evaluation = json.loads((done / "evaluation.json").read_text())
    assert manifest["all_tied"] == {"train": 1, "eval": 0}
    assert evaluation["pairs"] == 8  # rankings 0, 4 ... 28, two answers each
    assert manifest["metrics"]["eval/accuracy"] == evaluation["accuracy"]
    assert manifest["metrics"]["steps"] == 8
    assert manifest["normalisation"]["samples"] == 24
    assert manifest["normalisation"]["engine"]["name"] == "transformers"
    assert read_normalisation(artifact).std > 0

    logged = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    keys = {key for row in logged for key in row}
    assert {"loss", "accuracy", "margin", "mean_reward", "grad_norm", "learning_rate", "eval/accuracy"} <= keys
    kinds = [json.loads(line)["kind"] for line in (done / "samples.jsonl").read_text().splitlines()]
    assert set(kinds) == {"best", "worst"}

    model = load_reward_model(done, torch.float32, "cpu")
    tokenizer = load_tokenizer(done, stage.recipe.model)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    encoder = Encoder(tokenizer, 24, 24)
    answers = [encoder.response_ids(text)[0] for text in (" plot 3", " good good plot 3")]
    worse, better = score_responses(model, [encoder.prompt_ids(Prompt("film 3"))] * 2, answers).tolist()
    assert better > worse


def test_an_adapter_is_saved_beside_the_model_it_was_merged_into(policy: Path, tmp_path: Path) -> None:
    """Only the adapter and the head are trained; base and adapter give the merged model's scores."""
    stage = open_stage(tmp_path, policy, rows(32), lora=True)
    assert stage.recipe.rm.lora
    done = stage.complete(run(stage))
    assert "parameters are trained" in (done / "log.txt").read_text()
    merged = load_reward_model(done, torch.float32, "cpu")
    base = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
    manifest = json.loads((done / "manifest.json").read_text())
    assert manifest["adapter"] == {"base_sha256": base_sha256(base)}
    before, after = base.state_dict(), merged.state_dict()
    moved = {key.rpartition("_proj.")[0] for key in after if not torch.equal(before[key], after[key])}
    assert {key for key in moved if key} == {f"model.layers.{i}.{m}" for i in (0, 1) for m in PROJECTIONS}
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    PeftModel.from_pretrained(base, str(done / "adapter"))  # adds the adapter's layers to `base` itself
    ids = torch.tensor([[1, 20, 30, 40]])
    trunk = base.base_model(ids).last_hidden_state
    torch.testing.assert_close(trunk, merged.base_model(ids).last_hidden_state, rtol=1e-4, atol=1e-5)


def tied_row() -> dict[str, Any]:
    return {"prompt": "tie", "responses": [" a", " b"], "ranks": [0, 0], "scores": [1, 1], "split": "train"}


def test_weights_are_saved_in_the_dtype_of_the_recipe(policy: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    file = write_rows(tmp_path / "rankings.jsonl", rows(8))
    asked = recipe(policy, file, {"max_steps": 1, "eval_strategy": "no"})
    asked["model"]["dtype"] = "bfloat16"
    stage = Stage(prepare_stage(tmp_path / "rm.partial", asked, "rm", {"policy": policy}))
    run(stage)
    assert {tensor.dtype for tensor in load_file(stage.out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((stage.out / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"trainer": {"learning_rat": 1.0}}, r"rm\.trainer\.learning_rat.*'learning_rate'"),
        ({"trainer": {"center_rewards_coefficient": 0.01}}, r"rm\.trainer\.center_rewards_coefficient"),
        ({"trainer": {"max_length": 8}}, r"rm\.trainer\.max_length"),
        ({"loss": "plackett_luce", "margin": 1.0}, r"rm\.margin has no place"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    policy: Path, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=text):
        run(open_stage(tmp_path, policy, rows(8), **changes))


def test_data_without_an_ordered_pair_is_refused(policy: Path, tmp_path: Path) -> None:
    tied = [tied_row() | {"prompt": f"tie {n}", "split": "eval" if n else "train"} for n in range(3)]
    with pytest.raises(UserError, match="all answers are tied"):
        run(open_stage(tmp_path, policy, tied))


def test_a_margin_without_ratings_is_refused(policy: Path, tmp_path: Path) -> None:
    bare = [{key: value for key, value in row.items() if key != "scores"} for row in rows(8)]
    with pytest.raises(UserError, match=r"rm\.margin needs a rating"):
        run(open_stage(tmp_path, policy, bare, margin=1.0))


def test_a_tokenizer_other_than_the_policys_is_refused(policy: Path, tmp_path: Path) -> None:
    stage = open_stage(tmp_path, policy, rows(8))
    artifact = stage.inputs["policy"]
    stage.inputs = {"policy": type(artifact)(artifact.path, "sft", {"tokenizer_sha256": "0" * 64})}
    with pytest.raises(UserError, match="tokenizer under the recipe's `model` section is not the one"):
        run(stage)


def test_a_reward_model_as_a_start_is_refused(policy: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    classifier = tmp_path / "classifier"
    AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1).save_pretrained(classifier)
    load_tokenizer(policy, open_stage(tmp_path, policy, rows(8)).recipe.model).save_pretrained(classifier)
    with pytest.raises(UserError, match="is a sequence classifier"):
        run(open_stage(tmp_path, classifier, rows(8)))


def test_normalisation_by_hand() -> None:
    # mean (1 + 3 + 5) / 3 = 3, variance (4 + 0 + 4) / 3
    got = normalise([1.0, 3.0, 5.0], {"name": "e", "version": "1"})
    assert got["mean"] == pytest.approx(3.0)
    assert got["std"] == pytest.approx((8 / 3) ** 0.5)
    assert got["samples"] == 3


@pytest.mark.parametrize(
    ("scores", "text"),
    [([2.5] * 5, "reward model is constant"), ([1.0, float("nan")], "not finite"), ([1e6, 1e6 + 1e-3], "constant")],
)
def test_scores_that_cannot_be_normalised_are_refused(scores: list[float], text: str) -> None:
    with pytest.raises(UserError, match=text):
        normalise(scores, {"name": "e", "version": "1"})


def test_samples_show_the_best_and_the_worst_ordered_rankings(policy: Path, tmp_path: Path) -> None:
    encoder = Encoder(load_tokenizer(policy, open_stage(tmp_path, policy, rows(8)).recipe.model), 24, 24)
    held_out = [
        EncodedRanking(
            encoder.prompt_ids(Prompt(f"p{n}")), [encoder.response_ids(t)[0] for t in ("x", "y")], (1.0, 0.0), None
        )
        for n in range(4)
    ]
    scores = [[0.0, 1.0], [0.0, 3.0], [0.0, -2.0], [0.0, 0.5]]
    shown = ranked_samples(RankingData([], held_out, encoder), scores)
    assert [(row["kind"], row["prompt"], row["mean_margin"]) for row in shown] == [
        ("best", "p1", 3.0),
        ("best", "p0", 1.0),
        ("worst", "p2", -2.0),
        ("worst", "p3", 0.5),
    ]
    assert [answer["response"] for answer in shown[0]["answers"]] == ["y", "x"]
    assert [answer["score"] for answer in shown[0]["answers"]] == [3.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_a_killed_run_completes_as_an_uninterrupted_one(policy: Path, tmp_path: Path, lora: bool) -> None:
    from safetensors.torch import load_file

    file = write_rows(tmp_path / "rankings.jsonl", rows(48))
    trainer = {"max_steps": 120, "save_steps": 20, "eval_strategy": "no", "save_total_limit": 9}
    asked = recipe(policy, file, trainer, lora=lora)
    whole = prepare_stage(tmp_path / "whole" / "rm.partial", asked, "rm", {"policy": policy})
    killed = prepare_stage(tmp_path / "killed" / "rm.partial", asked, "rm", {"policy": policy})
    assert start(whole).wait() == 0
    child = start(killed)
    while newest_complete_checkpoint(killed / "state") is None:
        assert child.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    # A write that the kill cut off: newest by name, unusable.
    (killed / "state" / "checkpoint-119").mkdir()
    (killed / "state" / "checkpoint-119" / "trainer_state.json").write_text('{"global_step": 119')
    assert start(killed).wait() == 0
    done, expected = killed.with_name("rm"), whole.with_name("rm")
    log = (done / "log.txt").read_text()
    assert "resuming from checkpoint-" in log
    assert "checkpoint-119" not in log
    ours, theirs = load_file(done / "model.safetensors"), load_file(expected / "model.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (done / "evaluation.json").read_text() == (expected / "evaluation.json").read_text()


def start(out: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "reward_model.train", str(out)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
