"""One policy's report against hand computation, and the pairing of two reports."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.evaluation.policy_eval import (
    PolicyReport,
    SampledResponses,
    compare_reports,
    measure,
    sample_responses,
    sample_seed,
)
from pipeline.recipe import ModelSection
from pipeline.records import Prompt
from pipeline.tokens import EncodedPrompt, Encoder, load_tokenizer
from rollout.batch import Completion


@pytest.fixture
def encoder(tiny_tokenizer_dir: Path) -> Encoder:
    tokenizer = load_tokenizer(tiny_tokenizer_dir, ModelSection(name_or_path=str(tiny_tokenizer_dir)))
    return Encoder(tokenizer, 32, 32)


def _completion(encoder: Encoder, text: str, *, finished: bool = True) -> Completion:
    ids, _ = encoder.response_ids(text)
    kept = tuple(ids if finished else ids[:-1])
    return Completion(kept, (-0.5,) * len(kept), finished)


def _samples(encoder: Encoder, texts: list[list[str]], *, unfinished: int = 0) -> SampledResponses:
    prompts = [Prompt(f"prompt {index}") for index in range(len(texts))]
    completions = [[_completion(encoder, text) for text in row] for row in texts]
    if unfinished:
        completions[-1][-1] = _completion(encoder, texts[-1][-1], finished=False)
    return SampledResponses(prompts, [encoder.prompt_ids(prompt) for prompt in prompts], completions)


def _characters(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def test_report_by_hand(encoder: Encoder) -> None:
    samples = _samples(encoder, [["abcd", "ab"], ["", "xyzxyz"]], unfinished=1)
    report = measure(
        samples,
        encoder,
        {"characters": _characters},
        scores=torch.tensor([1.0, 3.0, -2.0, 0.0]),
        kl_per_sequence=torch.tensor([0.5, 1.5, 0.0, 2.0]),
        seed=1,
    )
    lengths = [len(completion.token_ids) for _, _, completion in samples.flat]
    assert report.judges["characters"].mean == 3.0
    assert report.per_prompt == {"characters": [3.0, 3.0], "score": [2.0, -1.0]}
    assert report.score is not None
    assert report.score.mean == 0.5
    assert report.kl_per_sequence is not None
    assert report.kl_per_sequence.mean == 1.0
    assert report.kl_per_token == pytest.approx(4.0 / sum(lengths))
    assert report.length.mean == sum(lengths) / 4
    assert (report.eos_rate, report.empty_rate) == (0.75, 0.25)
    assert (report.prompts, report.samples_per_prompt) == (2, 2)
    assert [row["response"] for row in report.rows] == ["abcd", "ab", "", "xyzxyz"]
    assert [row["prompt"] for row in report.rows] == ["prompt 0"] * 2 + ["prompt 1"] * 2
    assert report.rows[3] == {
        "prompt": "prompt 1",
        "response": "xyzxyz",
        "finished": False,
        "tokens": lengths[3],
        "characters": 6.0,
        "score": 0.0,
        "kl": 2.0,
    }


def test_diversity_is_of_the_sampled_tokens(encoder: Encoder) -> None:
    # Bigrams 5-6 6-5 5-6 6-5 | 5-6: 2 of 5 differ; trigrams 565 656 565: a third repeats in one of two responses.
    rows = [[Completion(ids, (-1.0,) * len(ids), True)] for ids in ((5, 6, 5, 6, 5), (5, 6))]
    prompts = [Prompt("a"), Prompt("b")]
    report = measure(
        SampledResponses(prompts, [[1], [1]], rows), encoder, {}, scores=None, kl_per_sequence=None, seed=0
    )
    assert report.distinct_1 == pytest.approx(2 / 7)
    assert report.distinct_2 == pytest.approx(2 / 5)
    assert report.repetition == pytest.approx(1 / 6)


def test_interval_resamples_prompts(encoder: Encoder) -> None:
    # Samples differ within prompts only: the prompt means are equal, so the interval has no width.
    report = measure(
        _samples(encoder, [["a", "abc"], ["abc", "a"]]),
        encoder,
        {"characters": _characters},
        scores=None,
        kl_per_sequence=None,
        seed=0,
    )
    assert report.judges["characters"] == (2.0, 2.0, 2.0)
    assert report.score is None
    assert report.kl_per_sequence is None
    assert report.kl_per_token is None


def test_report_survives_json(encoder: Encoder) -> None:
    one_prompt = measure(
        _samples(encoder, [["good film"]]),
        encoder,
        {"characters": _characters},
        scores=torch.tensor([1.0]),
        kl_per_sequence=None,
        seed=0,
    )
    saved = json.loads(json.dumps(one_prompt.as_dict(), allow_nan=False))
    assert saved["judges"]["characters"] == {"mean": 9.0, "low": None, "high": None}
    again = PolicyReport.from_dict(saved)
    assert again.as_dict() == one_prompt.as_dict()
    assert math.isnan(again.judges["characters"].low)


def test_difference_is_after_minus_before(encoder: Encoder) -> None:
    def report(texts: list[list[str]]) -> PolicyReport:
        return measure(_samples(encoder, texts), encoder, {"c": _characters}, scores=None, kl_per_sequence=None, seed=0)

    difference = compare_reports(report([["a"], ["ab"]]), report([["abc"], ["abcd"]]))
    assert difference == {"c": {"mean": 2.0, "low": 2.0, "high": 2.0}}


def test_reports_of_other_prompts_are_not_compared(encoder: Encoder) -> None:
    def report(texts: list[list[str]]) -> PolicyReport:
        return measure(_samples(encoder, texts), encoder, {}, scores=None, kl_per_sequence=None, seed=0)

    with pytest.raises(ValueError, match="different prompts"):
        compare_reports(report([["a"], ["b"]]), report([["a"]]))


@pytest.mark.parametrize("shape", [(3,), (4, 1)])
def test_scores_of_another_shape_are_refused(encoder: Encoder, shape: tuple[int, ...]) -> None:
    samples = _samples(encoder, [["a", "b"], ["c", "d"]])
    with pytest.raises(ValueError, match="scores has shape"):
        measure(samples, encoder, {}, scores=torch.zeros(shape), kl_per_sequence=None, seed=0)


def test_a_judge_may_not_take_the_reward_models_name(encoder: Encoder) -> None:
    with pytest.raises(UserError, match="reward model's"):
        measure(_samples(encoder, [["a"]]), encoder, {"score": _characters}, scores=None, kl_per_sequence=None, seed=0)


def test_unequal_sample_counts_are_refused(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="same number of samples"):
        measure(_samples(encoder, [["a", "b"], ["c"]]), encoder, {}, scores=None, kl_per_sequence=None, seed=0)


def test_seeds_are_distinct_and_fixed() -> None:
    seeds = {sample_seed(0, prompt, sample) for prompt in range(100) for sample in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sample_seed(0, 1, 2) != sample_seed(1, 1, 2)
    # printf '0:1:2' | sha256sum -> 75589dee...
    assert sample_seed(0, 1, 2) == int("75589dee", 16) >> 1


def test_sampling_depends_on_the_policy_and_the_seed_alone(encoder: Encoder, tiny_policy_dir: Path) -> None:
    from rollout.engine import EngineOptions, make_engine

    options = EngineOptions(max_model_len=64, max_sequences=8, stop_token_ids=encoder.stop_token_ids)
    engine = make_engine("transformers", tiny_policy_dir, options)
    prompts = [EncodedPrompt(Prompt(text), encoder.prompt_ids(Prompt(text))) for text in ("this film", "the")]

    def sample(chosen: list[EncodedPrompt], count: int, seed: int) -> list[list[tuple[int, ...]]]:
        sampled = sample_responses(
            engine, chosen, max_new_tokens=6, temperature=1.0, samples_per_prompt=count, seed=seed
        )
        assert [len(row) for row in sampled.completions] == [count] * len(chosen)
        return [[completion.token_ids for completion in row] for row in sampled.completions]

    both = sample(prompts, 3, seed=1)
    assert sample(prompts, 3, seed=1) == both
    assert [row[:2] for row in both] == sample(prompts, 2, seed=1)
    assert sample(prompts[:1], 3, seed=1) == both[:1]
    assert sample(prompts, 3, seed=2) != both
    assert len({*both[0], *both[1]}) > 2
    engine.close()
