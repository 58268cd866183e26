"""The benchmark of the ppo stage: figures, comparison, settings and tables by hand, and real runs on `tiny`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.recipe import ModelSection, Recipe
from pipeline.tokens import load_tokenizer
from scripts.bench_ppo import ROOT
from scripts.bench_ppo_models import EOS, PAD, WORKLOADS
from scripts.bench_stage import Bench, Case, main, make_models, parse, recipe_of, without_paths, write_recipe
from scripts.bench_stage_models import SHAPES, Job, make
from scripts.bench_stage_report import compare, expected, figures, markdown, memory_of, plan_of, warm

H100: dict[str, Any] = {
    "kind": "cuda",
    "device": "NVIDIA H100 80GB HBM3",
    "gpus": 1,
    "gpu_memory_gib": 79.1,
    "memory_gib": 128.0,
    "engines": {"vllm": None, "transformers": "5.19.0"},
}
H200 = {**H100, "device": "NVIDIA H200", "gpu_memory_gib": 139.8}
WITH_VLLM = {"engines": {"vllm": "0.32.0", "transformers": "5.19.0"}}


PHASES = {"rollout": 1, "experience": 2, "update": 4, "sync": 8}


def row(step: int, *, seconds: float = 1.0, **more: Any) -> dict[str, Any]:
    """An update's row: phases of 1, 2, 4 and 8 times `seconds`."""
    phases = {f"time/{name}": n * seconds for name, n in PHASES.items()}
    return {"step": step, **phases, "time/rollout_tokens_per_second": 10 / seconds, "response/length": 5.0, **more}


def bench(tmp_path: Path, machine: Mapping[str, Any] = H100, *words: str) -> Bench:
    options = parse(list(words))
    options.dtype = options.dtype or "bfloat16"
    return Bench(options, tmp_path, machine, {}, math.inf)


def test_figures_are_medians_of_updates_that_were_not_first(tmp_path: Path) -> None:
    """Seconds 3, 1 and 2 remain of the run: medians 2, 4, 8, 16 and 30, rates 10 / 3, 10 and 5."""
    rows = [{"step": 0, "eval/kl": 0.0}, row(1, seconds=90), row(2, seconds=3), row(3), row(4, seconds=80)]
    found = figures(warm([*rows, row(5, seconds=2)], {1, 4}))
    assert found["updates"] == 3
    medians = {name: spread["median"] for name, spread in found["seconds"].items()}
    assert medians == {"rollout": 2, "experience": 4, "update": 8, "sync": 16, "whole update": 30}
    assert found["seconds"]["rollout"] == {"median": 2, "low": 1, "high": 3}
    assert found["generated_tokens_per_second"] == {"median": 5, "low": pytest.approx(10 / 3), "high": 10}


def test_equal_runs_are_equal_whatever_their_times() -> None:
    ours = [row(3, loss=0.5, bad="nan"), row(4, loss=0.25, bad="nan")]
    others = [row(3, seconds=7, loss=0.9, bad="nan"), row(4, seconds=9, loss=0.25, bad="nan")]
    found = compare(ours, others, after=3)
    assert found.identical
    assert found.numbers == 3  # response/length, loss and bad of update 4


def test_the_largest_difference_is_relative_to_the_larger() -> None:
    ours = [row(2, loss=1.0, score=-4.0, **{"rollout/generated_tokens": 9.0})]
    others = [row(2, loss=1.25, score=-4.1, **{"rollout/generated_tokens": 9.0})]
    found = compare(ours, others, after=1)
    assert not found.identical
    assert (found.differing, found.same_tokens) == (2, True)
    assert found.largest is not None
    assert (found.largest.key, found.largest.relative) == ("loss", pytest.approx(0.2))
    others[0]["rollout/generated_tokens"] = 10.0
    assert not compare(ours, others, after=1).same_tokens


def test_a_number_that_is_not_finite_differs_infinitely() -> None:
    found = compare([row(2, loss="nan")], [row(2, loss=1.0)], after=1)
    assert found.largest is not None
    assert found.largest.relative == math.inf


def test_a_missing_row_is_no_equality() -> None:
    found = compare([row(2)], [row(2), row(3)], after=1)
    assert (found.missing, found.largest, found.identical) == (1, None, False)


