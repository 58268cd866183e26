"""What a rollout hands to the trainer: completions as lists, and the padded batch made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from policy.tensors import left_pad, right_pad


@dataclass(frozen=True)
class Completion:
    """One sampled response, as the engine gave it.

    `token_ids`: the sampled tokens, with the EOS if one was sampled. `logprobs`: the engine's
    log-probability of each, nats. `finished`: the response ended by itself (EOS or a stop token),
    not at the length limit. `policy_version`: of the weights that sampled it, see `RolloutEngine`.
    Raises ValueError when the two lengths differ, a log-probability is not finite or the version is
    negative.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    policy_version: int = 0

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} token ids but {len(self.logprobs)} log-probabilities")
        if not all(math.isfinite(logprob) for logprob in self.logprobs):
            raise ValueError("a log-probability of a sampled token is not finite")
        if self.policy_version < 0:
            raise ValueError(f"policy_version is {self.policy_version}, but versions count from 0")


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """B prompts and their responses, P prompt and R response columns.

    `prompt_ids` [B,P] long, left-padded; `prompt_mask` [B,P] bool, True on real tokens;
    `response_ids` [B,R] long, right-padded; `response_mask` [B,R] bool, True on sampled tokens
    including the EOS; `rollout_logprobs` [B,R] float, the engine's, nats, 0 on padding;
    `finished` [B] bool; `policy_versions` [B] long, of the weights that sampled each response, all 0
    where they are left out. An empty response is a row without True. Raises ValueError when shapes,
    dtypes or devices do not fit together, a prompt is empty, or a mask has holes.
    """

    prompt_ids: Int[Tensor, "batch prompt"]
    prompt_mask: Bool[Tensor, "batch prompt"]
    response_ids: Int[Tensor, "batch response"]
    response_mask: Bool[Tensor, "batch response"]
    rollout_logprobs: Float[Tensor, "batch response"]
    finished: Bool[Tensor, " batch"]
    policy_versions: Int[Tensor, " batch"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def __post_init__(self) -> None:
        if self.policy_versions.numel() == 0:
            object.__setattr__(self, "policy_versions", torch.zeros_like(self.finished, dtype=torch.long))
        if self.prompt_ids.ndim != 2 or self.response_ids.ndim != 2:
            raise ValueError("prompt_ids and response_ids must be [batch, positions]")
        batch, prompt = self.prompt_ids.shape
        response = self.response_ids.shape[1]
        _check("prompt_ids", self.prompt_ids, (batch, prompt), torch.long)
        _check("prompt_mask", self.prompt_mask, (batch, prompt), torch.bool)
        _check("response_ids", self.response_ids, (batch, response), torch.long)
        _check("response_mask", self.response_mask, (batch, response), torch.bool)
        _check("rollout_logprobs", self.rollout_logprobs, (batch, response), None)
        _check("finished", self.finished, (batch,), torch.bool)
        _check("policy_versions", self.policy_versions, (batch,), torch.long)
        if batch == 0 or prompt == 0 or response == 0:
            raise ValueError(f"a batch needs rows and columns, got [{batch},{prompt}+{response}]")
        if len({getattr(self, field.name).device for field in fields(self)}) > 1:
            raise ValueError("the tensors of a batch must be on one device")
        if not self.prompt_mask[:, -1].all():
            raise ValueError("prompt_mask must be True in the last column: no empty prompt, left padding")
        if (self.prompt_mask[:, :-1] & ~self.prompt_mask[:, 1:]).any():
            raise ValueError("prompt_mask must be False, then True (left padding)")
        if (~self.response_mask[:, :-1] & self.response_mask[:, 1:]).any():
            raise ValueError("response_mask must be True, then False (right padding)")

    def __len__(self) -> int:
        """B."""
        return len(self.prompt_ids)

    @property
    def input_ids(self) -> Int[Tensor, "batch total"]:
        """Prompt and response side by side, [B,P+R]."""
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    @property
    def attention_mask(self) -> Bool[Tensor, "batch total"]:
        """True on the real tokens of `input_ids`, [B,P+R]."""
        return torch.cat([self.prompt_mask, self.response_mask], dim=1)

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Tokens per response, EOS included, [B]."""
        return self.response_mask.sum(1)

    @property
    def n_empty(self) -> int:
        """How many responses have no token: these can carry no reward."""
        return int((self.lengths == 0).sum())

    @classmethod
    def from_completions(
        cls, prompts: Sequence[Sequence[int]], completions: Sequence[Completion], pad_id: int
    ) -> RolloutBatch:
        """The batch of `prompts[i]` answered by `completions[i]`, on the CPU.

        Masks come from the lengths, so a sampled token equal to `pad_id` stays a token. Raises
        ValueError when the lists are empty or differ in length.
        """
        if not prompts or len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions")
        prompt_ids, prompt_mask = left_pad(prompts, pad_id)
        response_ids, response_mask = right_pad([c.token_ids for c in completions], pad_id)
        if response_ids.shape[1] == 0:
            response_ids = torch.full((len(completions), 1), pad_id)
            response_mask = torch.zeros((len(completions), 1), dtype=torch.bool)
        logprobs = torch.zeros(response_ids.shape)
        logprobs[response_mask] = torch.tensor([x for c in completions for x in c.logprobs])
        finished = torch.tensor([completion.finished for completion in completions])
        versions = torch.tensor([completion.policy_version for completion in completions])
        return cls(prompt_ids, prompt_mask, response_ids, response_mask, logprobs, finished, versions)

    def select(self, indices: Sequence[int] | Int[Tensor, " chosen"]) -> RolloutBatch:
        """The rows `indices`, in that order, without the columns that are padding in all of them.

        At least one response column stays. Raises IndexError for a row that is not there.
        """
        rows = torch.as_tensor(indices, dtype=torch.long, device=self.prompt_ids.device)
        prompt_mask, response_mask = self.prompt_mask[rows], self.response_mask[rows]
        first = self.prompt_ids.shape[1] - int(prompt_mask.sum(1).max())
        stop = max(1, int(response_mask.sum(1).max()))
        return RolloutBatch(
            prompt_ids=self.prompt_ids[rows, first:],
            prompt_mask=prompt_mask[:, first:],
            response_ids=self.response_ids[rows, :stop],
            response_mask=response_mask[:, :stop],
            rollout_logprobs=self.rollout_logprobs[rows, :stop],
            finished=self.finished[rows],
            policy_versions=self.policy_versions[rows],
        )

    def to(self, device: torch.device | str) -> RolloutBatch:
        """The same batch on `device`."""
        return RolloutBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def refuse_stale(batch: RolloutBatch, version: int, *, lag: int = 0) -> None:
    """Refuses responses of weights other than those that the trainer expects.

    Args:
        version: of the trainer's weights.
        lag: how many versions older a response may be; above 0 only where importance weights correct for it.

    Raises:
        RuntimeError: naming the rows and their versions; the engine or the loop around it is at fault.
    """
    versions = batch.policy_versions
    wrong = ((versions > version) | (versions < version - lag)).nonzero()[:, 0].tolist()
    if not wrong:
        return
    seen = sorted(set(versions[wrong].tolist()))
    expected = f"version {version}" if lag == 0 else f"versions {max(version - lag, 0)} to {version}"
    raise RuntimeError(
        f"{len(wrong)} of {len(batch)} responses, first row {wrong[0]}, were sampled by weights of version "
        f"{', '.join(map(str, seen))}, but {expected} of the policy is wanted: the rollout engine is out of step with "
        "the trainer."
    )


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if dtype is None and not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected a float type")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {dtype}")
