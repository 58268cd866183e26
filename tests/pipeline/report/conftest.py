"""The page of the made-up comparison, written once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.report.page import HTML, MARKDOWN, write_report
from tests.pipeline.report.fixture import results, samples


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with report.html and report.md of five methods and three seeds."""
    out = tmp_path_factory.mktemp("report")
    found = results()
    write_report(found, samples(found), out)
    return out


@pytest.fixture(scope="session")
def page(written: Path) -> str:
    return (written / HTML).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def markdown(written: Path) -> str:
    return (written / MARKDOWN).read_text(encoding="utf-8")