def test_memory_is_that_of_the_fullest_rank() -> None:
    manifest = {
        "memory": {"policy": {"weights": 512.0, "training": 1536.0}},
        "peak_memory_gib": 1.0,
        "ranks": [{"peak_memory_gib": 1.0, "peak_gpu_memory_gib": 5.0}, {"peak_memory_gib": 3.0}],
    }
    assert memory_of(manifest, 7.0) == {
        "roles": {"policy": {"weights": 0.5, "training": 1.5}},
        "peak": {"process": 3.0, "gpu": 5.0, "resumed": None, "card": 7.0},
    }
    alone = memory_of({"memory": {}, "peak_memory_gib": 1.0}, None)
    assert alone["peak"] == {"process": 1.0, "gpu": None, "resumed": None, "card": None}


def test_the_estimate_counts_an_engine_without_vllm_as_weights() -> None:
    """1.5B: 1,543,714,304 weights: 2 bytes each are 2.875 GiB, 4 bytes 5.751 and with training 23.003."""
    recipe = Recipe.model_validate({"name": "x", "model": {"name_or_path": "x", "dtype": "bfloat16"}})
    plan = plan_of(SHAPES["1.5b"], recipe, H100, 64.0)
    ours, with_vllm = (expected(plan, engine, known=True) for engine in ("transformers", "vllm"))
    assert ours["items"]["engine"] == pytest.approx(2.875, abs=1e-3)
    assert with_vllm["items"]["engine"] == pytest.approx(0.3 * 79.1)
    assert with_vllm["peak"] - ours["peak"] == pytest.approx(0.3 * 79.1 - 2.875, abs=1e-3)
    assert sum(ours["roles"]["policy"].values()) == pytest.approx(23.003, abs=1e-3)
    assert ours["roles"]["reference"] == {"weights": pytest.approx(5.751, abs=1e-3), "training": 0.0}
    assert "rollout" not in ours["seconds"]
    assert with_vllm["seconds"]["whole update"] == pytest.approx(
        sum(with_vllm["seconds"][name] for name in ("rollout", "experience", "update", "sync"))
    )
    assert expected(plan, "vllm", known=False)["seconds"] == {}


@pytest.mark.parametrize(
    ("machine", "shape", "checkpointing", "tokens"),
    [
        (H100, "0.5b", False, 16384),
        (H100, "1.5b", True, 8192),
        (H100 | WITH_VLLM, "1.5b", True, 4096),
        (H200 | WITH_VLLM, "1.5b", False, 8192),
    ],
)
def test_settings_are_the_first_that_fit(
    tmp_path: Path, machine: dict[str, Any], shape: str, checkpointing: bool, tokens: int
) -> None:
    recipe, settings = write_recipe(bench(tmp_path, machine), shape, tmp_path, "interrupted")
    assert (settings["gradient_checkpointing"], settings["max_tokens_per_micro_batch"]) == (checkpointing, tokens)
    assert recipe.ppo.max_tokens_per_micro_batch == tokens
    assert recipe.ppo.gradient_checkpointing is checkpointing
    plan = plan_of(SHAPES[shape], recipe, machine, 64.0)
    engine = "transformers" if machine["engines"]["vllm"] is None else "vllm"
    assert expected(plan, engine, known=True)["peak"] <= 0.9 * machine["gpu_memory_gib"]


def test_changes_of_the_command_line_reach_the_recipe(tmp_path: Path) -> None:
    chosen = bench(tmp_path, H100, "--set", "ppo.sharing=lora_policy", "--set", "ppo.num_ppo_epochs=1")
    recipe, _ = write_recipe(chosen, "0.5b", tmp_path, "interrupted")
    assert (recipe.ppo.sharing, recipe.ppo.num_ppo_epochs) == ("lora_policy", 1)


def test_only_the_run_that_is_killed_saves_on_its_way(tmp_path: Path) -> None:
    """One state at a time fits the disk: of 5 updates the third alone is saved, or none but when told to."""
    words = ("--updates", "5")
    killed, told = bench(tmp_path, H100, *words, "--kill"), bench(tmp_path, H100, *words)
    settings = write_recipe(told, "0.5b", tmp_path, "x")[1]
    saves = [
        Recipe.model_validate(recipe_of(one, run, settings)).ppo.save_every
        for one in (killed, told)
        for run in ("interrupted", "undisturbed")
    ]
    assert saves == [3, 5, 5, 5]


