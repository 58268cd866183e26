"""STAGE evaluate: what a policy does on held-out prompts: judges, score, KL, diversity, likelihoods, perplexity.

`python -m policy.evaluate runs/<name>/evaluate.partial`

Every policy is asked the same prompts with the same seeds, and read in float32. Log-probabilities and entropies of its
samples are at `rollout.temperature`, at which they were drawn; those of given answers and demonstrations at 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.artifacts import identity, write_json
from pipeline.data import has_labels, load_prompts
from pipeline.errors import UserError
from pipeline.evaluation.judges import load_judges
from pipeline.evaluation.measures import Estimate, self_bleu
from pipeline.evaluation.policy_eval import PolicyReport, SampledResponses, measure, sample_responses
from pipeline.evaluation.shared import shared_judges
from pipeline.leaks import refuse_leaks
from pipeline.preferences import load_demonstrations, load_preferences
from pipeline.records import Ranking
from pipeline.stage import Stage
from pipeline.stage_main import stage_main
from pipeline.tokens import Encoder, encode_prompts, encode_sft, load_tokenizer, tokenizer_sha256
from pipeline.tracking import SAMPLES
from pipeline.trainer_ranks import is_sharded_run, place_frozen
from policy.likelihoods import Reader, held_out_likelihoods, sample_sums, sft_perplexity
from policy.models import check_projection, disable_dropout, load_policy
from policy.ppo.held_out import report_metrics, reward_scores
from policy.ppo.rewards import load_rewards
from policy.preference_eval import Asked
from rollout.open import open_engine

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Read:
    """What the loaded policy and reference say.

    Attributes:
        kl [prompts * samples]: sum_t(log p - log p_ref) of each response, nats (k1).
        entropy: mean over all response tokens of the entropy of the policy's distribution, nats.
        likelihoods: `Likelihoods` of the held-out rankings, without the implicit reward's where the policy is the
            reference; None where `data.preferences` holds no ranked pair.
        sft_perplexity: on the held-out demonstrations, or the best held-out answers; None where there are none.
    """

    kl: Tensor
    entropy: float
    likelihoods: dict[str, float | None] | None
    sft_perplexity: float | None


def run(stage: Stage) -> dict[str, Any]:
    """Measures the policy into evaluation.json and samples.jsonl; returns the figures for the manifest."""
    for line in refuse_leaks(stage.recipe.data):
        stage.say(line)
    judges = shared_judges(load_judges(stage.recipe.eval), stage.ranks)
    own, start = ask(stage)
    samples = draw(stage, own)
    read = read_back(stage, samples, own, start)
    scores = score(stage, samples, start)
    report = measure(samples, own.encoder, judges, scores=scores, kl_per_sequence=read.kl, seed=stage.recipe.seed)
    texts = [row["response"] for row in report.rows]
    evaluation = {
        "report": report.as_dict(),
        "entropy": read.entropy,
        "self_bleu": self_bleu(texts) if len(texts) > 1 else None,
        "truncation_rate": 1.0 - report.eos_rate,
        "likelihoods": read.likelihoods,
        "sft_perplexity": read.sft_perplexity,
    }
    evaluation = _finite(evaluation)
    if stage.ranks.is_main:
        write_json(stage.out / EVALUATION, evaluation)
        with (stage.out / SAMPLES).open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(_finite(row), ensure_ascii=False) + "\n" for row in sample_rows(report))
    for line in summary_lines(stage, report, evaluation):
        stage.say(line)
    return figures(report, evaluation)


def ask(stage: Stage) -> tuple[Asked, Asked]:
    """The held-out prompts as the policy and as the reference read them, which differ under contrast SFT.

    Errors:
        UserError: the two have different tokenizers, or not the same prompts fit both.
    """
    recipe, data = stage.recipe, stage.recipe.data
    split = load_prompts(data)
    for line in split.lines():
        stage.say(line)
    asked, lengths, tokenizers = [], {}, []
    for role in ("policy", "reference"):
        tokenizer = load_tokenizer(stage.inputs[role].path, recipe.model)
        encoder = Encoder(tokenizer, data.max_prompt_tokens, data.max_response_tokens)
        encoded, report = encode_prompts(split.eval, encoder, data)
        asked.append(Asked(encoder, encoded[: recipe.eval.prompts]))
        lengths[role] = report.as_dict()
        tokenizers.append(tokenizer)
    own, start = asked
    stage.record_tokenizer(own.encoder.tokenizer)
    stage.record(data={"prompts": split.report}, lengths=lengths)
    if tokenizer_sha256(tokenizers[0]) != tokenizer_sha256(tokenizers[1]):
        raise UserError(
            f"evaluate.reference: {stage.inputs['reference'].path} has another tokenizer than the policy "
            f"{stage.inputs['policy'].path}, so there is no KL between them.",
            mend="Evaluate policies that the reference's training goes on from.",
        )
    if not own.prompts or [each.prompt for each in own.prompts] != [each.prompt for each in start.prompts]:
        raise UserError(
            "data.prompts: no held-out prompt is left, or not the same ones in the policy's form and in the "
            f"reference's, within data.max_prompt_tokens ({data.max_prompt_tokens}).",
            mend="Raise data.max_prompt_tokens.",
        )
    return own, start


def draw(stage: Stage, own: Asked) -> SampledResponses:
    """`eval.samples_per_prompt` responses to every prompt."""
    recipe = stage.recipe
    with closing(open_engine(recipe, stage.inputs["policy"].path, stage.say, ranks=stage.ranks)) as engine:
        samples = sample_responses(
            engine,
            own.prompts,
            max_new_tokens=recipe.data.max_response_tokens,
            temperature=recipe.rollout.temperature,
            samples_per_prompt=recipe.eval.samples_per_prompt,
            seed=recipe.seed,
        )
    stage.record(engine={"name": engine.name, "version": engine.version})
    return samples


def read_back(stage: Stage, samples: SampledResponses, own: Asked, start: Asked) -> Read:
    """Loads policy and reference and has them read the samples, the held-out answers and the demonstrations."""
    recipe, ranks, sharded = stage.recipe, stage.ranks, is_sharded_run(stage)
    policy, reference = (
        Reader(place_frozen(stage, partial(_load, stage.inputs[role].path), sharded=sharded), asked.encoder, ranks)
        for role, asked in (("policy", own), ("reference", start))
    )
    temperature, pad_id = recipe.rollout.temperature, own.encoder.pad_token_id
    ids = [prompt.ids for prompt in own.prompts], [prompt.ids for prompt in start.prompts]
    sums = sample_sums(policy.model, samples, ids[0], pad_id, temperature, with_entropy=True, ranks=ranks)
    base = sample_sums(reference.model, samples, ids[1], pad_id, temperature, ranks=ranks)
    tokens = sum(len(completion.token_ids) for _, _, completion in samples.flat)
    return Read(
        kl=sums.logprobs - base.logprobs,
        entropy=float(sums.entropy.sum()) / max(1, tokens),
        likelihoods=_likelihoods(stage, policy, reference),
        sft_perplexity=_perplexity(stage, policy),
    )


def score(stage: Stage, samples: SampledResponses, start: Asked) -> Tensor | None:
    """PPO's score of every response [prompts * samples], before clip and penalties; None without a reward model.

    It is read behind the prompt in the reference's form, which is the one that reward models are trained in.

    Errors:
        UserError: see `load_rewards` and `Rewards.scores`.
    """
    if not stage.recipe.with_score:
        return None
    device = stage.ranks.device
    bf16 = stage.recipe.model.dtype == "bfloat16"
    autocast = partial(torch.autocast, device.type, torch.bfloat16) if bf16 else nullcontext
    loaded = load_rewards(stage, start.encoder, start.prompts, device, autocast)
    as_read = replace(samples, prompt_ids=[prompt.ids for prompt in start.prompts])
    return reward_scores(loaded, as_read, start.encoder, device)


def sample_rows(report: PolicyReport) -> list[dict[str, Any]]:
    """The report's rows with their places: prompt by prompt, every sample of it."""
    count = report.samples_per_prompt
    return [{"prompt_index": place // count, "sample": place % count, **row} for place, row in enumerate(report.rows)]


def figures(report: PolicyReport, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's metrics, under the names of every stage's held-out figures; what there is not is left out."""
    likelihoods = evaluation["likelihoods"] or {}
    found = {
        **report_metrics(report),
        "eval/kl_per_token": report.kl_per_token,
        **{f"eval/{key}": evaluation[key] for key in ("entropy", "self_bleu", "truncation_rate", "sft_perplexity")},
        **{f"eval/likelihood/{key}": value for key, value in likelihoods.items()},
        "responses": len(report.rows),
        "tokens": sum(row["tokens"] for row in report.rows),
    }
    return {key: value for key, value in found.items() if value is not None}


def summary_lines(stage: Stage, report: PolicyReport, evaluation: Mapping[str, Any]) -> list[str]:
    """The figures in a few lines for people."""
    inputs, likelihoods = stage.inputs, evaluation["likelihoods"]
    judged = {**report.judges, **({} if report.score is None else {"score": report.score})}
    lines = [
        f"{inputs['policy'].path}: {report.prompts} held-out prompts x {report.samples_per_prompt} samples",
        *(f"  {name}: {_shown(estimate)}" for name, estimate in judged.items()),
    ]
    if report.kl_per_sequence is not None:
        lines.append(
            f"  KL to {inputs['reference'].path}: {_shown(report.kl_per_sequence)} nats per response, "
            f"{report.kl_per_token:.3f} per token; entropy {evaluation['entropy']:.3f} nats per token"
        )
    lines.append(
        f"  tokens {report.length.mean:.1f} (median {report.length.median:g}, 95th percentile {report.length.p95:g}), "
        f"cut off {evaluation['truncation_rate']:.1%}, distinct-2 {report.distinct_2:.3f}, "
        f"self-BLEU {_number(evaluation['self_bleu'])}"
    )
    if likelihoods is not None:
        by_likelihood, by_reward, alike = (
            _number(likelihoods[key]) for key in ("ranking_accuracy", "reward_accuracy", "agreement")
        )
        lines.append(
            f"  {likelihoods['pairs']} held-out pairs: ordered by likelihood {by_likelihood}, by implicit reward "
            f"{by_reward}, alike {alike}"
        )
    lines.append(f"  perplexity of the demonstrations: {_number(evaluation['sft_perplexity'])}")
    return lines


def _load(path: str, device: torch.device) -> PreTrainedModel:
    model = load_policy(path, "float32", device)
    check_projection(model, path)
    disable_dropout(model)
    return model.eval()


def _likelihoods(stage: Stage, policy: Reader, reference: Reader) -> dict[str, float | None] | None:
    data = stage.recipe.data
    if data.preferences is None:
        return None
    split = load_preferences(data)
    if has_labels(split):
        return None
    rankings = [row for row in split.eval if isinstance(row, Ranking)]
    found = held_out_likelihoods(rankings, data, policy, reference)
    if found is None:
        return None
    same = identity(stage.inputs["policy"].path) == identity(stage.inputs["reference"].path)
    no_reward = {"reward_accuracy": None, "agreement": None} if same else {}
    return asdict(found) | no_reward


def _perplexity(stage: Stage, policy: Reader) -> float | None:
    data = stage.recipe.data
    if data.sft is None and data.preferences is None:
        return None
    examples, _ = encode_sft(load_demonstrations(data).eval, policy.encoder, data)
    return sft_perplexity(examples, policy)


def _shown(estimate: Estimate) -> str:
    interval = f" [{estimate.low:.3f}, {estimate.high:.3f}]" if math.isfinite(estimate.low) else ""
    return f"{estimate.mean:.3f}{interval}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _finite(value: Any) -> Any:
    """The same with null for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    stage_main("evaluate", run=run, saves=False)
