"""Judges on several ranks: each judges its share of the responses, and all get all scores."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.errors import UserError
from pipeline.evaluation.judges import JudgeFunction
from pipeline.ranks import Ranks


def shared_judges(judges: Mapping[str, JudgeFunction], ranks: Ranks) -> dict[str, JudgeFunction]:
    """The same judges for ranks that call them together with the same responses.

    What a judge raises on one rank is raised on all of them.
    """
    if ranks.world == 1:
        return dict(judges)
    return {name: _shared(judge, ranks) for name, judge in judges.items()}


def _shared(judge: JudgeFunction, ranks: Ranks) -> JudgeFunction:
    def judged(prompts: list[str], responses: list[str]) -> list[float]:
        own = ranks.share(range(len(responses)))
        scores: list[float] = []
        words: tuple[str, str] | None = None
        try:
            if own:
                scores = judge([prompts[row] for row in own], [responses[row] for row in own])
        except UserError as error:
            words = error.message, error.mend
        gathered = ranks.gather((words, scores))
        for told, _ in gathered:
            if told is not None:
                raise UserError(told[0], mend=told[1])
        found = [0.0] * len(responses)
        for rank, (_, part) in enumerate(gathered):
            found[rank :: ranks.world] = part
        return found

    return judged
