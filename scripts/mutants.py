"""Breaks the pure modules on purpose, one line at a time: `python -m scripts.mutants [WORD ...]`.

Every mutant is made in a temporary copy of the tree and must turn its tests red. Prints each as
killed or survived; ends with 1 when one survived, or when the text of a mutant no longer occurs
exactly once. WORDs keep the mutants whose file or new text contains one of them.

The processes are forked from one that has imported torch, so that a mutant costs about a second.
Of the conftests only tests/policy/conftest.py, with its tiny models, is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from scripts.mutants_direct import DIRECT
from scripts.mutants_list import MUTANTS as LISTED
from scripts.mutants_list import Mutant
from scripts.mutants_ranks import RANKS
from scripts.mutants_stats import STATS

MUTANTS = LISTED + DIRECT + RANKS + STATS
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "policy", "reward_model", "rollout", "tests")
FIXTURES = "tests.policy.conftest"
PROCESSES = 2
SECONDS = 60
MODELS = tuple(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "gpt2", "gemma2"))


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: `killed`, `survived`, or why it could not be tried."""

    verdict: str
    seconds: float
    output: str = ""


def mutate(text: str, mutant: Mutant) -> str:
    """The text with the mutant in it; ValueError unless `old` occurs exactly once."""
    count = text.count(mutant.old)
    if count != 1:
        raise ValueError(f"occurs {count} times in {mutant.file}, must be once")
    return text.replace(mutant.old, mutant.new)


def _copy_tree(to: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, to / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", to)
    (to / "assets").symlink_to(ROOT / "assets")


class Fixtures:
    """Pytest plugin: the tiny models of tests/policy/conftest.py, once every other plugin is there."""

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        session.config.pluginmanager.register(importlib.import_module(FIXTURES), FIXTURES)


@contextlib.contextmanager
def _processes_allowed() -> Iterator[None]:
    """Tests of several ranks may start processes, which this one, a worker of a pool, may not do and knows how to."""
    main, settings = sys.modules["__main__"], vars(multiprocessing.current_process())["_config"]
    settings["daemon"] = False
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _run_tests(tree: Path, tests: list[str]) -> tuple[int, str]:
    """Runs pytest in `tree`, in this process, which must not have imported the project."""
    os.chdir(tree)
    sys.dont_write_bytecode = True
    sys.path[:] = [str(tree), *(entry for entry in sys.path if entry and Path(entry).resolve() != ROOT)]
    arguments = ["-x", "-q", "--no-header", "--noconftest", "--assert=plain", "-p", "no:cacheprovider"]
    arguments += ["--hypothesis-seed=0", f"--timeout={SECONDS}"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), _processes_allowed():
        code = pytest.main([*arguments, *tests], plugins=[Fixtures()])
    loaded = [str(module.__file__) for module in list(sys.modules.values()) if "__file__" in vars(module)]
    strangers = [file for file in loaded if any(file.startswith(f"{ROOT / name}{os.sep}") for name in PACKAGES)]
    if strangers:
        raise RuntimeError(f"the tests imported the original, not the copy: {strangers[0]}")
    return int(code), printed.getvalue()


def try_mutant(mutant: Mutant | None) -> Outcome:
    """Runs the tests of one mutant, or all of them on the unchanged tree, in a temporary copy."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tristage-mutant-") as directory:
        tree = Path(directory).resolve()
        _copy_tree(tree)
        tests = sorted({test for each in MUTANTS for test in each.tests.split()})
        if mutant is not None:
            path = tree / mutant.file
            try:
                path.write_text(mutate(path.read_text(encoding="utf-8"), mutant), encoding="utf-8")
            except ValueError as error:
                return Outcome(str(error), time.monotonic() - start)
            tests = mutant.tests.split()
        code, output = _run_tests(tree, tests)
        os.chdir(ROOT)
    verdict = {0: "survived", 1: "killed"}.get(code, f"pytest ended with {code}")
    return Outcome(verdict, time.monotonic() - start, output)


def _import_once() -> None:
    """Imports what the tests need, so that the forked processes have it at once."""
    for name in ("hypothesis", "hypothesis.strategies", "jaxtyping", "peft", *MODELS):
        importlib.import_module(name)
    torch.set_num_threads(1)
    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))  # its first call imports a lot
    gc.collect()
    gc.freeze()


def main(arguments: list[str] | None = None) -> int:
    """Tries every mutant; 0 when all were killed, else 1."""
    parser = argparse.ArgumentParser(description="Every mutant must turn its tests red.")
    parser.add_argument("words", nargs="*", metavar="WORD", help="only mutants containing a WORD")
    words = parser.parse_args(arguments).words
    chosen = [m for m in MUTANTS if not words or any(w in m.file or w in m.new for w in words)]
    start = time.monotonic()
    _import_once()
    bad = 0
    with multiprocessing.get_context("fork").Pool(PROCESSES, maxtasksperchild=1) as pool:
        baseline = pool.apply(try_mutant, (None,))
        if baseline.verdict != "survived":
            print(baseline.output)
            print("the tests fail without any mutant: nothing can be said")
            return 1
        for mutant, outcome in zip(chosen, pool.imap(try_mutant, chosen), strict=True):
            bad += outcome.verdict != "killed"
            change = f"{mutant.old.strip()!r} -> {mutant.new.strip()!r}"
            print(f"{outcome.verdict:9} {outcome.seconds:5.1f} s  {mutant.file}: {change}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} killed in {time.monotonic() - start:.0f} s")
    return 1 if bad or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
