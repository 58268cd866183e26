"""What the recipe's section `launch.slurm` refuses, and what containers see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.launch.submit import Request, launch
from pipeline.launchers import Stages
from pipeline.recipe import Recipe

RecipeOf = Callable[[str], Recipe]


@pytest.mark.parametrize(
    ("time", "longest"),
    [
        ("10", 299),  # minutes
        ("90:30", 2714),  # minutes:seconds, 5430 s
        ("1:00:10", 1804),  # 3610 s
        ("1-1", 44999),  # days-hours, 90000 s
        ("0-1:30", 2699),  # 5400 s
        ("0-0:10:04", 301),  # 604 s
        ("0", 65535),  # no limit; Slurm's own for --signal
        ("9-0", 65535),
    ],
)
def test_the_signal_comes_in_the_second_half(recipe_of: RecipeOf, time: str, longest: int) -> None:
    slurm = recipe_of(f'{{slurm: {{time: "{time}", signal_seconds: {longest}}}}}').launch.slurm
    assert slurm.signal_seconds == longest
    with pytest.raises(UserError, match=r"launch\.slurm.*(half of the time limit|65535)"):
        recipe_of(f'{{slurm: {{time: "{time}", signal_seconds: {longest + 1}}}}}')


def test_a_container_sees_further_directories(
    recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    launch = recipe_of("{slurm: {container: image.sqsh, mounts: ['/data:/data', '/sw:/opt:ro']}}").launch
    words = Stages(launch, {"TRISTAGE_LAUNCHER": "srun"}).start("policy.sft", Path("sft.partial")).words
    assert f"--container-mounts={tmp_path}:{tmp_path},/data:/data,/sw:/opt:ro" in words


def test_an_accelerate_file_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "output_dir": str(tmp_path / "runs"),
            "model": {"name_or_path": "m"},
            "launch": {"accelerate": str(tmp_path / "absent.yaml")},
        }
    )
    with pytest.raises(UserError, match=r"launch\.accelerate: .*absent\.yaml does not exist"):
        launch(recipe, Request("recipe.yaml", (), ("sft",), dry_run=True))
    assert not (tmp_path / "runs").exists()
