"""The command and the environment that start a stage, in all cases."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.accelerate_file import environment_of
from pipeline.errors import UserError
from pipeline.launchers import Stages, Start, by_hand
from pipeline.recipe_launch import LaunchSection
from tests.workplace import ROOT, command_environment

CONFIGS = ROOT / "configs" / "accelerate"
STAGE = ["-m", "policy.sft", "runs/x/sft.partial"]
JOB = {"TRISTAGE_LAUNCHER": "srun"}


def start(launch: dict[str, Any], environment: dict[str, str] | None = None) -> Start:
    stages = Stages(LaunchSection.model_validate(launch), environment or {})
    return stages.start("policy.sft", Path("runs/x/sft.partial"))


def test_one_process_is_started_as_it_is() -> None:
    assert start({}) == Start([sys.executable, *STAGE], {"TRISTAGE_WORLD_SIZE": "1"}, True)


def test_several_are_started_by_the_agent() -> None:
    agent = [sys.executable, "-m", "pipeline.agent", "3", *STAGE[1:]]
    assert start({"processes": 3}) == Start(agent, {"TRISTAGE_WORLD_SIZE": "3"}, True)


def test_one_with_a_file_of_accelerate_is_started_by_the_agent_too() -> None:
    """Its environment is what sharding is asked for by, and ranks of it are counted."""
    found = start({"accelerate": str(CONFIGS / "one-gpu.yaml")})
    assert found.words[1:4] == ["-m", "pipeline.agent", "1"]
    assert found.environment["TRISTAGE_WORLD_SIZE"] == "1"


def test_the_environment_has_what_the_file_says() -> None:
    found = start({"processes": 2, "accelerate": str(CONFIGS / "fsdp2.yaml")}).environment
    assert found["TRISTAGE_WORLD_SIZE"] == "2"
    assert found["ACCELERATE_USE_FSDP"] == "true"
    assert found["FSDP_VERSION"] == "2"


def test_tasks_of_a_job_are_the_ranks() -> None:
    found = start({"machines": 2, "processes": 4}, JOB)
    assert found.words[:4] == ["srun", "--kill-on-bad-exit=1", "--nodes=2", "--ntasks=8"]
    assert found.words[4:6] == ["bash", "-c"]
    assert found.words[7:] == ["rank", sys.executable, *STAGE]
    assert found.environment == {"TRISTAGE_WORLD_SIZE": "8"}
    assert not found.is_child


def test_a_job_of_one_task_has_a_task() -> None:
    assert start({}, JOB).words[2:4] == ["--nodes=1", "--ntasks=1"]


def test_the_words_of_a_task_make_its_number_its_rank() -> None:
    """Task 5 of 8 on 2 machines, the second of its own."""
    words = start({"machines": 2, "processes": 4}, JOB).words[4:]
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    show = f"import os, sys; print(*(os.environ[name] for name in {names}), sys.argv[1:])"
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NNODES": "2"}
    done = subprocess.run(
        [*words[:4], sys.executable, "-c", show, "a b", "$HOME"],
        env=command_environment() | slurm,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "5 8 1 4 ['a b', '$HOME']\n"


def test_a_job_in_a_container_with_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory is there under its own name, and the image's own Python runs the stage."""
    monkeypatch.chdir(tmp_path)
    words = start({"slurm": {"container": "image.sqsh", "cpus_per_task": 6}}, JOB).words
    mounts = [f"--container-mounts={tmp_path}:{tmp_path}", f"--container-workdir={tmp_path}"]
    assert words[4:8] == ["--cpus-per-task=6", "--container-image=image.sqsh", *mounts]
    assert words[12:] == ["python", *STAGE]


def test_a_rank_that_something_else_starts_becomes_it() -> None:
    found = start({"machines": 2, "processes": 4}, {"TRISTAGE_LAUNCHER": "env"})
    assert found == Start([sys.executable, *STAGE], {"TRISTAGE_WORLD_SIZE": "8"}, True)


def test_a_job_gets_what_accelerate_would_set() -> None:
    found = start({"machines": 2, "accelerate": str(CONFIGS / "fsdp2-multinode.yaml")}, JOB)
    assert found.words[0] == "srun"
    assert found.environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    assert "RANK" not in found.environment
    assert "MASTER_ADDR" not in found.environment


def test_several_machines_without_a_job_are_refused() -> None:
    with pytest.raises(UserError, match=r"launch\.machines is 2, and this is no job of `tristage launch`.*--prepare"):
        start({"machines": 2})


@pytest.mark.parametrize("environment", [{}, JOB])
def test_a_file_that_is_not_there_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"launch\.accelerate: absent\.yaml does not exist"):
        start({"accelerate": "absent.yaml"}, environment)


def test_how_a_person_starts_ranks() -> None:
    def words(**launch: Any) -> str:
        return " ".join(by_hand(LaunchSection.model_validate(launch), "policy.sft", Path("d")))

    place = "--node-rank NUMBER --master-addr ADDRESS --master-port 29500"
    assert words() == "python -m policy.sft d"
    assert words(processes=2) == "torchrun --nnodes 1 --nproc-per-node 2 -m policy.sft d"
    assert words(machines=3, processes=2) == f"torchrun --nnodes 3 --nproc-per-node 2 {place} -m policy.sft d"
    accelerate = "accelerate launch --config_file f.yaml --num_processes"
    assert words(processes=2, accelerate="f.yaml") == f"{accelerate} 2 --num_machines 1 -m policy.sft d"
    place = "--machine_rank NUMBER --main_process_ip ADDRESS --main_process_port 29500"
    expected = f"{accelerate} 6 --num_machines 3 {place} -m policy.sft d"
    assert words(machines=3, processes=2, accelerate="f.yaml") == expected


def test_what_a_ddp_file_sets() -> None:
    found = environment_of(str(CONFIGS / "ddp.yaml"), 2)
    assert found["ACCELERATE_MIXED_PRECISION"] == "no"
    assert "ACCELERATE_USE_FSDP" not in found
    assert ("ACCELERATE_USE_CPU" in found) == (not torch.cuda.is_available())


def test_what_an_fsdp2_file_sets() -> None:
    found = environment_of(str(CONFIGS / "fsdp2.yaml"), 2)
    wanted = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "ACCELERATE_MIXED_PRECISION": "no",
    }
    assert {key: found.get(key) for key in wanted} == wanted
    assert all(key.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_")) for key in found)


def test_a_deepspeed_file_is_refused_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "zero3.yaml"
    file.write_text((CONFIGS / "ddp.yaml").read_text().replace("MULTI_GPU", "DEEPSPEED"))
    with pytest.raises(UserError, match=r"zero3\.yaml asks for DeepSpeed.* Use configs/accelerate/fsdp2\.yaml"):
        environment_of(str(file), 2)


@pytest.mark.parametrize(
    "content",
    ["distributed_type: FSDP\nno_such_key: 1\n", "distributed_type: NO_SUCH\n", "- a\n- list\n", "a: [1\n", "", "\0"],
)
def test_a_broken_file_is_refused_by_its_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=r"launch\.accelerate: .*broken\.yaml: ") as error:
        environment_of(str(file), 2)
    assert "accelerate config" in error.value.mend
