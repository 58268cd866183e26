"""Which rows a step uses: a pure function of its number, so that a resumed run goes on where it was."""

from __future__ import annotations

from functools import lru_cache

import numpy


def pass_indices(rows: int, size: int, step: int, seed: int) -> list[int]:
    """Which `size` of `rows` rows step number `step` (from 1) uses: slices of one fresh permutation per pass."""
    chosen = []
    for position in range((step - 1) * size, step * size):
        epoch, place = divmod(position, rows)
        chosen.append(int(_permutation(rows, epoch, seed)[place]))
    return chosen


@lru_cache(maxsize=4)
def _permutation(rows: int, epoch: int, seed: int) -> numpy.ndarray:
    return numpy.random.default_rng((seed, epoch)).permutation(rows)
