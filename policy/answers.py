"""Prompts with one or several answers as one padded batch, and the log-probabilities of those answers.

With `shared` prompts a row is a prompt followed by all its answers; each answer attends to the prompt and to itself
alone, and counts its positions from the prompt's end, so that the prompt is computed once. Otherwise every answer is a
row of its own behind a copy of its prompt. Both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import PreTrainedModel

from policy.models import output_head
from policy.tensors import logprobs_from_hidden, right_pad

PADDING = -1
PROMPT = 0
PROBE_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and its answers, as tokens; every answer ends in EOS unless it was cut."""

    prompt_ids: Sequence[int]
    answer_ids: Sequence[Sequence[int]]

    @property
    def tokens(self) -> int:
        """Of the prompt and all answers."""
        return len(self.prompt_ids) + sum(map(len, self.answer_ids))


@dataclass(frozen=True, eq=False)
class AnswerBatch:
    """A answers to G prompts in B rows of at most S tokens; T answer tokens and U later tokens of prompts.

    Attributes:
        input_ids [B,S]: right-padded. segments [B,S]: 0 on the prompt, 1, 2 ... on the row's answers, -1 on padding.
        rows [T], ids [T], owner [T]: where the flattened hidden state lies that predicts an answer's token, the token,
            and the answer that it belongs to; answers count group by group.
        prompt_rows, prompt_ids, prompt_owner [U]: the same for the tokens of each group's prompt after its first.
        group [A]: which prompt an answer belongs to.
        shared: whether rows hold several answers.
    """

    input_ids: Tensor
    segments: Tensor
    rows: Tensor
    ids: Tensor
    owner: Tensor
    prompt_rows: Tensor
    prompt_ids: Tensor
    prompt_owner: Tensor
    group: Tensor
    shared: bool

    def as_dict(self) -> dict[str, Tensor]:
        """Its tensors, as a trainer moves them to a device."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "shared"}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], *, shared: bool) -> AnswerBatch:
        """The batch that `as_dict` gave; other entries are left alone."""
        names = [field.name for field in fields(cls) if field.name != "shared"]
        return cls(**{name: tensors[name] for name in names}, shared=shared)


@dataclass(frozen=True)
class AnswerLogprobs:
    """Sums of log-probabilities, nats, and token counts: of every answer [A] and, where asked for, every prompt [G]."""

    answers: Tensor
    answer_tokens: Tensor
    prompts: Tensor
    prompt_tokens: Tensor


def collate_answers(groups: Sequence[Group], pad_id: int, *, shared: bool) -> AnswerBatch:
    """The batch of `groups`; see the module's docstring."""
    width = max(len(group.answer_ids) for group in groups) if shared else 1
    rows, segments, answers, prompts = [], [], [], []
    for number, group in enumerate(groups):
        prompt = list(group.prompt_ids)
        for first in range(0, len(group.answer_ids), width):
            part = group.answer_ids[first : first + width]
            place = len(rows), len(prompt)
            rows.append(prompt + [token for answer in part for token in answer])
            segments.append([PROMPT] * len(prompt) + [k for k, answer in enumerate(part, 1) for _ in answer])
            answers += _places(part, *place)
            if first == 0:
                prompts.append((place[0], number, prompt))
    input_ids, mask = right_pad(rows, pad_id)
    stride = input_ids.shape[1]
    marks = torch.where(mask, right_pad(segments, 0)[0], PADDING)
    predicted = [
        (row * stride + before, token, owner) for owner, (row, each) in enumerate(answers) for before, token in each
    ]
    asked = [
        (row * stride + at, token, number) for row, number, prompt in prompts for at, token in enumerate(prompt[1:])
    ]
    group = [number for number, each in enumerate(groups) for _ in each.answer_ids]
    return AnswerBatch(input_ids, marks, *_columns(predicted), *_columns(asked), torch.tensor(group), shared)


