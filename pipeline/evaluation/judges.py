"""Independent judges of responses: functions named in the recipe, checked in what they return."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.recipe import EvalSection, Judge

JudgeFunction = Callable[[list[str], list[str]], list[float]]
"""Lists of prompt and response texts -> one finite score per response, higher is better."""

_EXCERPT = 60


def load_judges(section: EvalSection) -> dict[str, JudgeFunction]:
    """Return the judges of `eval.judges` by name, called with lists of prompts and responses.

    Each returned function raises UserError, naming the judge and the row, when the judge raises or
    returns anything but one finite number per response. Raises UserError for a judge that cannot be
    imported or called.
    """
    return {name: _checked(name, _resolve(name, judge)) for name, judge in section.judges.items()}


def _resolve(name: str, judge: Judge) -> Callable[..., Any]:
    key = f"eval.judges.{name}"
    module_name, separator, attribute = judge.function.partition(":")
    if not (module_name and separator and attribute.isidentifier()):
        raise UserError(
            f"{key}.function is {judge.function!r}.",
            mend="Write it as `module:function`, for example `my_judges:politeness`.",
        )
    function = _attribute(key, module_name, attribute)
    if not callable(function):
        raise UserError(f"{key}.function: {judge.function} is not callable.", mend="Name one.")
    try:
        inspect.signature(function).bind([], [], **judge.kwargs)
    except TypeError as error:
        raise UserError(
            f"{key}: {judge.function} cannot be called with (prompts, responses"
            f"{''.join(f', {keyword}=...' for keyword in judge.kwargs)}): {error}.",
            mend=f"Make it take two lists and the keys of {key}.kwargs.",
        ) from error
    return lambda prompts, responses: function(prompts, responses, **judge.kwargs)


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


def _checked(name: str, function: Callable[..., Any]) -> JudgeFunction:
    def judge(prompts: list[str], responses: list[str]) -> list[float]:
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
        returned = _call(name, function, prompts, responses)
        try:
            values = list(returned)
        except TypeError:
            values = None
        if values is None or isinstance(returned, str | dict) or len(values) != len(responses):
            got = f"{len(values)} values" if values is not None else type(returned).__name__
            raise UserError(
                f"judge {name}: returned {got} for {len(responses)} responses.",
                mend="Return a list with one number per response, in their order.",
            )
        return [_number(name, row, value, responses) for row, value in enumerate(values)]

    return judge


def _call(name: str, function: Callable[..., Any], prompts: list[str], responses: list[str]) -> Any:
    try:
        return function(list(prompts), list(responses))
    except Exception as error:  # the judge is the user's: whatever it raises is told with its row
        row, cause = _first_failing_row(function, prompts, responses) or (None, error)
        where = f"row {row} ({_excerpt(responses[row])})" if row is not None else "the whole batch"
        raise UserError(
            f"judge {name}: {where}: {type(cause).__name__}: {cause}.",
            mend="Make the function return a number for every response, the empty one included.",
        ) from error


def _first_failing_row(
    function: Callable[..., Any], prompts: Sequence[str], responses: Sequence[str]
) -> tuple[int, Exception] | None:
    """Call the judge row by row and return the first row that raises, with its error."""
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        try:
            function([prompt], [response])
        except Exception as error:  # noqa: BLE001 - handed back to `_call`, which raises it
            return row, error
    return None


def _number(name: str, row: int, value: Any, responses: Sequence[str]) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"judge {name}: row {row} ({_excerpt(responses[row])}): returned {value!r}, which is not a finite number.",
            mend="Return a finite number for every response, the empty one included.",
        )
    return number


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= _EXCERPT else text[:_EXCERPT] + "...")
