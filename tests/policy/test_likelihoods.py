"""Likelihoods against sums over each text by itself, perplexity against the SFT stage's own validation loss."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.data import load_sft
from pipeline.evaluation.policy_eval import SampledResponses
from pipeline.load import load_recipe
from pipeline.recipe import DataSection, ModelSection
from pipeline.records import Prompt, Ranking
from pipeline.stage import Stage
from pipeline.tokens import PROMPT_SLOT, EncodedExample, Encoder, encode_sft, load_tokenizer, set_prompt_form
from policy.likelihoods import Reader, held_out_likelihoods, likelihoods, sample_sums, sft_perplexity
from policy.models import load_policy
from policy.sft import run as run_sft
from rollout.batch import Completion
from tests.tiny_stage import prepare_stage, save_tiny_policy
from tests.workplace import make_workplace


def save_moved(source: Path, target: Path) -> None:
    """The model with noise on its weights, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def reader_of(path: Path, form: str = PROMPT_SLOT) -> Reader:
    tokenizer = load_tokenizer(path, ModelSection(name_or_path=str(path)))
    set_prompt_form(tokenizer, form)
    return Reader(load_policy(path, "float32").eval(), Encoder(tokenizer, 64, 64))


def test_likelihoods_are_those_of_each_answer_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_workplace(tmp_path / "work")
    monkeypatch.chdir(place.path)
    save_moved(Path("model"), Path("policy"))
    tokenizer = AutoTokenizer.from_pretrained("model")
    held_out = [{"prompt": f"row {n}", "split": "eval" if n else "train", **answers(n)} for n in range(9)]
    (place.path / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    got = likelihoods(load_recipe("recipe.yaml", ["--data.max_response_tokens", "64"]), Path("policy"), Path("model"))

    models = [AutoModelForCausalLM.from_pretrained(name) for name in ("policy", "model")]
    means, lengths, ordered = [], [], []
    for row in held_out[1:]:
        found = [log_probs(models, tokenizer, row["prompt"], answer) for answer in row["responses"]]
        means += [policy / tokens for policy, _, tokens in found]
        lengths += [tokens for *_, tokens in found]
        for a, b in combinations(range(len(found)), 2):
            if row["ranks"][a] == row["ranks"][b]:
                continue
            (p, q, n), (r, s, m) = (found[a], found[b]) if row["ranks"][a] < row["ranks"][b] else (found[b], found[a])
            ordered.append((p / n > r / m, p - q > r - s))
    by_mean, by_reward = np.array(ordered).T
    assert got.spearman == pytest.approx(np.corrcoef(shared_ranks(means), shared_ranks(lengths))[0, 1], abs=1e-6)
    assert got.ranking_accuracy == pytest.approx(by_mean.mean())
    assert got.reward_accuracy == pytest.approx(by_reward.mean())
    assert got.agreement == pytest.approx((by_mean == by_reward).mean())
    assert by_mean.mean() != by_reward.mean()
    assert got.pairs == len(ordered)


def shared_ranks(values: list[float]) -> list[float]:
    """Equal values share the mean of their ranks."""
    return [sum(other < own for other in values) + sum(other == own for other in values) / 2 for own in values]


def answers(n: int) -> dict[str, list[object]]:
    words = ["good", "bad", "film", "plot", "actor", "slow", "great"]
    texts = [" " + " ".join(words[(n * k + j) % 7] for j in range(count)) for k, count in ((1, 1), (2, 3), (3, 5))]
    return {"responses": list(texts), "ranks": [n % 3, 1, 1]}


def log_probs(models: list[Any], tokenizer: Any, prompt: str, answer: str) -> tuple[float, ...]:
    """sum log p of the answer and its EOS under each model, nats, and its tokens."""
    asked = [1, *tokenizer(prompt, add_special_tokens=False).input_ids]
    given = [*tokenizer(answer, add_special_tokens=False).input_ids, 2]
    sums = []
    for model in models:
        logits = model(torch.tensor([asked + given])).logits[0].log_softmax(-1)
        sums.append(sum(logits[len(asked) + t - 1, token].item() for t, token in enumerate(given)))
    return *sums, len(given)


def test_each_model_reads_the_prompt_in_its_own_form(tmp_path: Path) -> None:
    """The policy asks `Q: ... A:`; the same answers behind the start's plain prompt give the implicit reward."""
    start = save_tiny_policy(tmp_path / "start")
    save_moved(start, tmp_path / "policy")
    rankings = [Ranking(Prompt(f"film {n}"), (f" plot {n}", " dull", " old jokes"), (0.0, 1.0, 2.0)) for n in range(5)]
    form = "Q: {prompt} A:"
    policy, reference = reader_of(tmp_path / "policy", form), reader_of(start)
    got = held_out_likelihoods(rankings, DataSection(max_prompt_tokens=64, max_response_tokens=64), policy, reference)
    assert got is not None
    assert got.pairs == 5 * 3
    by_mean, by_reward = [], []
    for ranking in rankings:
        asked = [form.replace("{prompt}", str(ranking.prompt.content)), str(ranking.prompt.content)]
        found = []
        for answer in ranking.responses:
            sums = [
                log_probs([reader.model], reader.encoder.tokenizer, text, answer)
                for reader, text in zip((policy, reference), asked, strict=True)
            ]
            found.append((sums[0][0] / sums[0][-1], sums[0][0] - sums[1][0]))
        for better, worse in combinations(found, 2):
            by_mean.append(better[0] > worse[0])
            by_reward.append(better[1] > worse[1])
    assert got.ranking_accuracy == pytest.approx(np.mean(by_mean))
    assert got.reward_accuracy == pytest.approx(np.mean(by_reward))
    assert 0.0 < np.mean(by_reward) < 1.0
    tied = [Ranking(Prompt("film"), (" plot", " dull"), (0.0, 0.0))]
    assert held_out_likelihoods(tied, DataSection(), policy, reference) is None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sums_and_entropies_of_samples_are_those_of_the_full_softmax(tmp_path: Path, temperature: float) -> None:
    """Unequal prompts and answers, an empty one among them, against logits of every answer by itself."""
    reader = reader_of(save_tiny_policy(tmp_path / "policy"))
    answers = [[(5, 9, 2), (7,)], [(), (11, 12, 13, 14, 15)]]
    asked = [[1, 20, 21, 22], [1, 30]]
    drawn = [[Completion(ids, (0.0,) * len(ids), True) for ids in each] for each in answers]
    samples = SampledResponses([Prompt("a"), Prompt("b")], [[1], [1]], drawn)
    got = sample_sums(reader.model, samples, asked, 0, temperature, with_entropy=True)
    for place, (prompt, answer) in enumerate((p, a) for p, each in zip(asked, answers, strict=True) for a in each):
        logits = reader.model(torch.tensor([[*prompt, *answer]])).logits[0].double() / temperature
        logp = logits.log_softmax(-1)[len(prompt) - 1 : len(prompt) - 1 + len(answer)]
        picked = sum(logp[t, token].item() for t, token in enumerate(answer))
        assert got.logprobs[place].item() == pytest.approx(picked, abs=1e-5)
        assert got.entropy[place].item() == pytest.approx(-(logp.exp() * logp).sum().item(), abs=1e-5)
    assert math.isnan(sample_sums(reader.model, samples, asked, 0, 1.0).entropy[0].item())


def test_perplexity_counts_the_response_and_of_a_text_all_that_follows_something(tmp_path: Path) -> None:
    """A demonstration behind 2 prompt tokens, a text without BOS, and one token that nothing stands before."""
    reader = reader_of(save_tiny_policy(tmp_path / "policy"))
    ids = [[1, 20, 21, 2], [30, 31, 2], [40]]
    examples = [EncodedExample(ids[0], 2), EncodedExample(ids[1], 0), EncodedExample(ids[2], 0)]
    total = 0.0
    for row, first in ((ids[0], 2), (ids[1], 1)):
        logp = reader.model(torch.tensor([row])).logits[0].log_softmax(-1)
        total += sum(logp[t - 1, row[t]].item() for t in range(first, len(row)))
    assert sft_perplexity(examples, reader) == pytest.approx(math.exp(-total / 4), rel=1e-5)
    assert sft_perplexity(examples[2:], reader) is None


def test_perplexity_of_the_sft_policy_is_its_own_validation_loss(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    data = {"sft": str(place.path / "sft.jsonl"), "eval_fraction": 0.25}
    data |= {"max_prompt_tokens": 24, "max_response_tokens": 40}
    trainer = {"learning_rate": 1e-3, "max_steps": 3, "per_device_eval_batch_size": 5}
    recipe = {"name": "tiny", "model": {"name_or_path": "model"}, "data": data, "sft": {"trainer": trainer}}
    stage = Stage(prepare_stage(place.run / "sft.partial", recipe, "sft", {"model": place.path / "model"}))
    metrics = run_sft(stage)
    section = stage.recipe.data
    tokenizer = load_tokenizer(stage.out, stage.recipe.model)
    reader = Reader(load_policy(stage.out, "float32").eval(), Encoder(tokenizer, 24, 40))
    examples, _ = encode_sft(load_sft(section).eval, reader.encoder, section)
    got = sft_perplexity(examples, reader)
    assert got is not None
    assert math.log(got) == pytest.approx(metrics["validation_loss"], abs=1e-5)
