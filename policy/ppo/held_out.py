"""Evaluation of the current policy on held-out prompts: judges, score, KL to the reference, length, EOS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.evaluation.judges import JudgeFunction
from pipeline.evaluation.policy_eval import PolicyReport, SampledResponses, measure, sample_responses
from pipeline.functions import excerpt
from pipeline.recipe import Recipe
from pipeline.records import Prompt
from pipeline.tokens import EncodedPrompt, Encoder
from policy.ppo.experience import policy_logprobs, reference_logprobs
from policy.ppo.rewards import Rewards
from policy.ppo.roles import Roles
from rollout.batch import Completion, RolloutBatch
from rollout.engine import RolloutEngine

SLICE = 256
Sample = tuple[Prompt, list[int], Completion]


@dataclass(frozen=True)
class HeldOut:
    """What every evaluation of a run shares; the seeds are the same each time, so policies are paired."""

    prompts: Sequence[EncodedPrompt]
    encoder: Encoder
    judges: Mapping[str, JudgeFunction]
    recipe: Recipe

    def evaluate(self, roles: Roles, engine: RolloutEngine) -> PolicyReport | None:
        """Samples, scores and judges the engine's current policy; the report is rank 0's, the others get None.

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
        kl = _kl(roles, samples, self.encoder)
        scores = reward_scores(roles.rewards, samples, self.encoder, roles.device)
        if not roles.ranks.is_main:
            return None
        return measure(samples, self.encoder, self.judges, scores=scores, kl_per_sequence=kl, seed=recipe.seed)


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


def reward_scores(rewards: Rewards, samples: SampledResponses, encoder: Encoder, device: torch.device) -> Tensor:
    """Weighted sums of the reward sources [prompts * samples].

    Errors:
        UserError: a score that is not finite, or see `Rewards.scores`.
    """
    scores = []
    for part, batch in _slices(samples, encoder):
        total, each = rewards.scores(batch.to(device), [prompt for prompt, _, _ in part])
        _refuse_not_finite(each, part, encoder)
        scores.append(total.cpu())
    return torch.cat(scores)


def _kl(roles: Roles, samples: SampledResponses, encoder: Encoder) -> Tensor:
    """k1 KL sums to the reference [prompts * samples]."""
    kl = []
    for _, batch in _slices(samples, encoder):
        on_device = batch.to(roles.device)
        policy, _ = policy_logprobs(roles, roles.policy, on_device, with_entropy=False)
        kl.append((policy - reference_logprobs(roles, on_device)).sum(1).cpu())
    return torch.cat(kl)


def _slices(samples: SampledResponses, encoder: Encoder) -> Iterator[tuple[list[Sample], RolloutBatch]]:
    flat = samples.flat
    for start in range(0, len(flat), SLICE):
        part = flat[start : start + SLICE]
        prompts, completions = [ids for _, ids, _ in part], [completion for _, _, completion in part]
        yield part, RolloutBatch.from_completions(prompts, completions, encoder.pad_token_id)


def _refuse_not_finite(each: Mapping[str, Tensor], part: Sequence[Sample], encoder: Encoder) -> None:
    for name, scores in each.items():
        for row in (~scores.isfinite()).nonzero().flatten().tolist()[:1]:
            prompt, _, completion = part[row]
            raise UserError(
                f"ppo.rewards.{name}: {prompt.source}: held-out prompt {excerpt(encoder.prompt_text(prompt))}, "
                f"response {excerpt(encoder.decode(completion.token_ids))}: the score is {scores[row].item()}, which "
                "is not a finite number.",
                mend="Train the reward model again with a lower rm.trainer.learning_rate, or use another one.",
            )
