"""Where scores come from: reward models, Python functions of the user's own, and their weighted sum.

A model's scores are normalised by the mean and standard deviation of its manifest; a function's are used as they are.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.adapters import FOLDER, adapter_parameters, base_sha256, load_adapter, using
from pipeline.artifacts import Artifact
from pipeline.errors import UserError
from pipeline.functions import NamedFunction, excerpt, load_function
from pipeline.ranks import ALONE, Ranks
from pipeline.recipe import TRAINED, ModelSection
from pipeline.recipe_ppo import RewardSource
from pipeline.records import Prompt
from pipeline.sharding import is_sharded, load_in_turn, wanted
from pipeline.stage import Stage
from pipeline.tokens import EncodedPrompt, Encoder, load_tokenizer, tokenizer_sha256
from policy.ppo.gate import admit
from reward_model.score import Normalisation, load_reward_model, read_head, score_responses, score_with
from rollout.batch import RolloutBatch
from rollout.engine import context_length

CHECKED_PROMPTS = 64
"""Prompts on which a reward model's own tokenizer is tried at set-up."""


class Source(Protocol):
    """One term of the score."""

    def scores(self, batch: RolloutBatch, prompts: Sequence[Prompt]) -> Tensor:
        """Scores [B], float32, of the responses to `prompts`, the records behind `batch.prompt_ids`."""
        ...


