"""What a configuration file of accelerate says, as the environment that `accelerate launch` would give every rank."""

from __future__ import annotations

import os
from typing import Any

import torch
import yaml
from accelerate.commands import launch
from accelerate.utils.launch import prepare_multi_gpu_env

from pipeline.errors import UserError

ON_CPU = {"ACCELERATE_USE_CPU": "true"}
PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_")


def environment_of(file: str, world: int) -> dict[str, str]:
    """What `accelerate launch --config_file file` sets for `world` ranks, beside their numbers.

    Errors:
        UserError: the file is none of accelerate's, a value is not one that it knows, or it asks for DeepSpeed.
    """
    before = {key: os.environ.pop(key) for key in list(os.environ) if key.startswith(PREFIXES)}
    try:
        return _environment_of(file, world)
    finally:
        os.environ.update(before)


def _environment_of(file: str, world: int) -> dict[str, str]:
    words = ["--config_file", file, "--num_processes", str(world), "--num_machines", "1", "--main_process_port", "0"]
    try:
        arguments, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args([*words, "x"]))
        prepared: Any = None if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(
            f"launch.accelerate: {file}: {error}", mend="Write it with `accelerate config`, or see configs/accelerate."
        ) from error
    if prepared is None:
        raise UserError(
            f"launch.accelerate: {file} asks for DeepSpeed, and the stages shard with torch's FSDP2 only.",
            mend="Use configs/accelerate/fsdp2.yaml.",
        )
    on_cpu = not torch.cuda.is_available() and not arguments.use_fsdp
    found = {key: str(value) for key, value in prepared.items() if key.startswith(PREFIXES)}
    return found | (ON_CPU if on_cpu else {})
