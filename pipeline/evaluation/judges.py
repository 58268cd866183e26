"""Independent judges named in the recipe: functions that score answers, models and people who compare two of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.evaluation.contests import PairwiseJudge
from pipeline.functions import NamedFunction, excerpt, load_function
from pipeline.recipe import EvalSection

JudgeFunction = Callable[[list[str], list[str]], list[float]]
"""Lists of prompt and response texts -> one finite score per response, higher is better."""


def load_judges(section: EvalSection) -> dict[str, JudgeFunction]:
    """Return the functions among the judges of `eval.judges` by name, called with lists of prompts and responses.

    Each returned function raises UserError, naming the judge and the row, when the judge raises or
    returns anything but one finite number per response. Raises UserError for a judge that cannot be
    imported or called.
    """
    loaded = {
        name: load_function(
            f"eval.judges.{name}", f"judge {name}", judge.function, judge.kwargs, ("prompts", "responses")
        )
        for name, judge in section.judges.items()
        if judge.function is not None
    }
    return {name: _judge(function) for name, function in loaded.items()}


def load_pairwise_judges(section: EvalSection, folder: Path, say: Callable[[str], None]) -> dict[str, PairwiseJudge]:
    """Return the judges of `eval.judges` that compare two answers, by name.

    Args:
        folder: where they keep answers and ballots; made when it is needed.
        say: shows a line to the person at the terminal.

    Errors:
        UserError: a template lacks a slot, or a file that it names.
    """
    judges: dict[str, PairwiseJudge] = {}
    for name, judge in section.judges.items():
        if judge.llm is not None:
            from pipeline.evaluation.llm_judge import ChatJudge  # imports openai, which the stages do without

            judges[name] = ChatJudge(name, judge.llm, folder, say)
        elif judge.votes is not None:
            from pipeline.evaluation.votes import VotesJudge

            judges[name] = VotesJudge(name, Path(judge.votes), folder / name, say)
    return judges


def _judge(function: NamedFunction) -> JudgeFunction:
    def judge(prompts: list[str], responses: list[str]) -> list[float]:
        return function(prompts, responses, where=lambda row: f"row {row} ({excerpt(responses[row])})")

    return judge
