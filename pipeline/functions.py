"""Python functions that a recipe names as `module:function`: loaded from the working directory, checked at every call.

Judges and reward functions are such functions: called with equally long lists, they return one number per row.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

EXCERPT = 60


class _Unusable(Exception):
    """What is wrong with a function's answer, and the row that did it where one answer tells."""

    def __init__(self, problem: str, row: int | None = None) -> None:
        super().__init__(problem)
        self.row = row


@dataclass(frozen=True)
class NamedFunction:
    """A function of the user's own, called with lists of equal length, that owes one finite number per row.

    Attributes:
        title: what errors call it, "judge vader".
        function: takes the lists, returns the numbers.
    """

    title: str
    function: Callable[..., Any]

    def __call__(self, *columns: Sequence[Any], where: Callable[[int], str]) -> list[float]:
        """One finite number per row of the `columns`, which the function gets as lists.

        Args:
            where: describes a row for the error text.

        Errors:
            UserError: the function raises, returns another number of values, or anything but finite numbers. The row
                that did it is found by calling the function with one row at a time.
            ValueError: columns of different length.
        """
        if len({len(column) for column in columns}) != 1:
            raise ValueError(f"{self.title}: columns of {[len(column) for column in columns]} rows")
        try:
            return self._numbers(columns)
        except _Unusable as error:
            cause, row = (error, error.row) if error.row is not None else self._first_failing_row(columns, error)
            raise UserError(
                f"{self.title}: {'the whole batch' if row is None else where(row)}: {cause}.",
                mend="Make it return a list with one finite number per response, in their order, the empty one "
                "included.",
            ) from cause

    def _numbers(self, columns: Sequence[Sequence[Any]]) -> list[float]:
        rows, values = len(columns[0]), None
        try:
            returned = self.function(*(list(column) for column in columns))
            if isinstance(returned, Iterable) and not isinstance(returned, str | bytes | Mapping):
                values = list(returned)
        except Exception as error:  # the function is the user's: whatever it raises is told with its row
            raise _Unusable(f"{type(error).__name__}: {error}") from error
        if values is None or len(values) != rows:
            got = type(returned).__name__ if values is None else f"{len(values)} values"
            raise _Unusable(f"returned {got} for {rows} responses")
        numbers = [_number(value) for value in values]
        for row, number in enumerate(numbers):
            if not math.isfinite(number):
                raise _Unusable(f"returned {values[row]!r}, which is not a finite number", row)
        return numbers

    def _first_failing_row(self, columns: Sequence[Sequence[Any]], whole: _Unusable) -> tuple[_Unusable, int | None]:
        """The first row that fails alone, with its error; where none does, the error of the whole batch."""
        for row in range(len(columns[0])):
            try:
                self._numbers([[column[row]] for column in columns])
            except _Unusable as error:
                return error, row
        return whole, None


def load_function(key: str, title: str, name: str, kwargs: Mapping[str, Any], takes: Sequence[str]) -> NamedFunction:
    """The function that the recipe names at `key` as `module:function`, with its `kwargs` bound.

    Args:
        takes: the lists that it will be called with, by name.

    Errors:
        UserError: it cannot be imported, or not be called with those lists and `kwargs`.
    """
    module_name, separator, attribute = name.partition(":")
    if not (module_name and separator and attribute.isidentifier()):
        raise UserError(
            f"{key}.function is {name!r}.", mend="Write it as `module:function`, for example `my_module:politeness`."
        )
    function = _attribute(key, module_name, attribute)
    if not callable(function):
        raise UserError(f"{key}.function: {name} is not callable.", mend="Name one.")
    try:
        inspect.signature(function).bind(*([] for _ in takes), **kwargs)
    except TypeError as error:
        arguments = ", ".join([*takes, *(f"{keyword}=..." for keyword in kwargs)])
        raise UserError(
            f"{key}: {name} cannot be called with ({arguments}): {error}.",
            mend=f"Make it take {len(takes)} lists and the keys of {key}.kwargs.",
        ) from error
    return NamedFunction(title, lambda *columns: function(*columns, **kwargs))


def excerpt(text: str) -> str:
    """The text in quotes, cut to `EXCERPT` characters."""
    return repr(text if len(text) <= EXCERPT else text[:EXCERPT] + "...")


def _attribute(key: str, module_name: str, attribute: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: whatever it raises is told by name
        raise UserError(
            f"{key}.function: importing {module_name} failed: {type(error).__name__}: {error}.",
            mend="Run from the directory that holds the module, or install what it needs.",
        ) from error
    if attribute not in vars(module):
        raise UserError(
            f"{key}.function: module {module_name} has no {attribute}.",
            mend="Name a function that the module defines.",
        )
    return vars(module)[attribute]


def _number(value: Any) -> float:
    """The value as a float; NaN for what is no number, text included."""
    try:
        return math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # torch refuses a tensor of many with the last
        return math.nan
