"""The evaluations of all arms, as arrays of seeds x prompts x samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts import read_manifest
from pipeline.compare.arms import Arm
from pipeline.errors import UserError
from pipeline.tracking import SAMPLES

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Evaluated:
    """One policy's evaluation.

    Attributes:
        figures: `evaluation.json` of the evaluate stage.
        rows: its samples, prompt by prompt.
        manifest: that of the policy.
        evaluator: that of the evaluation.
    """

    arm: Arm
    figures: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    manifest: Mapping[str, Any]
    evaluator: Mapping[str, Any]


@dataclass(frozen=True)
class Gathered:
    """All evaluations: `of[method]` has one for each seed, in the order of the seeds."""

    of: Mapping[str, Sequence[Evaluated]]

    @property
    def prompts(self) -> int:
        """Held-out prompts."""
        return int(self._first.figures["report"]["prompts"])

    @property
    def samples(self) -> int:
        """Samples of each prompt."""
        return int(self._first.figures["report"]["samples_per_prompt"])

    @property
    def _first(self) -> Evaluated:
        return next(iter(self.of.values()))[0]

    def column(self, method: str, name: str) -> np.ndarray:
        """A column of the samples, float64 [seeds, prompts, samples]."""
        values = [[row[name] for row in each.rows] for each in self.of[method]]
        return np.array(values, dtype=np.float64).reshape(len(values), self.prompts, self.samples)

    def characters(self, method: str) -> np.ndarray:
        """Lengths of the responses in characters, float64 [seeds, prompts, samples]."""
        values = [[len(row["response"]) for row in each.rows] for each in self.of[method]]
        return np.array(values, dtype=np.float64).reshape(len(values), self.prompts, self.samples)

    def has(self, name: str) -> bool:
        """Whether every policy's samples have the column."""
        return all(each.rows[0].get(name) is not None for evaluated in self.of.values() for each in evaluated)


def gather(arms: Sequence[Arm]) -> Gathered:
    """Reads the evaluations of finished arms.

    Errors:
        UserError: two policies were evaluated on different prompts.
    """
    of: dict[str, list[Evaluated]] = {}
    for arm in arms:
        of.setdefault(arm.method, []).append(read_evaluation(arm))
    everything = [each for evaluated in of.values() for each in evaluated]
    first = everything[0].figures["report"]["prompts_sha256"]
    for each in everything:
        if each.figures["report"]["prompts_sha256"] != first:
            raise UserError(
                f"{each.arm.evaluation.out} was made on other held-out prompts than "
                f"{everything[0].arm.evaluation.out}: some are too long for this policy's prompt form.",
                mend="Raise data.max_prompt_tokens, or set data.long_prompts: truncate_left.",
            )
    return Gathered(of)


def read_evaluation(arm: Arm) -> Evaluated:
    """What the evaluate stage of a finished arm wrote."""
    out = arm.evaluation.out
    figures = json.loads((out / EVALUATION).read_text(encoding="utf-8"))
    return Evaluated(arm, figures, read_rows(out / SAMPLES), read_manifest(arm.policy), read_manifest(out))


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file that a finished stage wrote."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
