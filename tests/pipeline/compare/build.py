"""Evaluations made by hand, for what reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.compare.arms import Arm, Step
from pipeline.compare.gather import Evaluated, Gathered
from pipeline.load import load_recipe
from tests.workplace import ROOT


def gathered(scores: Mapping[str, Any], responses: Mapping[str, Any] | None = None) -> Gathered:
    """Policies whose samples one judge, `gold`, gave these scores [seeds, prompts, samples]."""
    of = {}
    for method, values in scores.items():
        table = np.array(values, dtype=float)
        texts = None if responses is None else np.array(responses[method])
        of[method] = [evaluated(method, seed, table[seed], texts) for seed in range(len(table))]
    return Gathered(of)


def evaluated(method: str, seed: int, table: np.ndarray, texts: np.ndarray | None) -> Evaluated:
    """One policy's evaluation: `table` [prompts, samples]."""
    prompts, samples = table.shape
    rows = [
        {
            "prompt_index": p,
            "sample": k,
            "prompt": f"prompt {p}",
            "response": f"{method} {seed} {p} {k}" if texts is None else str(texts[seed][p][k]),
            "tokens": 3 + k,
            "finished": True,
            "score": None,
            "kl": 0.5,
            "gold": float(table[p, k]),
        }
        for p in range(prompts)
        for k in range(samples)
    ]
    report = {"prompts": prompts, "samples_per_prompt": samples, "prompts_sha256": "p", "kl_per_token": 0.1}
    report |= {"distinct_1": 0.5, "distinct_2": 0.6}
    figures = {"report": report, "truncation_rate": 0.0, "self_bleu": 1.0, "entropy": 2.0, "likelihoods": None}
    step = Step("sft", load_recipe(ROOT / "recipes" / "demo.yaml"), {})
    arm = Arm(method, seed, (step,), Step("evaluate", step.recipe, {}))
    return Evaluated(
        arm,
        {**figures, "sft_perplexity": 9.0},
        rows,
        {"metrics": {}, "models_in_memory": {"training": ["policy", "reference"], "peak": []}},
        {},
    )
