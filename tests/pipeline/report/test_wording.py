from __future__ import annotations

import math

import pytest

from pipeline.report.wording import (
    count,
    counted,
    decimals_for,
    durations,
    finite,
    interval,
    listed,
    number,
    p_value,
    percent,
    percent_interval,
    plain,
)


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [(-0.0004, 3, "0.000"), (-1.5, 1, "\N{MINUS SIGN}1.5"), (12345.678, 1, "12,345.7"), (0.0, 0, "0")],
)
def test_numbers_have_a_true_minus_and_no_negative_zero(value: float, decimals: int, text: str) -> None:
    assert number(value, decimals) == text


def test_what_is_no_finite_number_is_none() -> None:
    assert [finite(value) for value in (None, "1", True, math.nan, math.inf, 2)] == [None] * 5 + [2.0]


def test_a_column_has_the_decimals_of_its_largest_number() -> None:
    assert [decimals_for([0.5, value, None]) for value in (9.9, -10.0, 100.0, 1000.0)] == [3, 2, 1, 0]


def test_an_interval_needs_both_ends() -> None:
    assert interval(0.1, 0.25, percent) == "[10.0%, 25.0%]"
    assert percent_interval(0.1, 0.25) == "[10.0, 25.0]"
    assert interval(0.1, None, percent) == interval(math.nan, 0.2, percent) == "no interval"


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([64.0, 20.0], ["64.0 s", "20.0 s"]),
        ([588.0, 64.0], ["9.80 min", "1.07 min"]),
        ([7200.0, 90.0, None], ["2.00 h", "0.03 h"]),
        ([0.5], ["0.50 s"]),
    ],
)
def test_durations_of_a_column_share_a_unit(values: list[float | None], texts: list[str]) -> None:
    assert [durations(values)(value) for value in values if value is not None] == texts


def test_the_rest() -> None:
    assert [p_value(value) for value in (0.0004, 0.0123, None, math.nan)] == ["< 0.001", "0.012", *["not tested"] * 2]
    assert [count(value) for value in (400.0, 2.5, 1234.6)] == ["400", "2.5", "1,235"]
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert (counted(1, "seed"), counted(1024, "prompt")) == ("1 seed", "1,024 prompts")
    assert plain({"a": None, "b": [True, 1.5]}) == "a: none; b: yes, 1.500"
