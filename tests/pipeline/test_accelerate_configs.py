"""The files of configs/accelerate against accelerate's own reader, launcher and, for the CPU, real processes."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = ROOT / "configs" / "accelerate"
NAMES = ("cpu", "ddp", "fsdp2", "fsdp2-multinode", "one-gpu")
NOTE = """
import os
rank, world, cpu = (os.environ[key] for key in ("RANK", "WORLD_SIZE", "ACCELERATE_USE_CPU"))
open(f"rank_{rank}.txt", "w").write(f"{rank} of {world}, on the CPU: {cpu}")
"""


def launch_arguments(name: str, *words: str) -> argparse.Namespace:
    """What `accelerate launch --config_file NAME.yaml WORDS script.py` makes of its words and the file."""
    parser = launch_command_parser()
    given = parser.parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), *words, "script.py"])
    arguments, *_ = _validate_launch_command(given)
    return arguments


def test_there_are_the_files_that_the_documents_name() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_the_file(name: str) -> None:
    """Its reader raises for unknown keys of the file; those inside a mapping must be options of its launcher."""
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    known = vars(launch_command_parser().parse_args(["script.py"]))
    nested = {**(config.fsdp_config or {}), **(config.deepspeed_config or {})}
    assert sorted(key for key in nested if key not in known) == []
    assert config.mixed_precision == "no", "the recipe's model.dtype decides"


@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_what_it_launches(name: str) -> None:
    arguments = launch_arguments(name)
    wanted = {"ddp": "multi_gpu", "cpu": "multi_gpu", "one-gpu": None}.get(name, "use_fsdp")
    on = {flag for flag in ("multi_gpu", "use_fsdp", "use_deepspeed", "cpu") if vars(arguments)[flag]}
    assert on == ({wanted} if wanted else set())
    processes, machines = arguments.num_processes, arguments.num_machines
    expected = {"cpu": (2, 1), "one-gpu": (1, 1), "fsdp2-multinode": (16, 2)}.get(name, (8, 1))
    assert (processes, machines) == expected


def test_the_number_of_processes_on_the_command_line_beats_the_file() -> None:
    assert launch_arguments("fsdp2", "--num_processes", "4").num_processes == 4


def fsdp_environment(name: str, *words: str) -> dict[str, str]:
    environment = prepare_multi_gpu_env(launch_arguments(name, "--main_process_port", "29517", *words))
    return {key: value for key, value in environment.items() if key.startswith(("FSDP_", "ACCELERATE_"))}


@pytest.mark.parametrize(
    ("name", "words"),
    [("fsdp2", ()), ("fsdp2-multinode", ("--machine_rank", "1", "--main_process_ip", "10.0.0.1"))],
)
def test_fsdp2_reaches_the_processes(name: str, words: tuple[str, ...]) -> None:
    environment = fsdp_environment(name, *words)
    wanted = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
        "FSDP_OFFLOAD_PARAMS": "false",
        "ACCELERATE_MIXED_PRECISION": "no",
    }
    assert {key: environment[key] for key in wanted} == wanted
    assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in environment, "the model's own _no_split_modules say what is wrapped"


def test_accelerates_plugin_takes_that_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import FullyShardedDataParallelPlugin

    for key, value in fsdp_environment("fsdp2").items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, False)
    assert plugin.transformer_cls_names_to_wrap is None


def test_ddp_sets_no_fsdp() -> None:
    environment = fsdp_environment("ddp")
    assert "ACCELERATE_USE_FSDP" not in environment
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"


def test_the_two_fsdp_files_differ_in_the_machines_alone() -> None:
    one, several = (yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("fsdp2", "fsdp2-multinode"))
    assert {key for key in one if one[key] != several[key]} == {"num_machines", "num_processes"}
    assert one.keys() == several.keys()


def test_cpu_starts_two_processes(tmp_path: Path) -> None:
    """`accelerate launch --cpu --num_processes 2` would start one."""
    (tmp_path / "note_rank.py").write_text(NOTE)
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    words = ["launch", "--config_file", str(CONFIGS / "cpu.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words, "-m", "note_rank"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    notes = sorted(path.read_text() for path in tmp_path.glob("rank_*.txt"))
    assert notes == ["0 of 2, on the CPU: true", "1 of 2, on the CPU: true"]
