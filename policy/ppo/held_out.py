"""Evaluation of the current policy on held-out prompts: judges, score, KL to the reference, length, EOS."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.artifacts import write_json
from pipeline.errors import UserError
from pipeline.evaluation.judges import JudgeFunction
from pipeline.evaluation.policy_eval import PolicyReport, SampledResponses, measure, sample_responses
from pipeline.functions import excerpt
from pipeline.recipe import Recipe
from pipeline.records import Prompt
from pipeline.tokens import EncodedPrompt, Encoder
from policy.ppo.experience import policy_logprobs, reference_logprobs
from policy.ppo.roles import Roles
from rollout.batch import Completion, RolloutBatch
from rollout.engine import RolloutEngine

SLICE = 256
FOLDER = "evaluation"


@dataclass(frozen=True)
class HeldOut:
    """What every evaluation of a run shares; the seeds are the same each time, so policies are paired."""

    prompts: Sequence[EncodedPrompt]
    encoder: Encoder
    judges: Mapping[str, JudgeFunction]
    recipe: Recipe

    def evaluate(self, roles: Roles, engine: RolloutEngine) -> PolicyReport:
        """Samples, scores and judges the engine's current policy.

        Errors:
            UserError: a reward model gives a score that is not finite, or see `Rewards.scores` and `measure`.
        """
        recipe = self.recipe
        samples = sample_responses(
            engine,
            self.prompts,
            max_new_tokens=recipe.data.max_response_tokens,
            temperature=recipe.rollout.temperature,
            samples_per_prompt=recipe.eval.samples_per_prompt,
            seed=recipe.seed,
        )
        scores, kl = _scores_and_kl(roles, samples, self.encoder)
        return measure(samples, self.encoder, self.judges, scores=scores, kl_per_sequence=kl, seed=recipe.seed)


def save_report(out: Path, update: int, report: PolicyReport) -> None:
    """Keeps a report with its samples as `evaluation/update_<n>.json`."""
    (out / FOLDER).mkdir(exist_ok=True)
    write_json(out / FOLDER / f"update_{update:06d}.json", {**report.as_dict(), "rows": report.rows})


def load_report(out: Path, update: int) -> PolicyReport:
    """Reads what `save_report` wrote."""
    text = (out / FOLDER / f"update_{update:06d}.json").read_text(encoding="utf-8")
    return PolicyReport.from_dict(json.loads(text))


def report_metrics(report: PolicyReport) -> dict[str, float]:
    """The numbers of a report for metrics.jsonl, under `eval/`."""
    numbers = {f"eval/{name}": estimate.mean for name, estimate in report.judges.items()}
    numbers |= {"eval/length": report.length.mean, "eval/eos_rate": report.eos_rate}
    numbers |= {"eval/distinct_1": report.distinct_1, "eval/distinct_2": report.distinct_2}
    if report.score is not None:
        numbers["eval/score"] = report.score.mean
    if report.kl_per_sequence is not None:
        numbers["eval/kl"] = report.kl_per_sequence.mean
    return numbers


def _scores_and_kl(roles: Roles, samples: SampledResponses, encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Weighted sums of the reward sources and k1 KL sums [prompts * samples]."""
    flat = samples.flat
    scores, kl = [], []
    for start in range(0, len(flat), SLICE):
        part = flat[start : start + SLICE]
        batch = RolloutBatch.from_completions(
            [ids for _, ids, _ in part], [completion for _, _, completion in part], encoder.pad_token_id
        ).to(roles.device)
        policy, _ = policy_logprobs(roles, roles.policy, batch, with_entropy=False)
        reference = reference_logprobs(roles, batch)
        kl.append((policy - reference).sum(1).cpu())
        total, each = roles.rewards.scores(batch, [prompt for prompt, _, _ in part])
        _refuse_not_finite(each, part, encoder)
        scores.append(total.cpu())
    return torch.cat(scores), torch.cat(kl)


def _refuse_not_finite(
    each: Mapping[str, Tensor], part: Sequence[tuple[Prompt, list[int], Completion]], encoder: Encoder
) -> None:
    for name, scores in each.items():
        for row in (~scores.isfinite()).nonzero().flatten().tolist()[:1]:
            prompt, _, completion = part[row]
            raise UserError(
                f"ppo.rewards.{name}: {prompt.source}: held-out prompt {excerpt(encoder.prompt_text(prompt))}, "
                f"response {excerpt(encoder.decode(completion.token_ids))}: the score is {scores[row].item()}, which "
                "is not a finite number.",
                mend="Train the reward model again with a lower rm.trainer.learning_rate, or use another one.",
            )
