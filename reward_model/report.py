"""What the finished reward model is worth: held-out figures, plots, samples and the normalisation for PPO."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.artifacts import write_json
from pipeline.data import load_prompts
from pipeline.errors import UserError
from pipeline.ranks import ALONE, Ranks
from pipeline.recipe import Recipe
from pipeline.stage import Stage
from pipeline.tokens import EncodedRanking, Encoder, encode_prompts
from reward_model.evaluate import evaluate_rankings, pairs_of
from reward_model.plots import save_plots
from reward_model.score import load_reward_model, score_responses, token_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EVALUATION = "evaluation.json"
MAX_TOKENS = 16384
"""Padded tokens in one forward of the reward model."""
SHOWN_RANKINGS = 8
"""Held-out rankings kept as samples at either end: ordered best and ordered worst."""


@dataclass(frozen=True, slots=True)
class RankingData:
    """Encoded rankings with an ordered pair each, and the encoder that made them."""

    train: list[EncodedRanking]
    held_out: list[EncodedRanking]
    encoder: Encoder


@dataclass(frozen=True, slots=True)
class PolicySamples:
    """Responses of the SFT policy and the engine they come from."""

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    engine: dict[str, str]
    """`name` and `version`."""


def measure(stage: Stage, data: RankingData, step: int) -> dict[str, Any]:
    """Evaluate the saved model on the held-out rankings and fix its normalisation.

    Writes `evaluation.json`, four plots and samples under the step after `step`, the last of training, so that a
    resumed run replaces them. Returns the metrics for the manifest.
    """
    ranks = stage.ranks
    model = load_reward_model(stage.out, DTYPES[stage.recipe.model.dtype], ranks.device)
    scores = score_rankings(model, data.held_out, ranks)
    evaluation = evaluate_rankings(data.held_out, scores, seed=stage.recipe.seed)
    samples = sample_policy(stage, data.encoder)
    policy_scores = shared_scores(model, samples.prompt_ids, samples.response_ids, ranks)
    normalisation = normalise(policy_scores.tolist(), samples.engine)
    stage.record(normalisation=normalisation, evaluation=evaluation)
    if ranks.is_main:
        write_json(stage.out / EVALUATION, {**evaluation, "normalisation": normalisation})
        lengths = [len(ids) for ranking in data.held_out for ids in ranking.response_ids]
        flat = [score for values in scores for score in values]
        save_plots(stage.out, evaluation, flat, lengths, policy_scores.tolist())
    stage.tracker.samples(step + 1, ranked_samples(data, scores))
    for line in summary_lines(evaluation, normalisation):
        stage.say(line)
    shown = ("accuracy", "accuracy_low", "accuracy_high", "pairs", "log_loss")
    return {
        **{f"eval/{key}": evaluation[key] for key in shown},
        **{f"eval/accuracy_gap_{b['gap']:g}": b["accuracy"] for b in evaluation["buckets"]["at_least"]},
        **{f"eval/accuracy_across_gap_{b['gap']:g}": b["accuracy"] for b in evaluation["across_prompts"]},
        "eval/ece": evaluation["calibration"]["ece"],
        "eval/score_length_spearman": evaluation["score_length"]["spearman"],
    }


def score_rankings(
    model: PreTrainedModel, rankings: Sequence[EncodedRanking], ranks: Ranks = ALONE
) -> list[list[float]]:
    """Raw scores of every answer, one list per ranking."""
    prompts = [ranking.prompt_ids for ranking in rankings for _ in ranking.response_ids]
    answers = [answer for ranking in rankings for answer in ranking.response_ids]
    flat = iter(shared_scores(model, prompts, answers, ranks).tolist())
    return [[next(flat) for _ in ranking.response_ids] for ranking in rankings]


def shared_scores(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
    ranks: Ranks,
) -> Tensor:
    """`score_responses` with its forwards shared by the ranks, the same ones however many there are."""
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompt_ids, response_ids, strict=True)]
    scores = torch.zeros(len(lengths))
    for batch in [rows for n, rows in enumerate(token_batches(lengths, MAX_TOKENS)) if n % ranks.world == ranks.rank]:
        parts = [prompt_ids[row] for row in batch], [response_ids[row] for row in batch]
        scores[batch] = score_responses(model, *parts, max_tokens=MAX_TOKENS)
    ranks.sum_([scores])
    return scores


def sample_policy(stage: Stage, encoder: Encoder) -> PolicySamples:
    """`rm.normalisation_samples` responses of the stage's policy on training prompts, as PPO samples them."""
    from rollout.engine import SamplingOptions
    from rollout.open import open_engine

    recipe: Recipe = stage.recipe
    encoded, _ = encode_prompts(load_prompts(recipe.data).train, encoder, recipe.data)
    count = recipe.rm.normalisation_samples
    random.Random(recipe.seed).shuffle(encoded)
    prompt_ids = [encoded[index % len(encoded)].ids for index in range(count)]
    sampling = SamplingOptions(max_new_tokens=recipe.data.max_response_tokens, temperature=recipe.rollout.temperature)
    engine = open_engine(recipe, Path(stage.inputs["policy"].path), stage.say, ranks=stage.ranks)
    try:
        seeds = [recipe.seed * 1_000_003 + index for index in range(count)]
        completions = engine.generate(prompt_ids, sampling, seeds)
    finally:
        engine.close()
    used = {"name": engine.name, "version": engine.version}
    return PolicySamples(prompt_ids, [list(c.token_ids) for c in completions], used)