def _places(answers: Sequence[Sequence[int]], row: int, prompt: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """For each answer of a row: (position before the token, token); the prompt's last predicts its first."""
    places, start = [], prompt
    for answer in answers:
        before = [prompt - 1, *range(start, start + len(answer) - 1)]
        places.append((row, list(zip(before, answer, strict=True))))
        start += len(answer)
    return places


def _columns(triples: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    table = torch.tensor(triples, dtype=torch.long).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def answer_logprobs(model: PreTrainedModel, batch: AnswerBatch, *, with_prompts: bool = False) -> AnswerLogprobs:
    """Sums over each answer's tokens under `model`, at temperature 1, in float32 at least.

    Logits exist for a chunk of answer tokens at a time (`policy.tensors.logprobs_from_hidden`). `with_prompts` adds
    the prompts' own, each given what stands before it in its first row.
    """
    hidden = answer_hidden(model, batch).flatten(0, 1)
    answers = _summed(model, hidden, batch.rows, batch.ids, batch.owner, len(batch.group))
    groups = int(batch.group.max()) + 1
    if with_prompts:
        prompts = _summed(model, hidden, batch.prompt_rows, batch.prompt_ids, batch.prompt_owner, groups)
    else:
        prompts = answers[0].new_zeros(groups), answers[1].new_zeros(groups)
    return AnswerLogprobs(*answers, *prompts)


def answer_hidden(model: PreTrainedModel, batch: AnswerBatch) -> Tensor:
    """The trunk's last hidden states [B,S,D]."""
    layout = {"attention_mask": attention(batch), "position_ids": positions(batch)} if batch.shared else {}
    return model.base_model(input_ids=batch.input_ids, use_cache=False, **layout).last_hidden_state


def attention(batch: AnswerBatch) -> Tensor:
    """Who sees whom [B,1,S,S], True where it does: what stands before in the prompt or in the own segment."""
    segments = batch.segments
    own = segments[:, :, None] == segments[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    return ((own | (segments == PROMPT)[:, None, :]) & causal)[:, None]


def positions(batch: AnswerBatch) -> Tensor:
    """Position ids [B,S]: every answer goes on where the prompt ended."""
    segments = batch.segments
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    prompt = (segments == PROMPT).sum(1, keepdim=True)
    starts = torch.where(segments != segments.roll(1, 1), index, 0).cummax(1).values
    return torch.where(segments == PROMPT, index, prompt + index - starts)


def _summed(
    model: PreTrainedModel, hidden: Tensor, rows: Tensor, ids: Tensor, owner: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    head = output_head(model)
    chosen = hidden.index_select(0, rows)  # hidden[rows] adds up its gradient in an order that threads decide
    logprobs = logprobs_from_hidden(chosen, head.weight, ids, bias=head.bias, with_entropy=False).logprobs
    sums = logprobs.new_zeros(count).index_add(0, owner, logprobs)
    return sums, torch.bincount(owner, minlength=count).to(sums.dtype)


@torch.no_grad()
def can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether rows of several answers give `model`'s own numbers: tried on a few tokens.

    They do not where the architecture ignores a mask of four dimensions or the position ids, or sees a window only.
    """
    config = model.config.get_text_config()
    if config.to_dict().get("sliding_window") is not None:
        return False
    ids = torch.arange(1, 12) % config.vocab_size
    group = Group(ids[:5].tolist(), [ids[5:8].tolist(), ids[8:].tolist(), ids[4:9].tolist()])
    found = []
    for shared in (True, False):
        batch = collate_answers([group], 0, shared=shared)
        moved = {name: tensor.to(model.device) for name, tensor in batch.as_dict().items()}
        try:
            found.append(answer_logprobs(model, AnswerBatch.of(moved, shared=shared)).answers)
        except (ValueError, RuntimeError):
            return False
    return torch.allclose(found[0], found[1], rtol=0.0, atol=PROBE_TOLERANCE)
