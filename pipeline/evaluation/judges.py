"""Independent judges of responses: functions named in the recipe, checked in what they return."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.functions import NamedFunction, excerpt, load_function
from pipeline.recipe import EvalSection

JudgeFunction = Callable[[list[str], list[str]], list[float]]
"""Lists of prompt and response texts -> one finite score per response, higher is better."""


def load_judges(section: EvalSection) -> dict[str, JudgeFunction]:
    """Return the judges of `eval.judges` by name, called with lists of prompts and responses.

    Each returned function raises UserError, naming the judge and the row, when the judge raises or
    returns anything but one finite number per response. Raises UserError for a judge that cannot be
    imported or called.
    """
    loaded = {
        name: load_function(
            f"eval.judges.{name}", f"judge {name}", judge.function, judge.kwargs, ("prompts", "responses")
        )
        for name, judge in section.judges.items()
    }
    return {name: _judge(function) for name, function in loaded.items()}


def _judge(function: NamedFunction) -> JudgeFunction:
    def judge(prompts: list[str], responses: list[str]) -> list[float]:
        return function(prompts, responses, where=lambda row: f"row {row} ({excerpt(responses[row])})")

    return judge
