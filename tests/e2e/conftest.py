"""One finished run of all three stages, shared by the tests, which work on copies of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workplace import Workplace, make_workplace


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace in which sft, rm and ppo ran without interruption. Only to be read."""
    workplace = make_workplace(tmp_path_factory.mktemp("finished") / "work")
    done = workplace.tristage("run", "recipe.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    return workplace


@pytest.fixture
def copied(finished_run: Workplace, tmp_path: Path) -> Callable[..., Workplace]:
    """Makes a copy of the finished run without the named stages: `copied("ppo")`."""

    def copy(*without: str) -> Workplace:
        target = tmp_path / "work"
        shutil.copytree(finished_run.path, target)
        for stage in without:
            shutil.rmtree(target / "runs" / "tiny" / stage)
        return Workplace(target)

    return copy


@pytest.fixture
def fresh(tmp_path: Path) -> Workplace:
    """A workplace in which nothing has run."""
    return make_workplace(tmp_path / "work")
