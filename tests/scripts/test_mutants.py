"""Every mutant can be made; `make mutants` runs them."""

from __future__ import annotations

import pytest

from scripts.mutants import MUTANTS, ROOT, mutate
from scripts.mutants_list import Mutant


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_what_mutants_change_stands_once_in_their_file(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    for mutant in MUTANTS:
        if mutant.file == file:
            assert mutate(text, mutant) != text
            assert all((ROOT / test.partition("::")[0]).is_file() for test in mutant.tests.split())


def test_a_text_that_stands_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="occurs 2 times in file"):
        mutate("a b a", Mutant("file", "a", "c", "tests"))
