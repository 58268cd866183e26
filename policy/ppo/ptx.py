"""PPO-ptx: the language-model loss on demonstrations as a further term of the policy's loss.

objective(phi) = E_RL[...] + gamma E_x[log pi_phi(x)]   (InstructGPT, arXiv:2203.02155, equation 2)

InstructGPT draws x from pretraining data; here it is the responses of `data.sft`, as the SFT stage learns them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.preferences import load_demonstrations
from pipeline.stage import Stage
from pipeline.tokens import EncodedExample, Encoder, encode_sft
from policy.models import response_scores
from policy.ppo.order import pass_indices
from policy.ppo.roles import Roles
from policy.ppo.slices import slices
from policy.tensors import masked_mean
from rollout.batch import Completion, RolloutBatch

TEMPERATURE = 1.0
"""That of the SFT stage's loss; `rollout.temperature` is how responses are sampled, not what the model is."""


@dataclass(frozen=True)
class PtxLoss:
    """coef * mean over tokens of -log p on the demonstrations of a step.

    Attributes:
        examples: encoded demonstrations of the training split.
        size: of them per optimiser step.
        seed: decides their order.
        pad_id: fills batches.
    """

    examples: Sequence[EncodedExample]
    coef: float
    size: int
    seed: int
    pad_id: int

    def batch(self, step: int) -> RolloutBatch:
        """The demonstrations of step number `step` (from 1), each once per pass; their responses carry the loss.

        The first token of a plain text without a BOS has nothing before it to be predicted from: it is the prompt.
        """
        examples = self._examples(step)
        starts = [max(1, example.response_start) for example in examples]
        prompts = [example.ids[:start] for example, start in zip(examples, starts, strict=True)]
        responses = [tuple(example.ids[start:]) for example, start in zip(examples, starts, strict=True)]
        completions = [Completion(ids, (0.0,) * len(ids), finished=True) for ids in responses]
        return RolloutBatch.from_completions(prompts, completions, self.pad_id)

    def tokens(self, step: int) -> int:
        """Of the demonstrations of step number `step`, prompts included."""
        return sum(len(example.ids) for example in self._examples(step))

    def _examples(self, step: int) -> list[EncodedExample]:
        return [self.examples[row] for row in pass_indices(len(self.examples), self.size, step, self.seed)]

    def backward(self, roles: Roles, step: int) -> Tensor:
        """Adds the gradient of coef * loss to the policy's and returns the loss: -sum log p / n, nats per token.

        n is the number of response tokens of the whole step, whatever the micro-batches.
        """
        batch = self.batch(step).to(roles.device)
        tokens = float(batch.response_mask.sum())
        total = torch.zeros((), device=roles.device)
        for rows, counts in slices(batch, roles.max_tokens, roles.ranks, in_step=roles.sharded):
            part = batch.select(rows)
            with roles.autocast():
                scores = response_scores(roles.policy, part, TEMPERATURE, with_entropy=False)
            loss = -masked_mean(scores.logprobs, part.response_mask, tokens) * float(counts)
            (self.coef * loss).backward()
            total = total + loss.detach()
        roles.ranks.sum_((total,))
        return total


def load_ptx(stage: Stage, encoder: Encoder) -> PtxLoss | None:
    """The loss that `ppo.ptx_coef` asks for, on the demonstrations of `data.sft`; None where it is 0.

    Errors:
        UserError: `data.sft` cannot be read, or no demonstration of its training split fits the limits.
    """
    recipe, ppo = stage.recipe, stage.recipe.ppo
    if ppo.ptx_coef == 0.0:
        return None
    split = load_demonstrations(recipe.data)
    examples, lengths = encode_sft(split.train, encoder, recipe.data)
    for line in [*split.lines(), *lengths.lines()]:
        stage.say(line)
    if not examples:
        raise UserError(
            f"ppo.ptx_coef: data.long_prompts: {recipe.data.long_prompts} leaves no training example of data.sft.",
            mend="Raise data.max_prompt_tokens, or set ppo.ptx_coef: 0.",
        )
    size = ppo.rollout_batch_size // ppo.num_minibatches
    stage.record(ptx={"data": split.report, "lengths": lengths.as_dict()})
    stage.say(f"ptx: {ppo.ptx_coef:g} x the loss on {len(examples)} demonstrations, {size} per optimiser step")
    return PtxLoss(examples, ppo.ptx_coef, size, recipe.seed, encoder.pad_token_id)
