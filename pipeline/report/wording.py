"""Numbers as people read them: decimals, percent, intervals, durations; a missing number is said in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

NOT_MEASURED = "not measured"
NO_INTERVAL = "no interval"
ALPHA = 0.05
"""A difference counts as significant when its p-value, corrected after Holm, is below this."""

_MINUTE, _HOUR = 60.0, 3600.0


def finite(value: object) -> float | None:
    """`value` as a float; None for what is missing, not a number, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: float, decimals: int) -> str:
    """With a true minus sign and thousands separated; a rounded zero has no sign."""
    text = f"{value:,.{decimals}f}"
    if text.startswith("-"):
        text = text[1:] if not text.strip("-0.,") else "\N{MINUS SIGN}" + text[1:]
    return text


def decimals_for(values: Iterable[float | None]) -> int:
    """Decimals that a column needs: three below 10, two below 100, one below 1000, none above."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    return next((places for limit, places in ((10, 3), (100, 2), (1000, 1)) if largest < limit), 0)


def percent(value: float) -> str:
    """A share 0..1 as percent with one decimal."""
    return f"{number(100 * value, 1)}%"


def percent_interval(low: object, high: object) -> str:
    """`[low, high]` of a share 0..1, in percent without the sign."""
    return interval(low, high, lambda share: number(100 * share, 1))


def interval(low: object, high: object, shown: Callable[[float], str]) -> str:
    """`[low, high]`, or `no interval` where an end is missing."""
    ends = finite(low), finite(high)
    if ends[0] is None or ends[1] is None:
        return NO_INTERVAL
    return f"[{shown(ends[0])}, {shown(ends[1])}]"


def durations(values: Iterable[object]) -> Callable[[float], str]:
    """How the durations of one column are written, in seconds: all in the unit that suits the longest."""
    longest = max((value for value in map(finite, values) if value is not None), default=0.0)
    unit, name = next((u, n) for u, n in ((_HOUR, "h"), (_MINUTE, "min"), (1.0, "s")) if longest >= 1.5 * u or u == 1.0)
    places = 1 if longest / unit >= 10 else 2
    return lambda value: f"{number(value / unit, places)} {name}"


def count(value: float) -> str:
    """A whole number with thousands separated; means of several seeds may keep one decimal."""
    return number(value, 0 if value == int(value) or abs(value) >= 1000 else 1)


def gib(value: float) -> str:
    """Memory in GiB."""
    return f"{number(value, 2)} GiB"


def p_value(value: object) -> str:
    """`< 0.001` or three decimals; in words where there is none."""
    p = finite(value)
    if p is None:
        return "not tested"
    return "< 0.001" if p < 0.001 else number(p, 3)


def shown(value: object, form: Callable[[float], str], missing: str = NOT_MEASURED) -> str:
    """`form(value)`, or `missing` where there is no finite number."""
    known = finite(value)
    return missing if known is None else form(known)


def plain(value: object) -> str:
    """Any value of results.json as text: numbers short, lists joined, nothing as `none`."""
    known = finite(value)
    if known is not None:
        return count(known) if known == int(known) else number(known, decimals_for([known]))
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return str(value)


def listed(names: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    items = list(names)
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)


def counted(amount: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def mean_of(values: Iterable[Any]) -> float | None:
    """Mean of the finite numbers among `values`; None without any."""
    known = [number for number in map(finite, values) if number is not None]
    return math.fsum(known) / len(known) if known else None
