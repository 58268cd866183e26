"""The three stages as a person runs them: real processes, real files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workplace import Workplace

STAGES = ("sft", "rm", "ppo")


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("stage", STAGES)
def test_an_artifact_directory_is_as_promised(finished_run: Workplace, stage: str) -> None:
    directory = finished_run.run / stage
    manifest = finished_run.manifest(stage)
    there = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert there == {*manifest["files"], "manifest.json"}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "recipe.resolved.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "log.txt",
    } <= there
    assert manifest["files"] == {name: sha256(directory / name) for name in manifest["files"]}
    assert not list(finished_run.run.glob("*.partial"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_manifest_names_all_that_made_the_stage(finished_run: Workplace, stage: str) -> None:
    manifest = finished_run.manifest(stage)
    assert manifest["kind"] == stage
    assert manifest["seed"] == 0
    assert len(manifest["tokenizer_sha256"]) == 64
    assert "chat_template_sha256" in manifest
    assert {"python", "tristage", "torch", "transformers", "trl"} <= set(manifest["packages"])
    assert manifest["command"] == "tristage run recipe.yaml"
    for key in ("wall_seconds", "cpu_seconds", "peak_memory_gib"):
        assert manifest[key] > 0
    assert manifest["metrics"]
    assert "'split_seed': 0" in str(manifest["data"])
    assert str(finished_run.path) not in json.dumps(manifest)
    for entry in manifest["inputs"].values():
        source = (finished_run.run / stage / entry["path"]).resolve()
        assert source.is_dir()
        if (source / "manifest.json").exists():
            assert entry["manifest"] == sha256(source / "manifest.json")


def test_inputs_follow_one_another(finished_run: Workplace) -> None:
    inputs = {name: {role: e["path"] for role, e in finished_run.manifest(name)["inputs"].items()} for name in STAGES}
    assert inputs == {
        "sft": {"model": "../../../model"},
        "rm": {"policy": "../sft"},
        "ppo": {"policy": "../sft", "reward_model": "../rm"},
    }


def test_what_the_stages_hand_on(finished_run: Workplace) -> None:
    assert finished_run.manifest("rm")["normalisation"]["std"] > 0
    assert finished_run.manifest("ppo")["engine"]["name"] == "transformers"
    policies = {finished_run.manifest(name)["files"]["model.safetensors"] for name in STAGES}
    assert len(policies) == 3
    assert (finished_run.run / "ppo" / "summary.md").exists()


def test_metrics_and_samples_have_a_row_per_step(finished_run: Workplace) -> None:
    updates = [row["step"] for row in finished_run.rows("ppo") if "objective/kl" in row]
    evaluated = [row["step"] for row in finished_run.rows("ppo") if "eval/kl" in row]
    assert updates == list(range(1, 8))
    assert evaluated == [0, 3, 6, 7]
    assert [row["step"] for row in finished_run.rows("ppo", "samples.jsonl")] == [0, 0, 3, 3, 6, 6, 7, 7]
    assert [row["step"] for row in finished_run.rows("sft") if "loss" in row] == list(range(1, 13))


def test_models_load_as_they_are(finished_run: Workplace) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    for stage in ("sft", "ppo"):
        AutoModelForCausalLM.from_pretrained(finished_run.run / stage)
        assert AutoTokenizer.from_pretrained(finished_run.run / stage).pad_token == "<pad>"
    assert AutoModelForSequenceClassification.from_pretrained(finished_run.run / "rm").config.num_labels == 1


def test_a_second_run_skips_every_stage_at_once(finished_run: Workplace) -> None:
    """No stage starts, which would take several times as long: it imports torch."""
    before = time.monotonic()
    done = finished_run.tristage("run", "recipe.yaml", "--tracking.progress", "false")
    seconds = time.monotonic() - before
    assert done.returncode == 0
    assert done.stdout.splitlines() == [f"{name}: done already, skipped (runs/tiny/{name})" for name in STAGES]
    assert seconds < 5 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def test_a_moved_working_directory_is_still_done(copied: Callable[..., Workplace]) -> None:
    done = copied().tristage("run", "recipe.yaml")
    assert done.stdout.count("done already, skipped") == 3


def test_a_done_stage_needs_its_input_to_be_there(copied: Callable[..., Workplace]) -> None:
    place = copied("sft")
    done = place.tristage("ppo", "recipe.yaml")
    assert done.returncode == 2
    assert "ppo.policy: runs/tiny/sft does not exist" in done.stderr


def test_a_changed_recipe_is_refused_with_what_changed(copied: Callable[..., Workplace]) -> None:
    place = copied()
    done = place.tristage("run", "recipe.yaml", "--ppo.kl_coef", "0.5", "--seed", "4")
    assert done.returncode == 2
    assert done.stderr == (
        "error: sft: runs/tiny/sft was made from something else; different now: seed (0 -> 4). "
        "Use --overwrite to replace it, or another `name`.\n"
    )
    done = place.tristage("ppo", "recipe.yaml", "--ppo.kl_coef", "0.5", "--tracking.project", "x")
    assert "different now: ppo.kl_coef (0.05 -> 0.5). Use --overwrite" in done.stderr


@pytest.mark.slow
def test_overwrite_keeps_the_old_artifact_until_the_new_one_is_complete(copied: Callable[..., Workplace]) -> None:
    place = copied()
    old = place.manifest("rm")
    words = ("rm", "recipe.yaml", "--overwrite", "--rm.trainer.max_steps", "4")
    failed = place.tristage(*words, "--rm.trainer.optim", "no_such_optimiser")
    assert failed.returncode == 2
    assert "no_such_optimiser" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert place.manifest("rm") == old
    done = place.tristage(*words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert place.manifest("rm")["metrics"]["steps"] == 4
    assert sorted(path.name for path in place.run.iterdir() if path.is_dir()) == ["ppo", "rm", "sft"]
    after = place.tristage("ppo", "recipe.yaml")
    assert after.returncode == 2
    assert "different now: the contents of the input reward_model." in after.stderr


def test_an_unfinished_run_of_something_else_is_refused(copied: Callable[..., Workplace]) -> None:
    place = copied("ppo")
    partial = place.run / "ppo.partial"
    shutil.copytree(place.run / "rm", partial)
    (partial / "manifest.json").unlink()
    fingerprint = {"sha256": "0" * 64, "sections": {"ppo": {"kl_coef": 9.0}}, "seed": 0}
    job = {"stage": "ppo", "fingerprint": fingerprint, "spent": {"wall_seconds": 0.0, "cpu_seconds": 0.0}}
    (partial / "job.json").write_text(json.dumps(job))
    done = place.tristage("ppo", "recipe.yaml")
    assert done.returncode == 2
    assert "ppo.partial is an unfinished run of something else; different now: ppo.kl_coef (9.0 -> 0.05)" in done.stderr
    assert partial.exists()


@pytest.mark.slow
def test_generate_samples_from_any_policy(copied: Callable[..., Workplace]) -> None:
    place = copied("ppo")
    done = place.tristage("generate", "recipe.yaml", "--policy", "runs/tiny/sft")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(place.rows("generate", "samples.jsonl")) == 8
    assert place.manifest("generate")["inputs"]["policy"]["path"] == "../sft"


@pytest.mark.slow
def test_wandb_offline_groups_the_stages_of_a_run(copied: Callable[..., Workplace]) -> None:
    place = copied("ppo")
    done = place.tristage("ppo", "recipe.yaml", "--tracking.wandb", "offline")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "wandb_id.txt" in place.manifest("ppo")["files"]
    identifier = (place.run / "ppo" / "wandb_id.txt").read_text()
    assert [path.name.rpartition("-")[2] for path in (place.run / "wandb").glob("offline-run-*")] == [identifier]
