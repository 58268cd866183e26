"""The gate before PPO: a reward model that cannot be trusted is refused before any model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pipeline.artifacts import Artifact
from pipeline.errors import UserError
from pipeline.recipe import PpoSection
from pipeline.tokens import chat_template_sha256, tokenizer_sha256
from reward_model.score import Normalisation, read_normalisation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHANCE = 0.5
"""Accuracy on ordered pairs of a reward model that guesses."""
RAW = Normalisation(mean=0.0, std=1.0)
_ALL_THE_SAME = "Or start all the same with --ppo.force true."


def admit(
    reward_model: Artifact,
    policy: Artifact,
    tokenizer: PreTrainedTokenizerBase,
    *,
    force: bool,
    say: Callable[[str], None],
) -> Normalisation:
    """The reward model's normalisation, once nothing speaks against training on it.

    `tokenizer` is the policy's. With `force` each objection is said instead, and a model without a normalisation has
    its scores used as they are.

    Errors:
        UserError: another chat template, no normalisation, or an accuracy that may be chance.
    """
    found = [*_fit(reward_model, policy, tokenizer), *_accuracy(reward_model)]
    normalisation = RAW
    try:
        normalisation = read_normalisation(reward_model)
    except UserError as error:
        found.append(error)
    for objection in found:
        if not force:
            raise UserError(objection.message, mend=f"{objection.mend} {_ALL_THE_SAME}")
        say(f"ppo.force overrides: {objection.message}")
    return normalisation


def batch_arithmetic(ppo: PpoSection) -> str:
    """What one update does, in optimiser steps."""
    return (
        f"1 update = {ppo.rollout_batch_size} sequences, {ppo.num_ppo_epochs} epochs x {ppo.num_minibatches} "
        f"minibatches = {ppo.num_ppo_epochs * ppo.num_minibatches} optimiser steps of "
        f"{ppo.rollout_batch_size // ppo.num_minibatches} sequences"
    )


def _fit(reward_model: Artifact, policy: Artifact, tokenizer: PreTrainedTokenizerBase) -> Iterator[UserError]:
    """Objections to how the reward model reads what the policy writes.

    One with another tokenizer reads decoded text in its own form.
    """
    same = tokenizer_sha256(tokenizer) == reward_model.manifest.get("tokenizer_sha256")
    if same and chat_template_sha256(tokenizer) != reward_model.manifest.get("chat_template_sha256"):
        yield UserError(
            f"the reward model {reward_model.path} was trained with another chat template than the policy "
            f"{policy.path} uses; its scores are of prompts in another form.",
            mend="Set model.chat_template to the one that both were trained with, or train the reward model again.",
        )


def _accuracy(reward_model: Artifact) -> Iterator[UserError]:
    """Objections to what the reward model has shown on held-out rankings."""
    metrics = reward_model.manifest.get("metrics", {})
    accuracy, low, high = (metrics.get(f"eval/accuracy{end}") for end in ("", "_low", "_high"))
    more = "Train it on more preferences, or hold more of them out (data.eval_fraction) if the interval is only wide."
    if accuracy is None or low is None or high is None:
        yield UserError(
            f"{reward_model.path}: its held-out accuracy has no interval in manifest.json, so nothing shows that it "
            "knows better from worse.",
            mend=more,
        )
    elif low <= CHANCE:
        verb = "includes" if high >= CHANCE else "lies below"
        yield UserError(
            f"{reward_model.path}: its held-out accuracy is {accuracy:.3f} [{low:.3f}, {high:.3f}] on "
            f"{metrics['eval/pairs']} pairs; the 95% interval {verb} 50%, which is guessing.",
            mend=more,
        )
