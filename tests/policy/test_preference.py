"""The stages of the direct methods: the same artifact whatever the method, cached references, resumed runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.artifacts import open_artifact
from pipeline.errors import UserError
from pipeline.recipe_direct import DIRECT
from pipeline.stage import Stage
from pipeline.tokens import PROMPT_FORM
from policy.losses import METHODS
from policy.preference import refuse_one_sided_steps, run
from tests.tiny_stage import prepare_stage, write_rows
from tests.workplace import Workplace, make_workplace

FILES = {
    "config.json",
    "evaluation",
    "generation_config.json",
    "log.txt",
    "manifest.json",
    "metrics.jsonl",
    "model.safetensors",
    "recipe.resolved.yaml",
    "samples.jsonl",
    "summary.md",
    "tokenizer.json",
    "tokenizer_config.json",
}
IDS = torch.tensor([[1, 20, 30, 40]])


def stage_of(
    place: Workplace,
    name: str,
    data: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    evaluation: Mapping[str, Any] | None = None,
    **section: Any,
) -> Stage:
    trainer = {"learning_rate": 1e-3, "max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4}
    trainer |= {"eval_steps": 3, "logging_steps": 1}
    files = {key: str(place.path / f"{key}.jsonl") for key in ("sft", "prompts")}
    recipe: Mapping[str, Any] = {
        "name": "tiny",
        "model": {"name_or_path": "model", "dtype": dtype, "lora": {"rank": 4, "alpha": 8.0}},
        "data": {
            **files,
            "preferences": str(place.path / "rankings.jsonl"),
            "eval_fraction": 0.25,
            "max_prompt_tokens": 90,
            "max_response_tokens": 8,
            **(data or {}),
        },
        name: {"trainer": trainer, **section},
        "rollout": {"engine": "transformers"},
        "eval": {"prompts": 4, "samples_per_prompt": 2, "shown_samples": 2, **(evaluation or {})},
    }
    inputs = {"policy": place.path / "model"}
    if section.get("reference"):
        inputs["reference"] = Path(section["reference"])
    return Stage(prepare_stage(place.run / f"{name}.partial", recipe, name, inputs))


def rows_of(final: Path, key: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (final / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if key in row]


@pytest.mark.parametrize("name", DIRECT)
def test_every_method_writes_the_same_kind_of_artifact(tmp_path: Path, name: str) -> None:
    place = make_workplace(tmp_path / "work")
    stage = stage_of(place, name)
    final = stage.complete(run(stage))
    assert {path.name for path in final.iterdir()} - {"chat_template.jinja", "special_tokens_map.json"} == FILES
    manifest = json.loads((final / "manifest.json").read_text())
    assert manifest["kind"] == name
    assert manifest["metrics"]["steps"] == 6
    assert manifest["metrics"]["eval/kl"] > -1.0
    assert manifest["data"]["preferences"]["conversion"]["to"] == METHODS[name].data
    assert open_artifact(final, kinds=(name,), wanted_as="test").kind == name
    before, after = (AutoModelForCausalLM.from_pretrained(path)(IDS).logits for path in (place.path / "model", final))
    assert not torch.allclose(before, after, atol=1e-3)
    assert [row["step"] for row in rows_of(final, "loss")] == [1, 2, 3, 4, 5, 6]
    assert {row["step"] for row in rows_of(final, "eval/loss")} == {3, 6}
    samples = [json.loads(line) for line in (final / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {3, 6}
    assert (place.run / "ref_logprobs").exists() == METHODS[name].needs_reference


@pytest.mark.parametrize("name", ["dpo", "kto", "simpo"])
def test_an_adapter_is_written_merged_and_by_itself(tmp_path: Path, name: str) -> None:
    place = make_workplace(tmp_path / "work")
    stage = stage_of(place, name, lora=True)
    final = stage.complete(run(stage))
    saved = AutoModelForCausalLM.from_pretrained(final)(IDS).logits
    base = AutoModelForCausalLM.from_pretrained(place.path / "model")
    assert not torch.allclose(base(IDS).logits, saved, atol=1e-4)
    torch.testing.assert_close(PeftModel.from_pretrained(base, str(final / "adapter"))(IDS).logits, saved)


def test_the_first_loss_of_dpo_is_log_2_and_its_reference_serves_ipo(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    stage = stage_of(place, "dpo")
    final = stage.complete(run(stage))
    assert rows_of(final, "loss")[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert rows_of(final, "loss")[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    (cached,) = (place.run / "ref_logprobs").iterdir()
    kept = cached.stat().st_mtime_ns
    stage = stage_of(place, "ipo")
    log = (stage.complete(run(stage)) / "log.txt").read_text()
    assert "read from the cache" in log
    assert [path.stat().st_mtime_ns for path in (place.run / "ref_logprobs").iterdir()] == [kept]


def test_bfloat16_trains_float32_weights_and_writes_bfloat16_ones(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    losses = {}
    for dtype in ("float32", "bfloat16"):
        stage = stage_of(place, "dpo", dtype=dtype)
        final = stage.complete(run(stage)).rename(tmp_path / dtype)
        losses[dtype] = rows_of(final, "loss")[-1]["loss"]
        saved = AutoModelForCausalLM.from_pretrained(final, dtype="auto")
        assert {str(p.dtype) for p in saved.parameters()} == {f"torch.{dtype}"}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=1e-3)
    assert len(list((place.run / "ref_logprobs").iterdir())) == 2, "either precision has its own reference sums"


def test_the_held_out_figures_are_said_and_written(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    for name, titles in (("dpo", ("margin", "log p of chosen", "of rejected")), ("kto", ("of rejected",))):
        stage = stage_of(place, name)
        final = stage.complete(run(stage))
        (line,) = [line for line in (final / "log.txt").read_text().splitlines() if "held out: " in line]
        metrics = json.loads((final / "manifest.json").read_text())["metrics"]
        assert f"held out: loss {metrics['eval/loss']:.4g}, reward accuracy" in line
        assert all(title in line for title in titles)
        assert f"of rejected {metrics['eval/logps/rejected']:.4g}" in line


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    stage = stage_of(place, "kto")
    whole = stage.complete(run(stage)).rename(tmp_path / "whole")
    stage = stage_of(place, "kto")
    run(stage)
    for checkpoint in stage.state.glob("checkpoint-6"):
        shutil.rmtree(checkpoint)
    again = Stage(stage.out)
    assert "resuming from checkpoint-4" in (again.complete(run(again)) / "log.txt").read_text()
    one, two = (AutoModelForCausalLM.from_pretrained(path) for path in (whole, place.run / "kto"))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_contrast_keeps_the_form_in_which_it_is_asked(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    stage = stage_of(place, "contrast", instruction="Be kind.")
    final = stage.complete(run(stage))
    form = AutoTokenizer.from_pretrained(final).init_kwargs[PROMPT_FORM]
    assert form == "Instruction: Be kind.\nQuestion: {prompt}\nBetter answer: "


def test_a_reference_that_is_no_ancestor_is_refused(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    other = tmp_path / "other"
    shutil.copytree(place.path / "model", other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    model.save_pretrained(other)
    with pytest.raises(UserError, match=r"dpo\.reference: .*neither the policy's start.*ancestors"):
        run(stage_of(place, "dpo", reference=str(other)))


def test_steps_that_rarely_hold_both_labels_are_refused() -> None:
    """Two rows of even labels: half of the steps; one: all; 16 with 4% good: 0.96 ** 16 = 52%, with 5%: 44%."""
    for desirable, undesirable, rows in ((50, 50, 2), (5, 95, 16), (95, 5, 16)):
        refuse_one_sided_steps(desirable, undesirable, rows)
    for desirable, undesirable, rows in ((50, 50, 1), (4, 96, 16), (96, 4, 16)):
        with pytest.raises(UserError, match=rf"kto: with {rows} rows per optimiser step, and {desirable}\.0%"):
            refuse_one_sided_steps(desirable, undesirable, rows)


def test_a_step_of_one_row_is_refused_by_the_stage(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    with pytest.raises(UserError, match="100% of the steps would hold one label only"):
        run(stage_of(place, "kto", trainer={"max_steps": 2, "per_device_train_batch_size": 1}))


def test_labels_of_one_kind_are_refused(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    rows = [{"prompt": f"row {n}", "completion": " good", "label": True} for n in range(20)]
    labels = write_rows(tmp_path / "labels.jsonl", rows)
    with pytest.raises(UserError, match=r"data\.preferences: .*label"):
        run(stage_of(place, "kto", data={"preferences": str(labels)}))


def test_a_row_that_the_model_has_no_positions_for_is_refused(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    config = place.path / "model" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"max_position_embeddings": 9}))
    with pytest.raises(UserError, match=r"dpo: the longest prompt and answer take 1\d tokens, and the model reads 9 "):
        run(stage_of(place, "dpo"))


def test_training_that_diverges_ends_with_the_step_and_the_mend(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    trainer = {"learning_rate": 1e30, "max_steps": 6, "logging_steps": 1, "warmup_steps": 0}
    with pytest.raises(UserError, match=r"dpo: grad_norm is (nan|inf) at step [23]: .* diverged") as raised:
        run(stage_of(place, "dpo", trainer=trainer))
    assert "dpo.trainer.learning_rate" in raised.value.mend
