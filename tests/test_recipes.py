from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.load import dump_recipe, load_recipe
from pipeline.runner import plan
from pipeline.stages import ORDER

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

pytestmark = pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)


def test_a_shipped_recipe_survives_being_dumped_and_read(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(copy) == recipe
    assert recipe.name == file.stem


def test_a_shipped_recipe_plans_from_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fresh clone: no data, no runs, no network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    planned = plan(load_recipe(file))
    assert [(stage.name, stage.state) for stage in planned] == [(name, "start") for name in ORDER], planned
    assert [path.name for path in tmp_path.iterdir()] == ["assets"]


def test_a_shipped_recipe_is_shown_and_planned(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["show", str(file)])
    assert f"name: {file.stem}" in capsys.readouterr().out
    main(["plan", str(file)])
    out = capsys.readouterr().out
    assert all(name in out for name in ORDER)
    assert "optimiser steps of" in out