def test_quick_is_a_default_that_words_beat(tmp_path: Path) -> None:
    quick = bench(tmp_path, H100, "--quick").options
    assert (quick.shapes, quick.updates) == (["0.5b"], 4)
    assert bench(tmp_path, H100, "--quick", "--updates", "3").options.updates == 3
    assert bench(tmp_path).options.shapes == ["0.5b", "1.5b"]


@pytest.mark.parametrize(
    "words", [["--updates", "1"], ["--batch", "0"], ["--prompt", "7"], ["--shapes", "0.5b,9b"], ["--device", "tpu"]]
)
def test_words_that_mean_nothing_are_refused(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench(tmp_path, H100, *words)


def test_paths_are_left_out_of_the_command() -> None:
    words = ["--quick", "--out", "/a/b.json", "--scratch=/c", "--updates", "3"]
    assert without_paths(words) == ["--quick", "--updates", "3"]


def test_a_full_disk_is_said_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1.54e9 weights: twice 12 + 2 * 2 bytes and once 4, 36 bytes in all: 51.7 GiB, so 50 are too few."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Disk(50 * 2**30))
    with pytest.raises(UserError, match=r"52 GiB are wanted .*, and 50 are free.*--scratch"):
        make_models(bench(tmp_path), "1.5b", tmp_path)
    assert not list(tmp_path.iterdir())


class _Disk:
    def __init__(self, free: int) -> None:
        self.free = free


def test_the_benchmark_itself_imports_no_torch() -> None:
    """The peak memory of a child begins at its parent's."""
    program = "import sys, scripts.bench_stage; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_models_and_prompts_are_as_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """The policy's file has the dtype, a prompt its number of tokens, and a response's tokens their texts."""
    from safetensors import safe_open

    monkeypatch.setitem(SHAPES, "tiny", replace(WORKLOADS["tiny"].shape, family=family))
    job = Job("tiny", batch=2, prompt=9, response=12, prompts=5, dtype="bfloat16", device="cpu", reward="function")
    assert job.workload.mean_length == 6
    make(job, tmp_path)
    with safe_open(tmp_path / "policy" / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows] == ["train"] * 5 + ["eval"] * 2
    tokenizer = load_tokenizer(tmp_path / "policy", ModelSection(name_or_path="policy"))
    ids = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    assert [len(set(map(tuple, ids))), *map(len, ids)] == [7] + [9] * 7
    assert [tokenizer.decode(prompt) for prompt in ids] == [row["prompt"] for row in rows]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS, PAD)
    assert tokenizer.decode([300, 511]) == " w300 w511"
    assert len(tokenizer) == 512


def test_more_tokens_than_positions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1024 positions"):
        make(Job("tiny", 2, 1000, 25, 5, "float32", "cpu", "function"), tmp_path)


def test_shapes_are_those_of_the_other_benchmarks() -> None:
    assert SHAPES["1.5b"] is WORKLOADS["qwen2.5-1.5b"].shape


REPORT: dict[str, Any] = {
    "command": "python -m scripts.bench_stage",
    "asked": {"processes": 1, "batch": 8, "prompt": 4, "response": 6, "dtype": "bfloat16"},
    "machine": H100,
    "shapes": {
        "0.5b": {
            "parameters": 494_032_768,
            "notes": ["A note."],
            "engine": {"name": "vllm", "version": "0.32.0"},
            "figures": {**figures([row(2), row(3)]), "warm": True},
            "memory": memory_of(
                {"memory": {"policy": {"weights": 512.0, "training": 1536.0}}, "peak_memory_gib": 3.0}, 44.0
            ),
            "estimate": {
                "roles": {"policy": {"weights": 0.25, "training": 1.0}},
                "items": {"policy": 1.25, "engine": 9.0},
                "peak": 10.25,
                "seconds": {"rollout": 0.5},
            },
            "saved": {"update": 2, "gib": 1.5, "seconds": None},
            "resumed": {"update": 2, "seconds": 12.25, "reading": 3.0},
            "start_seconds": 9.0,
            "disturbed_by": "Told by SIGUSR1 to save",
        },
        "1.5b": {"parameters": 1_543_714_304, "notes": [], "failed": "no room"},
    },
}


def test_tables_show_measured_beside_estimated() -> None:
    text = markdown(REPORT)
    assert "| rollout | 1.000 [1.000 to 1.000] | 0.500 |" in text
    assert "| experience | 2.000 [2.000 to 2.000] | - |" in text
    assert "| policy | 0.50 + 1.50 | 0.25 + 1.00 |" in text
    assert "| engine | - | 9.00 |" in text
    assert "| peak of the process | 3.00 | 10.25 |" in text
    assert "| peak of the card, all that is on it | 44.00 | - |" in text
    assert "| writing it, s | - |" in text
    assert "Told by SIGUSR1 to save, it went on after update 2; it was not compared" in text
    assert text.endswith("## 1.5b: 1543.7M parameters\n\nFailed: no room\n")


@pytest.mark.parametrize(
    ("largest", "missing", "words"),
    [
        (None, 0, "the 9 numbers since then are those of an undisturbed run, bit for bit."),
        (None, 2, "2 numbers are in one of the two runs alone"),
        (
            {"step": 3, "key": "loss", "resumed": 1.0, "undisturbed": 1.25, "relative": 0.2},
            0,
            "4 of 9 numbers since then differ from those of an undisturbed run, by 0.2 at most (loss of update 3: 1.0 "
            "and 1.25), with other numbers of tokens generated.",
        ),
    ],
)
def test_what_a_comparison_found_is_said(largest: dict[str, Any] | None, missing: int, words: str) -> None:
    identical = largest is None and not missing
    numbers = {"numbers": 9, "differing": 4, "missing": missing, "same_tokens": False, "identical": identical}
    shape = {**REPORT["shapes"]["0.5b"], "comparison": {**numbers, "largest": largest}}
    assert words in markdown({**REPORT, "shapes": {"0.5b": shape}})


@pytest.mark.parametrize(
    ("machine", "found", "fine"),
    [
        ({**H100, "kind": "cpu"}, {"comparison": {"identical": True, "missing": 0}}, True),
        ({**H100, "kind": "cpu"}, {"comparison": {"identical": False, "missing": 0}}, False),
        (H100, {"comparison": {"identical": False, "missing": 0}}, True),
        (H100, {"comparison": {"identical": False, "missing": 1}}, False),
        (H100, {"comparison": {"identical": True, "missing": 0}, "failed": "x"}, False),
        (H100, {}, True),
        (H100, {"failed": "x"}, False),
    ],
)
def test_on_a_cpu_a_resume_must_change_nothing(
    tmp_path: Path, machine: dict[str, Any], found: dict[str, Any], fine: bool
) -> None:
    case = Case(bench(tmp_path, machine), "tiny", tmp_path)
    case.found |= found
    assert case.is_fine is fine


TINY = ["--shapes", "tiny", "--device", "cpu", "--engine", "transformers", "--batch", "8", "--prompt", "8"]
TINY += ["--response", "16", "--threads", "1"]


def run_tiny(tmp_path: Path, *words: str) -> dict[str, Any]:
    out = tmp_path / "report.json"
    assert main([*TINY, *words, "--scratch", str(tmp_path / "scratch"), "--out", str(out)]) == 0
    text = out.read_text()
    for local in (str(ROOT), str(tmp_path), os.uname().nodename):
        assert local not in text
    assert not list((tmp_path / "scratch").iterdir())
    report = json.loads(text)
    assert out.with_suffix(".md").read_text() == markdown(report)
    return report["shapes"]["tiny"]


@pytest.mark.slow
def test_a_run_that_is_told_to_save(tmp_path: Path) -> None:
    found = run_tiny(tmp_path, "--updates", "4")
    codes = {run: [attempt["code"] for attempt in raw["attempts"]] for run, raw in found["runs"].items()}
    assert codes == {"interrupted": [75, 0], "undisturbed": [0]}
    assert found["resumed"]["update"] == found["saved"]["update"] in (2, 3)
    assert found["comparison"]["identical"]
    assert found["comparison"]["numbers"] > 30
    assert found["saved"]["gib"] > 0
    assert found["figures"]["warm"]
    assert found["memory"]["roles"]["policy"]["weights"] == found["estimate"]["roles"]["policy"]["weights"]


@pytest.mark.slow
def test_two_processes_that_are_killed(tmp_path: Path) -> None:
    words = ["--updates", "4", "--kill", "--processes", "2", "--reward", "function"]
    found = run_tiny(tmp_path, *words, "--accelerate", "configs/accelerate/cpu.yaml")
    assert [attempt["code"] for attempt in found["runs"]["interrupted"]["attempts"]] == [137, 0]
    assert found["resumed"]["update"] == 2
    assert found["comparison"]["identical"]
    assert list(found["memory"]["roles"]) == ["policy", "reference", "critic"]
