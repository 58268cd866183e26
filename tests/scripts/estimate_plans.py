"""Plans for the tests of the estimates: the benchmark's tiny model on a CPU, and public ones on GPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.load import load_recipe
from pipeline.recipe import Recipe
from scripts.bench_ppo_models import WORKLOADS
from scripts.estimate_check import bench_shape
from scripts.estimate_plan import GPUS, Plan
from scripts.estimate_shapes import NAMED

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE = ROOT / "recipes" / "llama3-8b-fsdp.yaml"
TINY = WORKLOADS["tiny"]


def tiny_recipe(ppo: Mapping[str, Any] | None = None, **sections: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"name_or_path": "tiny"},
            "data": {"max_prompt_tokens": TINY.prompt_tokens, "max_response_tokens": TINY.response_tokens},
            "ppo": {"rollout_batch_size": TINY.batch, **(ppo or {})},
            **sections,
        }
    )


def tiny_plan(ppo: Mapping[str, Any] | None = None, **changed: Any) -> Plan:
    plan = Plan(
        shape=bench_shape(TINY.shape),
        recipe=tiny_recipe(ppo),
        gpu=GPUS["cpu"],
        gpus=1,
        machines=1,
        sharding="ddp",
        mode="colocate",
        prompt_tokens=TINY.prompt_tokens,
        response_tokens=TINY.mean_length,
    )
    return dataclasses.replace(plan, **changed)


def large_plan(name: str, *overrides: str, **changed: Any) -> Plan:
    plan = Plan(
        shape=NAMED[name],
        recipe=load_recipe(RECIPE, overrides),
        gpu=GPUS["h100-80g"],
        gpus=8,
        machines=1,
        sharding="fsdp2",
        mode="colocate",
        prompt_tokens=512,
        response_tokens=256,
    )
    return dataclasses.replace(plan, **changed)