@dataclass(frozen=True)
class Rewards:
    """The sources of the score, by name, each with its weight."""

    sources: Mapping[str, Source]
    weights: Mapping[str, float]
    ranks: Ranks = ALONE

    def scores(self, batch: RolloutBatch, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """sum_i weight_i * score_i [B] and every score_i [B], in float32 on the batch's device.

        All ranks give the same batch; each scores its share, and all get the whole.

        Errors:
            UserError: a function raises or returns anything but one finite number per response.
            ValueError: a source needs the records of the prompts, and there are not as many as rows.
        """
        device = batch.prompt_ids.device
        own = self.ranks.share(range(len(batch)))
        rows = own or [0]  # a rank without a row keeps in step with the others
        part = batch if len(rows) == len(batch) else batch.select(rows)
        records = [prompts[row] for row in rows] if prompts else ()
        each = {name: torch.zeros(len(batch), device=device) for name in self.sources}
        for name, source in self.sources.items():
            found = source.scores(part, records).to(device)
            if own:
                each[name][own] = found
        self.ranks.sum_(each.values())
        weighted = [self.weights[name] * scores for name, scores in each.items()]
        return torch.stack(weighted).sum(0), each


@dataclass(frozen=True)
class Retokeniser:
    """Prompts and responses in the tokens of a reward model whose tokenizer is not the policy's.

    A text prompt is decoded from the policy's tokens, so that the model reads what the policy read; a prompt of
    messages goes through the reward model's own chat template.
    """

    policy: Encoder
    own: Encoder

    def __call__(self, batch: RolloutBatch, prompts: Sequence[Prompt]) -> tuple[list[list[int]], list[list[int]]]:
        """Tokens of prompts and responses.

        A response that ended by itself ends with this tokenizer's EOS. One that was cut off does not, unless its text
        is empty: a score needs a token to be read at.
        """
        prompt_ids, response_ids = token_ids(batch)
        read = [
            Prompt(self.policy.decode(ids)) if isinstance(prompt.content, str) else prompt
            for prompt, ids in zip(prompts, prompt_ids, strict=True)
        ]
        ended = self.own.whole_responses_ids([self.policy.decode(ids) for ids in response_ids])
        finished = batch.finished.tolist()
        responses = [ids if done or len(ids) == 1 else ids[:-1] for ids, done in zip(ended, finished, strict=True)]
        return self.own.prompts_ids(read), responses

    def check(self, title: str, prompts: Sequence[EncodedPrompt]) -> int:
        """Tries both tokenizers on a sample of the prompts and returns its size.

        Errors:
            UserError: a text comes back from one of them with other letters (whitespace and case aside), or its chat
                template is missing or refuses a prompt.
        """
        step = max(1, len(prompts) // CHECKED_PROMPTS)
        sample = [encoded.prompt for encoded in prompts[::step][:CHECKED_PROMPTS]]
        self.own.prompts_ids(sample)
        for prompt in sample:
            text = self.policy.prompt_text(prompt)
            for whose, encoder in (("policy", self.policy), ("reward model", self.own)):
                back = encoder.decode(encoder.whole_responses_ids([text])[0])
                if _letters(back) != _letters(text):
                    raise UserError(
                        f"{title}: {prompt.source}: the {whose}'s tokenizer turns {excerpt(text)} into "
                        f"{excerpt(back)}, so the reward model would read another text than the policy.",
                        mend="Use a reward model whose tokenizer keeps such text, or leave such prompts out.",
                    )
        return len(sample)


@dataclass(frozen=True)
class ModelReward:
    """A reward model's normalised score, read at the last token; `retokenise` where its tokenizer is another."""

    path: str
    model: PreTrainedModel
    normalisation: Normalisation
    max_tokens: int
    autocast: Callable[[], AbstractContextManager[object]]
    retokenise: Retokeniser | None = None
    ranks: Ranks = ALONE

    def scores(self, batch: RolloutBatch, prompts: Sequence[Prompt]) -> Tensor:
        """(score - mean) / std [B].

        Errors:
            UserError: a prompt and its response have more tokens than the model has positions.
        """
        prompt_ids, response_ids = self.retokenise(batch, prompts) if self.retokenise else token_ids(batch)
        positions = context_length(self.model.config.get_text_config(decoder=True))
        for row, (prompt, response) in enumerate(zip(prompt_ids, response_ids, strict=True)):
            if positions is not None and len(prompt) + len(response) > positions:
                where = prompts[row].source if prompts else f"row {row}"
                raise UserError(
                    f"ppo.rewards: {self.path}: {where}: prompt and response have {len(prompt)} + {len(response)} "
                    f"tokens in the reward model's tokenizer, and it reads {positions} (max_position_embeddings).",
                    mend="Lower data.max_prompt_tokens or data.max_response_tokens, or use a reward model with a "
                    "longer context.",
                )
        with self.autocast():
            raw = self.raw_scores(prompt_ids, response_ids)
        return self.normalisation.apply(raw)

    def raw_scores(self, prompt_ids: list[list[int]], response_ids: list[list[int]]) -> Tensor:
        """Scores [B] before normalisation."""
        return score_responses(
            self.model, prompt_ids, response_ids, max_tokens=self.max_tokens, forwards=self._forwards
        )

    def _forwards(self, needed: int) -> int:
        """A sharded model's forwards are all ranks' together: as many as the rank that needs most."""
        return max(self.ranks.gather(needed)) if is_sharded(self.model) else needed

    def parameters(self) -> list[nn.Parameter]:
        """The weights that belong to this reward model alone."""
        return list(self.model.parameters())


@dataclass(frozen=True, kw_only=True)
class AdapterReward(ModelReward):
    """A reward model that is an adapter and a head over the policy's base, which is `model`."""

    adapter: str
    head: nn.Linear

    def raw_scores(self, prompt_ids: list[list[int]], response_ids: list[list[int]]) -> Tensor:
        """Scores [B] before normalisation."""
        with using(self.model, self.adapter):
            return score_with(self.model.base_model, self.head, prompt_ids, response_ids, max_tokens=self.max_tokens)

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's weights and the head's."""
        return [*adapter_parameters(self.model, self.adapter), *self.head.parameters()]


@dataclass(frozen=True)
class FunctionReward:
    """What a function says of prompts' texts, responses' texts and the other columns of the prompts' rows."""

    function: NamedFunction
    encoder: Encoder

    def scores(self, batch: RolloutBatch, prompts: Sequence[Prompt]) -> Tensor:
        """The function's numbers [B] as they are."""
        texts = [self.encoder.prompt_text(prompt) for prompt in prompts]
        responses = [self.encoder.decode(ids) for ids in token_ids(batch)[1]]
        columns = [dict(prompt.columns) for prompt in prompts]

        def where(row: int) -> str:
            return f"{prompts[row].source}: prompt {excerpt(texts[row])}, response {excerpt(responses[row])}"

        return torch.tensor(self.function(texts, responses, columns, where=where), dtype=torch.float32)


def token_ids(batch: RolloutBatch) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of the prompts and of the responses, without padding."""
    prompts = [ids[mask].tolist() for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
    responses = [ids[mask].tolist() for ids, mask in zip(batch.response_ids, batch.response_mask, strict=True)]
    return prompts, responses


def load_rewards(
    stage: Stage,
    encoder: Encoder,
    prompts: Sequence[EncodedPrompt],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
    base: Callable[[], PreTrainedModel] | None = None,
) -> Rewards:
    """The sources that `ppo.rewards` names; all are checked before the first model is loaded.

    `base` loads the policy whose frozen base the reward models share as far as they are adapters over it.

    Errors:
        UserError: a function that cannot be called, a model that the gate refuses, or one whose tokenizer does not
            keep the prompts' text.
    """
    ppo = stage.recipe.ppo
    sources: dict[str, Source] = {}
    models: dict[str, tuple[Artifact, Normalisation, Retokeniser | None]] = {}
    for name, entry in ppo.rewards.items():
        if entry.function is not None:
            sources[name] = FunctionReward(_function(name, entry.function, entry), encoder)
        else:
            artifact = stage.inputs["reward_model" if entry.model == TRAINED else f"rewards.{name}"]
            policy, tokenizer = stage.inputs["policy"], encoder.tokenizer
            normalisation = admit(artifact, policy, tokenizer, force=ppo.force, say=stage.say)
            models[name] = (artifact, normalisation, _retokeniser(stage, name, artifact, encoder))
    for name, (artifact, _, retokenise) in models.items():
        if retokenise is not None:
            tried, own = retokenise.check(f"ppo.rewards.{name}", prompts), retokenise.own.tokenizer
            stage.say(
                f"reward {name}: {artifact.path} has a tokenizer of its own, so responses are decoded and encoded "
                f"again (tried on {tried} prompts; its EOS is {own.eos_token}, its padding {own.pad_token})"
            )
    for name, (artifact, normalisation, retokenise) in models.items():
        limit = ppo.max_tokens_per_micro_batch
        if base is not None and retokenise is None and FOLDER in artifact.manifest:
            sources[name] = shared_reward(name, artifact, base(), normalisation, limit, autocast)
            continue
        if base is not None:
            stage.say(f"reward {name}: {artifact.path} is no adapter (rm.lora), so it is loaded as a model of its own")
        load = partial(load_reward_model, artifact.path, torch.float32)
        in_parts = wanted("rewards", ppo.shard, stage.ranks)
        model = load_in_turn(partial(load, "cpu"), stage.ranks, stage.recipe.model.dtype) if in_parts else load(device)
        sources[name] = ModelReward(artifact.path, model, normalisation, limit, autocast, retokenise, stage.ranks)
    ordered = {name: sources[name] for name in ppo.rewards}
    return Rewards(ordered, {name: entry.weight for name, entry in ppo.rewards.items()}, stage.ranks)


def _function(name: str, function: str, entry: RewardSource) -> NamedFunction:
    takes = ("prompts", "responses", "columns")
    return load_function(f"ppo.rewards.{name}", f"reward function {name}", function, entry.kwargs, takes)


def _retokeniser(stage: Stage, name: str, artifact: Artifact, encoder: Encoder) -> Retokeniser | None:
    """How to reach the reward model's tokens; None when they are the policy's."""
    stored = artifact.manifest.get("tokenizer_sha256")
    if stored == tokenizer_sha256(encoder.tokenizer):
        return None
    tokenizer = load_tokenizer(artifact.path, ModelSection(name_or_path=artifact.path))
    if tokenizer_sha256(tokenizer) != stored:
        raise UserError(
            f"ppo.rewards.{name}: the reward model {artifact.path} was trained with another tokenizer than the one in "
            "its directory; token ids would mean different text to it.",
            mend="Put back the tokenizer that it was trained with, or train the reward model again.",
        )
    return Retokeniser(encoder, Encoder(tokenizer, encoder.max_prompt_tokens, encoder.max_response_tokens))


def shared_reward(
    name: str,
    artifact: Artifact,
    policy: PreTrainedModel,
    normalisation: Normalisation,
    limit: int,
    autocast: Callable[[], AbstractContextManager[object]],
) -> AdapterReward:
    """The reward model's adapter and head over the policy's base.

    Errors:
        UserError: the adapter was trained over other weights.
    """
    if artifact.manifest[FOLDER]["base_sha256"] != base_sha256(policy):
        raise UserError(
            f"ppo.rewards.{name}: {artifact.path} is an adapter over other weights than the policy's, so that they "
            "cannot share a base.",
            mend="Train it with rm.lora from this policy (rm.init_from), or set ppo.sharing: lora_policy.",
        )
    adapter = f"reward_{name}"
    load_adapter(policy, adapter, Path(artifact.path) / FOLDER)
    head = read_head(Path(artifact.path)).to(policy.device)
    return AdapterReward(artifact.path, policy, normalisation, limit, autocast, adapter=adapter, head=head)


def _letters(text: str) -> str:
    """The text without whitespace and case, in one Unicode form: what a tokenizer must not lose."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
