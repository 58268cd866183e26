"""How likely texts are under loaded policies: their own samples, ranked held-out answers and demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.data import load_rankings
from pipeline.equal_batches import turns
from pipeline.errors import UserError
from pipeline.evaluation.policy_eval import SampledResponses
from pipeline.ranks import ALONE, Ranks
from pipeline.recipe import DataSection, Recipe
from pipeline.records import Ranking
from pipeline.sharding import is_sharded
from pipeline.tokens import EncodedExample, EncodedRanking, Encoder, encode_rankings, load_tokenizer
from policy.answers import Group
from policy.models import load_policy, response_scores
from policy.ppo.slices import micro_batches
from policy.preference_data import REFERENCE_TOKENS, Row, reference_sums
from reward_model.data import ordered_pairs
from reward_model.evaluate import spearman
from rollout.batch import RolloutBatch


@dataclass(frozen=True)
class Reader:
    """A loaded policy and the encoder that puts prompts into its form; `ranks` share what it reads."""

    model: PreTrainedModel
    encoder: Encoder
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class Likelihoods:
    """Held-out answers under a policy and its start.

    Attributes:
        spearman: rank correlation of mean log-probability and length over all answers.
        ranking_accuracy: pairs whose better answer has the higher mean log-probability.
        reward_accuracy: pairs whose better answer has the higher sum of log(policy / start), DPO's implicit reward.
        agreement: pairs that both order alike.
        pairs: how many there are: two answers of different rank.
    """

    spearman: float
    ranking_accuracy: float
    reward_accuracy: float
    agreement: float
    pairs: int


class SampleSums(NamedTuple):
    """Sums over the tokens of each sample, float64 [prompts * samples] in nats: log p, and the entropy of its draw."""

    logprobs: Tensor
    entropy: Tensor


@torch.no_grad()
def sample_sums(
    model: PreTrainedModel,
    samples: SampledResponses,
    prompt_ids: Sequence[Sequence[int]],
    pad_id: int,
    temperature: float,
    *,
    with_entropy: bool = False,
    ranks: Ranks = ALONE,
) -> SampleSums:
    """`SampleSums` of the samples under `model` at `temperature`; its entropies are NaN unless they are asked for.

    `prompt_ids` are the samples' prompts as `model` reads them, which need not be how the sampled policy did. The
    entropy of a token's distribution is over the whole vocabulary: -sum_v p(v) log p(v). The ranks share the forwards,
    which are the same ones however many ranks there are; all get all sums.
    """
    prompts = [ids for ids, drawn in zip(prompt_ids, samples.completions, strict=True) for _ in drawn]
    batch = RolloutBatch.from_completions(prompts, [completion for _, _, completion in samples.flat], pad_id)
    logprobs, entropy = (torch.zeros(len(batch), dtype=torch.float64) for _ in range(2))
    parts = micro_batches(batch, REFERENCE_TOKENS)
    for number, counted in turns(len(parts), ranks, in_step=is_sharded(model)):
        rows = parts[number]
        scores = response_scores(model, batch.select(rows).to(model.device), temperature, with_entropy=with_entropy)
        if counted:
            logprobs[rows] = scores.logprobs.double().sum(1).cpu()
            entropy[rows] = scores.entropy.double().sum(1).cpu()
    ranks.sum_((logprobs, entropy))
    return SampleSums(logprobs, entropy)


def likelihoods(recipe: Recipe, policy: Path, start: Path) -> Likelihoods:
    """`Likelihoods` of the held-out rankings of `data.preferences` under two checkpoints.

    Errors:
        UserError: see `load_rankings`; or no held-out ranking has two answers of different rank.
    """
    data = recipe.data
    readers = []
    for path in (policy, start):
        encoder = Encoder(load_tokenizer(str(path), recipe.model), data.max_prompt_tokens, data.max_response_tokens)
        readers.append(Reader(load_policy(str(path), "float32").eval(), encoder))
    found = held_out_likelihoods(load_rankings(data).eval, data, *readers)
    if found is None:
        raise UserError(
            "data.preferences: no held-out ranking has two answers of different rank.",
            mend="Raise data.eval_fraction or data.max_prompt_tokens.",
        )
    return found


def held_out_likelihoods(
    rankings: Sequence[Ranking], data: DataSection, policy: Reader, start: Reader
) -> Likelihoods | None:
    """`Likelihoods` of these rankings, each model reading the prompts in its form; None where they hold no pair.

    Rankings whose prompt `data.long_prompts` drops in one of the two forms are left out.
    """
    encoded = _in_both_forms(rankings, data, policy.encoder, start.encoder)
    pairs, first = [], 0
    for ranking in encoded[0]:
        pairs += [(first + better, first + worse) for better, worse in ordered_pairs(ranking.ranks)]
        first += len(ranking.ranks)
    if not pairs:
        return None
    sums = [_answer_sums(reader, each) for reader, each in zip((policy, start), encoded, strict=True)]
    tokens = np.array([len(answer) for ranking in encoded[0] for answer in ranking.response_ids])
    means, rewards = sums[0] / tokens, sums[0] - sums[1]
    better, worse = np.array(pairs).T
    by_mean, by_reward = means[better] > means[worse], rewards[better] > rewards[worse]
    return Likelihoods(
        spearman=spearman(means, tokens.astype(float)),
        ranking_accuracy=float(by_mean.mean()),
        reward_accuracy=float(by_reward.mean()),
        agreement=float((by_mean == by_reward).mean()),
        pairs=len(pairs),
    )


def sft_perplexity(examples: Sequence[EncodedExample], reader: Reader) -> float | None:
    """exp(-sum log p / n) over all n supervised tokens of encoded demonstrations; None where there are none.

    Supervised are the response and its EOS, and of a plain text all but the token that nothing stands before: what
    the SFT stage's validation loss, of which this is the exponential, is a mean over.
    """
    starts = [max(1, example.response_start) for example in examples]
    groups = [Group(e.ids[:start], [e.ids[start:]]) for e, start in zip(examples, starts, strict=True)]
    rows = [Row(group) for group in groups if group.answer_ids[0]]
    if not rows:
        return None
    pad_id = reader.encoder.pad_token_id
    sums = reference_sums(rows, reader.model, pad_id, shared=False, autocast=nullcontext, ranks=reader.ranks)
    tokens = sum(len(row.group.answer_ids[0]) for row in rows)
    return float(np.exp(-np.sum(sums) / tokens))


def _in_both_forms(
    rankings: Sequence[Ranking], data: DataSection, policy: Encoder, start: Encoder
) -> tuple[list[EncodedRanking], list[EncodedRanking]]:
    """The rankings as the policy and as its start read them, place by place; without those dropped in either form."""
    if policy.form == start.form:
        encoded, _ = encode_rankings(rankings, policy, data)
        return encoded, encoded
    both = [[encode_rankings([ranking], encoder, data)[0] for encoder in (policy, start)] for ranking in rankings]
    kept = [(own[0], theirs[0]) for own, theirs in both if own and theirs]
    return [own for own, _ in kept], [theirs for _, theirs in kept]


def _answer_sums(reader: Reader, rankings: Sequence[EncodedRanking]) -> np.ndarray:
    """sum log p of every answer, nats [answers]."""
    rows = [Row(Group(ranking.prompt_ids, ranking.response_ids)) for ranking in rankings]
    pad_id, ranks = reader.encoder.pad_token_id, reader.ranks
    return np.array(reference_sums(rows, reader.model, pad_id, shared=False, autocast=nullcontext, ranks=ranks))
