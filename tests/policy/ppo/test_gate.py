"""The gate before PPO: what it refuses, what `ppo.force` lets through, and the batch arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import Artifact, open_artifact
from pipeline.errors import UserError
from pipeline.recipe import ModelSection, PpoSection
from pipeline.tokens import chat_template_sha256, load_tokenizer, tokenizer_sha256
from policy.ppo.gate import admit, batch_arithmetic
from reward_model.score import Normalisation
from tests.pipeline.conftest import CHAT_TEMPLATE, save_tiny_tokenizer

METRICS = {"eval/accuracy": 0.6, "eval/accuracy_low": 0.51, "eval/accuracy_high": 0.7, "eval/pairs": 40}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=CHAT_TEMPLATE)
    return load_tokenizer(directory, ModelSection(name_or_path="m"))


@pytest.fixture
def manifest(tokenizer: Any) -> dict[str, Any]:
    return {
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "chat_template_sha256": chat_template_sha256(tokenizer),
        "normalisation": {"mean": 0.4, "std": 2.0},
        "metrics": METRICS,
    }


def _admitted(manifest: dict[str, Any], tokenizer: Any, *, force: bool = False) -> tuple[Normalisation, list[str]]:
    said: list[str] = []
    reward_model = Artifact("runs/x/rm", "rm", manifest)
    got = admit(reward_model, Artifact("runs/x/sft", "sft"), tokenizer, force=force, say=said.append)
    return got, said


def test_a_reward_model_that_fits_and_knows_better_passes(manifest: dict[str, Any], tokenizer: Any) -> None:
    assert _admitted(manifest, tokenizer) == (Normalisation(0.4, 2.0), [])
    assert _admitted(manifest, tokenizer, force=True) == (Normalisation(0.4, 2.0), [])
    other = {**manifest, "tokenizer_sha256": "0" * 64, "chat_template_sha256": None}
    assert _admitted(other, tokenizer) == (Normalisation(0.4, 2.0), [])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "interval that includes chance": (
        {"metrics": {**METRICS, "eval/accuracy_low": 0.5}},
        r"runs/x/rm: its held-out accuracy is 0\.600 \[0\.500, 0\.700\] on 40 pairs; the 95% interval includes 50%",
    ),
    "worse than chance": (
        {"metrics": {**METRICS, "eval/accuracy": 0.4, "eval/accuracy_low": 0.3, "eval/accuracy_high": 0.49}},
        "lies below 50%",
    ),
    "no interval": ({"metrics": {**METRICS, "eval/accuracy_low": None, "eval/accuracy_high": None}}, "no interval"),
    "nothing measured": ({"metrics": {}}, "no interval"),
    "no normalisation": ({"normalisation": None}, "no score normalisation"),
    "no spread": ({"normalisation": {"mean": 0.0, "std": 0.0}}, r"std 0\.0"),
    "chat template": ({"chat_template_sha256": None}, "another chat template than the policy runs/x/sft"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_the_gate_refuses_and_force_overrides(manifest: dict[str, Any], tokenizer: Any, case: str) -> None:
    change, words = BAD[case]
    with pytest.raises(UserError, match=words) as caught:
        _admitted({**manifest, **change}, tokenizer)
    assert caught.value.mend.endswith("Or start all the same with --ppo.force true.")
    normalisation, said = _admitted({**manifest, **change}, tokenizer, force=True)
    assert said == [f"ppo.force overrides: {caught.value.message}"]
    assert normalisation == (Normalisation(0.0, 1.0) if "normalisation" in change else Normalisation(0.4, 2.0))


def test_force_says_every_reason(manifest: dict[str, Any], tokenizer: Any) -> None:
    bare = {"tokenizer_sha256": manifest["tokenizer_sha256"]}
    assert len(_admitted(bare, tokenizer, force=True)[1]) == 3


def test_a_checkpoint_that_is_no_artifact_of_ours_is_no_reward_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"ppo\.reward_model.*without its manifest\.json"):
        open_artifact(tmp_path, kinds=["rm"], wanted_as="ppo.reward_model")


def test_the_batch_arithmetic_is_that_of_the_update() -> None:
    """The numbers of optimiser steps are checked in test_update.py."""
    assert batch_arithmetic(PpoSection(rollout_batch_size=64, num_ppo_epochs=4, num_minibatches=2)) == (
        "1 update = 64 sequences, 4 epochs x 2 minibatches = 8 optimiser steps of 32 sequences"
    )
