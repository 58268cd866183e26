"""One policy on held-out prompts: sampled responses, their measures, and the change to another."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import UserError
from pipeline.evaluation.judges import JudgeFunction
from pipeline.evaluation.measures import (
    Estimate,
    LengthStats,
    bootstrap_interval,
    distinct_n,
    length_stats,
    paired_bootstrap,
    repetition,
)
from pipeline.records import Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.tokens import EncodedPrompt, Encoder
    from rollout.batch import Completion
    from rollout.engine import RolloutEngine

T = TypeVar("T")

SCORE = "score"
"""Name of the reward's score in `PolicyReport.per_prompt`, beside the judges."""


@dataclass(frozen=True, slots=True)
class SampledResponses:
    """Responses of one policy: `completions[i]` are the samples of `prompts[i]`, equally many."""

    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    completions: list[list[Completion]]

    @property
    def flat(self) -> list[tuple[Prompt, list[int], Completion]]:
        """Every sample with its prompt and the prompt's tokens, prompt by prompt."""
        return [
            (prompt, ids, completion)
            for prompt, ids, samples in zip(self.prompts, self.prompt_ids, self.completions, strict=True)
            for completion in samples
        ]


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """What one policy does on held-out prompts; means over prompts with 95% bootstrap intervals."""

    prompts: int
    samples_per_prompt: int
    prompts_sha256: str
    """Hash of the prompts in order: two reports are comparable only when it is equal."""
    judges: dict[str, Estimate]
    score: Estimate | None
    """Score as PPO's reward sources give it, before clip and penalties; None where none was given."""
    kl_per_sequence: Estimate | None
    """Nats to the reference, mean over sequences of sum_t(logprob - ref_logprob) (k1)."""
    kl_per_token: float | None
    """The same sum over all sequences, over all response tokens."""
    length: LengthStats
    eos_rate: float
    """Share of responses that ended with EOS within the token limit."""
    empty_rate: float
    """Share of responses whose text is empty or blank."""
    distinct_1: float
    distinct_2: float
    repetition: float
    per_prompt: dict[str, list[float]]
    """Per judge, and `score`: mean over the samples of each prompt, for paired differences."""
    rows: list[dict[str, Any]] = field(default_factory=list, compare=False)
    """One row per sample for samples.jsonl; not part of `as_dict`."""

    def as_dict(self) -> dict[str, Any]:
        """The report without `rows`, JSON-able: an interval that does not exist is null."""
        return {
            "prompts": self.prompts,
            "samples_per_prompt": self.samples_per_prompt,
            "prompts_sha256": self.prompts_sha256,
            "judges": {name: _estimate_dict(value) for name, value in self.judges.items()},
            "score": _estimate_dict(self.score),
            "kl_per_sequence": _estimate_dict(self.kl_per_sequence),
            "kl_per_token": self.kl_per_token,
            "length": asdict(self.length),
            "eos_rate": self.eos_rate,
            "empty_rate": self.empty_rate,
            "distinct_1": self.distinct_1,
            "distinct_2": self.distinct_2,
            "repetition": self.repetition,
            "per_prompt": {name: list(values) for name, values in self.per_prompt.items()},
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> PolicyReport:
        """The report that `as_dict` saved, with its rows when `rows` was saved beside."""
        estimates = {name: _estimate(saved[name]) for name in ("score", "kl_per_sequence")}
        judges = {name: Estimate(**_ends(value)) for name, value in saved["judges"].items()}
        length = LengthStats(**saved["length"])
        return cls(**{**saved, **estimates, "judges": judges, "length": length})


def sample_seed(seed: int, prompt_index: int, sample_index: int) -> int:
    """Return the sampling seed of one response, in [0, 2^31), from the run's seed and its place."""
    digest = hashlib.sha256(f"{seed}:{prompt_index}:{sample_index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def sample_responses(
    engine: RolloutEngine,
    encoded_prompts: Sequence[EncodedPrompt],
    *,
    max_new_tokens: int,
    temperature: float,
    samples_per_prompt: int,
    seed: int,
) -> SampledResponses:
    """Sample every prompt `samples_per_prompt` times.

    The seed of a response depends on `seed`, its prompt's place and its sample's number alone, so
    every policy is sampled with the same seeds.
    """
    from rollout.engine import SamplingOptions

    places = [(index, sample) for index in range(len(encoded_prompts)) for sample in range(samples_per_prompt)]
    completions = engine.generate(
        [encoded_prompts[index].ids for index, _ in places],
        SamplingOptions(max_new_tokens=max_new_tokens, temperature=temperature),
        seeds=[sample_seed(seed, index, sample) for index, sample in places],
    )
    return SampledResponses(
        prompts=[encoded.prompt for encoded in encoded_prompts],
        prompt_ids=[encoded.ids for encoded in encoded_prompts],
        completions=_grouped(completions, samples_per_prompt),
    )


def measure(
    samples: SampledResponses,
    encoder: Encoder,
    judges: Mapping[str, JudgeFunction],
    *,
    scores: Tensor | None,
    kl_per_sequence: Tensor | None,
    seed: int,
) -> PolicyReport:
    """Measure a policy's samples.

    `scores` and `kl_per_sequence` are [prompts * samples], prompt by prompt: the reward
    sources' weighted sums and sum_t(logprob - ref_logprob) in nats. `seed` fixes the bootstrap. Raises ValueError
    for another shape or unequal sample counts, UserError for a judge that fails.
    """
    per_prompt_count = _sample_count(samples)
    flat = samples.flat
    tokens = [list(completion.token_ids) for _, _, completion in flat]
    prompt_texts = [encoder.prompt_text(prompt) for prompt, _, _ in flat]
    texts = [encoder.decode(ids) for ids in tokens]
    columns: dict[str, list[float]] = {}
    for name, judge in judges.items():
        if name == SCORE:
            raise UserError(f"eval.judges.{SCORE}: this name is the reward model's.", mend="Rename the judge.")
        columns[name] = judge(prompt_texts, texts)
    score_values = _listed("scores", scores, len(flat))
    kl_values = _listed("kl_per_sequence", kl_per_sequence, len(flat))
    grouped = {name: _grouped(values, per_prompt_count) for name, values in columns.items()}
    if score_values is not None:
        grouped[SCORE] = _grouped(score_values, per_prompt_count)
    estimates = {name: bootstrap_interval(values, seed) for name, values in grouped.items()}
    lengths = [len(ids) for ids in tokens]
    return PolicyReport(
        prompts=len(samples.prompts),
        samples_per_prompt=per_prompt_count,
        prompts_sha256=prompts_sha256(samples.prompts),
        judges={name: estimates[name] for name in columns},
        score=estimates.get(SCORE),
        kl_per_sequence=None if kl_values is None else bootstrap_interval(_grouped(kl_values, per_prompt_count), seed),
        kl_per_token=None if kl_values is None else math.fsum(kl_values) / max(1, sum(lengths)),
        length=length_stats(lengths),
        eos_rate=_share(completion.finished for _, _, completion in flat),
        empty_rate=_share(not text.strip() for text in texts),
        distinct_1=distinct_n(tokens, 1),
        distinct_2=distinct_n(tokens, 2),
        repetition=repetition(tokens),
        per_prompt={name: [math.fsum(values) / len(values) for values in rows] for name, rows in grouped.items()},
        rows=_rows(flat, prompt_texts, texts, _extra_columns(columns, score_values, kl_values)),
    )


def compare_reports(before: PolicyReport, after: PolicyReport, seed: int = 0) -> dict[str, Any]:
    """Return after - before per judge and score as {name: {mean, low, high}}, paired by prompt.

    Raises ValueError when the reports are not of the same prompts.
    """
    if before.prompts_sha256 != after.prompts_sha256:
        raise ValueError("the two reports are of different prompts; sample both on the same ones")
    shared = [name for name in before.per_prompt if name in after.per_prompt]
    return {name: _estimate_dict(_difference(before, after, name, seed)) for name in shared}


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """Return the hash of the prompts' contents in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(hashlib.sha256(prompt.key.encode()).digest())
    return digest.hexdigest()


def _difference(before: PolicyReport, after: PolicyReport, name: str, seed: int) -> Estimate:
    return paired_bootstrap(
        [[value] for value in before.per_prompt[name]],
        [[value] for value in after.per_prompt[name]],
        seed,
    )


def _sample_count(samples: SampledResponses) -> int:
    counts = {len(completions) for completions in samples.completions}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"every prompt needs the same number of samples, not {sorted(counts)}")
    return counts.pop()


def _grouped(values: Sequence[T], size: int) -> list[list[T]]:
    return [list(values[start : start + size]) for start in range(0, len(values), size)]


def _share(flags: Iterable[bool]) -> float:
    listed = [bool(flag) for flag in flags]
    return sum(listed) / len(listed)


def _listed(name: str, values: Tensor | None, count: int) -> list[float] | None:
    if values is None:
        return None
    if tuple(values.shape) != (count,):
        raise ValueError(f"{name} has shape {tuple(values.shape)} for {count} responses")
    return [float(value) for value in values.tolist()]


def _extra_columns(
    judges: Mapping[str, list[float]], scores: list[float] | None, kl: list[float] | None
) -> dict[str, list[float]]:
    columns = dict(judges)
    if scores is not None:
        columns[SCORE] = scores
    if kl is not None:
        columns["kl"] = kl
    return columns


def _rows(
    flat: Sequence[tuple[Prompt, list[int], Completion]],
    prompt_texts: Sequence[str],
    texts: Sequence[str],
    columns: Mapping[str, list[float]],
) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt_texts[row],
            "response": texts[row],
            "finished": bool(completion.finished),
            "tokens": len(completion.token_ids),
            **{name: values[row] for name, values in columns.items()},
        }
        for row, (_, _, completion) in enumerate(flat)
    ]


def _estimate_dict(estimate: Estimate | None) -> dict[str, float | None] | None:
    if estimate is None:
        return None
    return {name: value if math.isfinite(value) else None for name, value in estimate._asdict().items()}


def _ends(saved: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in saved.items()}


def _estimate(saved: Mapping[str, float | None] | None) -> Estimate | None:
    return None if saved is None else Estimate(**_ends(saved))
