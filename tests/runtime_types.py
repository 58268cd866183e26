"""The checker of shapes and types that the tests run the pure modules under.

An int is a float, as PEP 484 has it. Choices are left to the functions, which refuse a wrong one with a ValueError
that the tests provoke.
"""

from __future__ import annotations

from typing import Literal

from beartype import BeartypeConf, FrozenDict, beartype

CHOICES = (
    Literal["k1", "k2", "k3"],
    Literal["token_mean", "sequence_mean", "fixed_length"],
    Literal["k2", "k3"],
    Literal["token", "sequence"],
    Literal["clamp", "mask"],
    Literal["prompt_mean", "pair_mean"],
    Literal["sigmoid", "robust", "hinge"],
    Literal["sigmoid", "hinge"],
    Literal["pairs", "labels", "targets"],
)
checked = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict(dict.fromkeys(CHOICES, str))))