def normalise(scores: Sequence[float], engine: dict[str, str]) -> dict[str, Any]:
    """Mean and population standard deviation of the scores of SFT samples, for the manifest.

    Raises UserError when the scores are not finite or all equal.
    """
    mean = math.fsum(scores) / len(scores)
    std = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / len(scores))
    if not math.isfinite(mean + std):
        raise UserError(
            "the reward model gives scores that are not finite.",
            mend="Lower rm.trainer.learning_rate and run the stage again.",
        )
    if std <= 1e-6 * max(1.0, abs(mean)):
        raise UserError(
            f"the reward model is constant: {len(scores)} SFT samples all score {mean:.4g}.",
            mend="Raise rm.trainer.learning_rate or num_train_epochs, or look at the preferences and the samples.",
        )
    return {"mean": mean, "std": std, "samples": len(scores), "engine": engine}


def ranked_samples(data: RankingData, scores: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Held-out rankings that the model orders best and worst, with their answers from best to worst rank."""

    def mean_margin(index: int) -> float:
        margin = pairs_of([data.held_out[index]], [scores[index]]).margin
        return float(margin.mean())

    order = sorted(range(len(scores)), key=mean_margin, reverse=True)
    shown = min(SHOWN_RANKINGS, len(order) // 2)
    chosen = [("best", index) for index in order[:shown]]
    chosen += [("worst", index) for index in order[::-1][: max(1, shown)]]
    rows = []
    for group, index in chosen:
        ranking = data.held_out[index]
        places = sorted(range(len(ranking.ranks)), key=lambda k: ranking.ranks[k])
        answers = [
            {
                "response": data.encoder.decode(ranking.response_ids[k]),
                "score": scores[index][k],
                "rank": ranking.ranks[k],
                "rating": None if ranking.ratings is None else ranking.ratings[k],
            }
            for k in places
        ]
        prompt = data.encoder.decode(ranking.prompt_ids)
        rows.append({"kind": group, "prompt": prompt, "mean_margin": mean_margin(index), "answers": answers})
    return rows


def summary_lines(evaluation: dict[str, Any], normalisation: dict[str, Any]) -> list[str]:
    """The evaluation in a few lines for people."""
    rows = [("all held-out pairs", evaluation)]
    rows += [(f"rating gap >= {b['gap']:g}", b) for b in evaluation["buckets"]["at_least"]]
    lines = []
    for name, row in rows:
        low, high = row["accuracy_low"], row["accuracy_high"]
        interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        lines.append(f"accuracy, {name}: {row['accuracy']:.3f}{interval} ({row['pairs']} pairs)")
    across = {row["gap"]: row for row in evaluation["across_prompts"]}
    if 1.0 in across:
        row = across[1.0]
        interval = f"[{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]"
        lines.append(f"accuracy, answers to any two prompts, rating gap >= 1: {row['accuracy']:.3f} {interval}")
    rho = evaluation["score_length"]["spearman"]
    lines.append(
        f"calibration error {evaluation['calibration']['ece']:.3f}, score-length Spearman "
        f"{'undefined' if rho is None else format(rho, '+.2f')}"
    )
    lines.append(
        f"normalisation from {normalisation['samples']} SFT samples ({normalisation['engine']['name']}): "
        f"mean {normalisation['mean']:.3f}, std {normalisation['std']:.3f}"
    )
    return lines
