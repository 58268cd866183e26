"""The scale plan's times, advice and tables: by hand, and against the benchmarks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pytest

from pipeline.load import load_recipe
from scripts.bench_ppo_models import WORKLOADS, Workload
from scripts.bench_ppo_models import update_flops as counted_flops
from scripts.estimate import main
from scripts.estimate_advice import advise, bottleneck, changes
from scripts.estimate_check import bench_shape, comparisons
from scripts.estimate_memory import memory
from scripts.estimate_plan import GIB
from scripts.estimate_time import times, update_flops
from tests.scripts.estimate_plans import RECIPE, ROOT, large_plan, tiny_plan

# Time


@pytest.mark.parametrize(
    ("side", "ppo"),
    [("full", {}), ("lora", {"sharing": "lora"}), ("lora-shared", {"sharing": "lora", "critic": "shared"})],
)
@pytest.mark.parametrize("name", ["tiny", "a"])
def test_an_updates_operations_are_the_benchmarks(name: str, side: str, ppo: Mapping[str, Any]) -> None:
    work: Workload = WORKLOADS[name]
    plan = tiny_plan(
        {**ppo, "rollout_batch_size": work.batch, "num_ppo_epochs": 3},
        shape=bench_shape(work.shape),
        prompt_tokens=work.prompt_tokens,
        response_tokens=7.0,
    )
    assert update_flops(plan) == pytest.approx(counted_flops(work, 7.0, 3, side, recompute=True))


def test_an_update_takes_6_or_8_operations_per_parameter_and_token() -> None:
    """Each of policy and critic, without embeddings; attention and projection add a little."""
    plan = large_plan("70b", "--ppo.gradient_checkpointing", "false")
    tokens = 512 * 768
    ideal = 2 * plan.shape.trunk_parameters * tokens
    assert 6 * ideal < update_flops(plan) < 1.05 * 6 * ideal
    again = update_flops(large_plan("70b"))
    assert 8 * ideal < again < 1.05 * 8 * ideal


def test_times_by_hand() -> None:
    """8 B on 8 H100: collectives, decoding and the optimiser from their formulas."""
    plan = large_plan("8b")
    spent = times(plan)
    link, traffic, rate = 0.7 * 450e9, 0.55 * 3.35e12, 0.4 * 989e12
    whole, classifier = plan.shape.parameters, plan.shape.classifier_parameters
    update = spent.phase("update")
    moved = 12 * 7 / 8 * (2 + 2 + 4)  # 64 rows of 768 tokens per rank: 4 steps of 3 micro-batches
    assert update.parts["communication"] == pytest.approx(moved * (whole + classifier) / link)
    assert update.parts["compute"] == pytest.approx(update.flops / 8 / rate)
    assert update.parts["memory bandwidth"] == pytest.approx(4 * 28 * (whole + classifier) / 8 / traffic)
    assert update.seconds == pytest.approx(update.parts["compute"] + update.parts["memory bandwidth"])
    experience = spent.phase("experience")
    assert experience.parts["communication"] == pytest.approx(12 * 7 / 8 * 2 * 2 * (whole + classifier) / link)
    decoding = spent.phase("generate")
    cache = 2 * 32 * 1024 * 2
    at_once = int(memory(plan).kv_gib * GIB / (768 * cache))
    assert at_once < 64
    steps = max(512, 64 * 256 / at_once)
    read = steps * whole * 2 + 64 * cache * 256 * (512 + 128)
    assert decoding.parts["memory bandwidth"] == pytest.approx(read / traffic)
    assert spent.seconds == pytest.approx(sum(phase.seconds for phase in spent.phases))


def test_replicas_sum_their_gradients_once_per_step_and_gather_nothing() -> None:
    plan = large_plan("8b", sharding="ddp")
    trained = plan.shape.parameters + plan.shape.classifier_parameters
    moved = 4 * 2 * 7 / 8 * 4 * trained / (0.7 * 450e9)
    update = times(plan).phase("update")
    assert update.parts["communication"] == pytest.approx(moved)
    assert update.seconds == pytest.approx(sum(update.parts.values()))
    assert times(plan).phase("experience").parts["communication"] == 0.0


def test_several_machines_are_bound_by_the_network() -> None:
    one, two = (times(large_plan("8b", machines=count)).phase("update") for count in (1, 2))
    assert two.parts["compute"] == pytest.approx(one.parts["compute"] / 2)
    assert two.bound == "communication"
    assert two.parts["communication"] > 4 * one.parts["communication"] * 6 / 12  # 2 micro-batches per step, not 3


def test_sampling_beside_the_rest_costs_the_slower_of_both() -> None:
    served = large_plan("8b", mode="server", server_gpus=1)
    apart, beside = times(served), times(dataclasses.replace(served, overlap=True))
    generate, *rest = (phase.seconds for phase in apart.phases)
    assert apart.seconds == pytest.approx(generate + sum(rest))
    assert beside.seconds == pytest.approx(max(generate, sum(rest)))
    assert apart.phase("sync").bound == "disk"


def test_rows_that_do_not_divide_by_the_ranks_leave_some_waiting() -> None:
    plan = large_plan("8b", "--ppo.rollout_batch_size", "12", "--ppo.num_minibatches", "1")
    update = times(plan).phase("update")
    assert update.parts["compute"] == pytest.approx(update.flops / 8 * (2 * 8 / 12) / (0.4 * 989e12))


# Advice


def test_a_plan_that_does_not_fit_is_told_what_would() -> None:
    plan = large_plan("7b", sharding="ddp")
    first, *rest = advise(plan)
    assert first.startswith("DOES NOT FIT")
    assert "policy" in first
    fsdp = next(line for line in rest if "fsdp2.yaml" in line)
    assert fsdp.endswith(f"{memory(dataclasses.replace(plan, sharding='fsdp2')).total_gib:.1f} GiB, fits")
    assert all(change.words for change in changes(plan))


def test_what_dominates_is_named() -> None:
    long = large_plan("8b", "--data.max_response_tokens", "8192", response_tokens=4096)
    assert bottleneck(long).name == "generate"
    assert any("rollout.mode: server" in line for line in advise(long))
    spread = large_plan("8b", machines=16)
    assert any("sequences per rank" in line for line in advise(spread))
    assert any("wait" in line and "max_tokens_per_micro_batch" in line for line in advise(large_plan("8b", machines=4)))


def test_the_shipped_recipe_fits_on_the_machine_that_it_names(capsys: pytest.CaptureFixture[str]) -> None:
    main(["8b", "8", "--recipe", str(RECIPE), "--sharding", "fsdp2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["total_gib"] == pytest.approx(sum(found["memory_gib"].values()))
    assert found["world"] == load_recipe(RECIPE).launch.world


# Command line


def test_the_tables_say_what_they_were_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["assets/demo-base", "1", "--gpu", "cpu", "--recipe", "recipes/demo.yaml", "--ppo.sharing", "lora"]
    main(words)
    out = capsys.readouterr().out
    assert "2,557,632 parameters on 1 x 1 cpu, ddp" in out
    assert "sharing lora" in out
    assert "fits:" in out
    main(["8b", "8", "--tflops", "1", "--memory-gib", "10", "--bandwidth", "5", "--json"])
    small = json.loads(capsys.readouterr().out)
    assert small["sharding"] == "fsdp2", "launch.accelerate of the recipe says so"
    assert not small["fits"]
    assert small["limit_gib"] == pytest.approx(9.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["8b", "0"], "GPUS is 0"),
        (["8b", "8", "--machines", "0"], "--machines is 0"),
        (["nothing here", "8"], "holds no config.json"),
        (["8b", "8", "--ppo.no_such_key", "1"], "no_such_key"),
        (["8b", "8", "--mode", "server", "--server-gpus", "3", "--tensor-parallel", "2"], "no multiple"),
    ],
)
def test_what_no_cluster_has_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main([*words, "--recipe", str(RECIPE)])


# Measured


def test_estimates_are_as_near_to_the_benchmarks_as_the_document_says() -> None:
    """docs/scaling.md: operations within 1%, peak memory within 10%, phases within 1.3 of what was measured."""
    limits = {"TFLOP": 1.01, "GiB": 1.10, "s": 1.3}
    found = list(comparisons())
    assert {(one.run, one.what) for one in found} >= {("b, full", "peak memory"), ("b, lora-shared", "update")}
    far = [one for one in found if not 1 / limits[one.unit] <= one.ratio <= limits[one.unit]]
    assert far == []


def test_the_document_has_the_table_that_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    from scripts.estimate_check import main as check

    check()
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
