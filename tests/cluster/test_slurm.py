"""Launched stages on a real Slurm: a chain, pre-emption, time limits, failures and cancelling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.cluster.conftest import ON_ONE_MACHINE, ON_TWO_MACHINES, Site
from tests.workplace import change_rows

pytestmark = pytest.mark.cluster
Chain = tuple[Site, dict[str, str]]
Copied = Callable[..., Site]


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics without what depends on the clock."""
    clock = ("time/", "runtime", "per_second")
    return [{k: v for k, v in row.items() if not any(part in k for part in clock)} for row in rows]


def assert_same_weights(one: Path, other: Path) -> None:
    files = sorted(file.relative_to(one) for file in one.rglob("*.safetensors"))
    assert files
    for file in files:
        expected, found = load_file(one / file), load_file(other / file)
        assert expected.keys() == found.keys()
        assert all(expected[key].equal(found[key]) for key in expected), file


def row_of(table: str, stage: str) -> list[str]:
    """Cells of a stage's row in the table that `status` prints."""
    line = next(line for line in table.splitlines() if line.startswith(f"│ {stage} "))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_a_chain_runs_to_its_end(chain: Chain) -> None:
    site, jobs = chain
    for stage, job in jobs.items():
        assert site.state(job).state == "COMPLETED", site.log(stage, job)[-3000:]
        assert f"{stage}: complete, written to" in site.log(stage, job)
        assert (site.folder / f"{stage}-{job}.exit").read_text() == "0\n"
        assert site.place.manifest(stage)["kind"] == stage
    table = site.status()
    for stage, job in jobs.items():
        assert row_of(table, stage)[:4] == [stage, job, "COMPLETED", "done"]
    assert "step" in table
    assert "done already, skipped" in site.tristage("launch", "recipe.yaml")


def test_a_pre_empted_stage_resumes_and_ends_as_if_nothing_had_been(chain: Chain, copied: Copied) -> None:
    site = copied("ppo")
    (site.place.path / "hold").touch()
    job = site.launch(*ON_ONE_MACHINE)["ppo"]
    site.wait((site.place.path / "held").exists, "ppo", job)
    assert row_of(site.status(), "ppo")[:4] == ["ppo", job, "RUNNING", "running"]
    site.cluster.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    site.wait(lambda: "CANCELLED" in site.log("ppo", job), "ppo", job)
    (site.place.path / "hold").unlink()
    site.wait_for_requeue("ppo", job)
    partial = site.place.run / "ppo.partial"
    assert not (partial / "requeue.json").exists()
    assert not (site.place.run / "ppo").exists()
    assert site.wait_for_end("ppo", job).state == "COMPLETED", site.log("ppo", job)[-3000:]
    assert site.state(job).restarts == 1
    log = site.log("ppo", job)
    assert "requeued: the next start resumes" in log
    assert "ppo: resumes in" in log
    assert "resumed after update 3 of 7" in log
    expected = chain[0].place
    assert without_time(site.place.rows("ppo")) == without_time(expected.rows("ppo"))
    assert_same_weights(expected.run / "ppo", site.place.run / "ppo")


def test_near_its_time_limit_a_stage_is_requeued_and_the_chain_waits_for_it(chain: Chain, copied: Copied) -> None:
    site = copied("sft", "rm", "ppo")
    jobs = site.launch(*ON_TWO_MACHINES, "--stages", "sft,rm")
    site.wait(lambda: site.state(jobs["sft"]).state == "RUNNING", "sft", jobs["sft"])
    refusal = site.refused("launch", "recipe.yaml")
    assert f"launched already: sft (job {jobs['sft']}, RUNNING), rm (job {jobs['rm']}, PENDING)" in refusal
    site.wait(lambda: site.place.rows("sft.partial"), "sft", jobs["sft"])
    site.cluster.run("scancel", "--batch", "--signal=USR1", jobs["sft"])  # as --signal=B:USR1@120 does
    site.wait(lambda: site.state(jobs["sft"]).reason == "BeginTime", "sft", jobs["sft"])
    assert site.state(jobs["rm"]).reason == "Dependency"
    assert "sft: was requeued" in site.status()
    site.wait_for_requeue("sft", jobs["sft"])
    assert site.wait_for_end("sft", jobs["sft"]).state == "COMPLETED", site.log("sft", jobs["sft"])[-3000:]
    assert_same_weights(chain[0].place.run / "sft", site.place.run / "sft")
    site.wait(lambda: site.state(jobs["rm"]).state == "RUNNING", "rm", jobs["rm"])


def test_a_stage_that_fails_takes_its_successors_with_it(copied: Copied) -> None:
    site = copied("rm", "ppo")
    change_rows(site.place.path / "rankings.jsonl", {5: {"ranks": ["first"]}})
    jobs = site.launch(*ON_TWO_MACHINES)
    assert site.wait_for_end("ppo", jobs["ppo"]).state == "CANCELLED"
    assert site.state(jobs["rm"]).state == "FAILED"
    assert site.state(jobs["rm"]).exit_code == 2
    table = site.status()
    log = f"runs/tiny/slurm/rm-{jobs['rm']}.log"
    assert f"rm: failed (exit 2), see {log}: error: " in table
    assert f"ppo: cancelled: rm failed (exit 2), see {log}" in table
    assert "rankings.jsonl" in table
    assert not (site.place.run / "ppo.partial").exists()


def test_a_cancelled_stage_leaves_no_process_and_no_artifact(copied: Copied) -> None:
    site = copied("ppo")
    (site.place.path / "hold").touch()
    job = site.launch(*ON_ONE_MACHINE)["ppo"]
    site.wait((site.place.path / "held").exists, "ppo", job)
    ranks = {process.environ().get("RANK") for process in site.processes()}
    assert {"0", "1"} <= ranks
    assert site.place.rows("ppo.partial")
    site.cluster.run("scancel", job)
    (site.place.path / "hold").unlink()
    assert site.wait_for_end("ppo", job).state == "CANCELLED"
    assert site.processes() == []
    assert not (site.place.run / "ppo").exists()
    table = site.status()
    assert row_of(table, "ppo")[:4] == ["ppo", job, "CANCELLED (75)", "unfinished"]
    assert "ppo: was cancelled" in table


def test_what_slurm_would_refuse_is_not_submitted(copied: Copied) -> None:
    site = copied("rm", "ppo")
    refusal = site.refused("launch", "recipe.yaml", "--launch.machines", "9")
    assert "Slurm would refuse the job of rm: allocation failure: Requested node configuration is not" in refusal
    assert not (site.folder / "jobs.json").exists()
