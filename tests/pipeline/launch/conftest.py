"""Recipes and jobs that need no model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.launch.launcher import StageJob
from pipeline.load import load_recipe
from pipeline.recipe import Recipe


@pytest.fixture
def recipe_of(tmp_path: Path) -> Callable[[str], Recipe]:
    """A recipe by its `launch` section in YAML's flow style, `recipe_of("{processes: 2}")`."""

    def make(launch: str = "{}") -> Recipe:
        file = tmp_path / "recipe.yaml"
        file.write_text(f"name: tiny\nmodel: {{name_or_path: model}}\nlaunch: {launch}\n")
        return load_recipe(file)

    return make


def job_of(stage: str, directory: Path, *overrides: str) -> StageJob:
    """The job of a stage launched in `directory`."""
    script = directory / "runs" / "tiny" / "slurm" / f"{stage}.sbatch"
    return StageJob(stage, f"tiny-{stage}", [stage, "recipe.yaml", *overrides], directory, script)
