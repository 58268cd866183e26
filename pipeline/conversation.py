"""One conversation with a policy: what was said, how it samples, and what fits its context."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.artifacts import open_artifact
from pipeline.errors import UserError
from pipeline.load import RESOLVED
from pipeline.records import Prompt
from pipeline.stages import POLICIES
from pipeline.tokens import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rollout.batch import Completion
    from rollout.engine import EngineKind, RolloutEngine

UNKNOWN_CONTEXT = 4096
"""Tokens of prompt and response for a model whose configuration names no limit."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A sampled response: its text, its length in tokens and whether it ended by itself."""

    text: str
    tokens: int
    finished: bool
    forgotten: int
    """Messages dropped from the start of the conversation to make room."""

    def summary(self) -> str:
        """Length and ending in words."""
        end = "ended by itself" if self.finished else "cut at the limit"
        forgotten = f", the oldest {self.forgotten} messages were forgotten" if self.forgotten else ""
        return f"{self.tokens} tokens, {end}{forgotten}"


@dataclass(slots=True)
class Conversation:
    """A policy, what was said so far and how it samples."""

    engine: RolloutEngine
    encoder: Encoder
    context: int
    temperature: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0
    name: str = ""
    turns: int = 0
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def is_chat(self) -> bool:
        """Whether the model has a chat template, hence remembers turns."""
        return bool(self.encoder.tokenizer.chat_template)

    def reset(self) -> None:
        """Forget every turn."""
        self.messages.clear()

    def set_temperature(self, text: str) -> None:
        """Take a temperature as typed; ValueError says what is wrong with it."""
        from rollout.engine import SamplingOptions

        try:
            temperature = float(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a number") from None
        self.temperature = SamplingOptions(self.max_new_tokens, temperature).temperature

    def reply(self, text: str) -> Reply:
        """Sample a response; the conversation keeps it only when it is complete.

        Raises ValueError when the message alone does not fit the model's context.
        """
        from pipeline.evaluation.policy_eval import sample_seed
        from rollout.engine import SamplingOptions

        asked = [*self.messages, {"role": "user", "content": text}]
        ids, kept = self._fitting(asked) if self.is_chat else (self._checked(Prompt(text)), asked)
        sampling = SamplingOptions(self.max_new_tokens, self.temperature)
        seed = sample_seed(self.seed, self.turns, 0)
        completion: Completion = self.engine.generate([ids], sampling, seeds=[seed])[0]
        self.turns += 1
        answer = self.encoder.decode(completion.token_ids)
        if self.is_chat:
            self.messages = [*kept, {"role": "assistant", "content": answer}]
        return Reply(answer, len(completion.token_ids), completion.finished, len(asked) - len(kept))

    def _fitting(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[dict[str, str]]]:
        """Tokens of the conversation without as many of its oldest exchanges as do not fit."""
        kept = list(messages)
        while len(kept) > 1:
            ids = self.encoder.prompt_ids(Prompt(tuple(kept)))
            if len(ids) <= self._room():
                return ids, kept
            kept = kept[2:]
        return self._checked(Prompt(tuple(kept))), kept

    def _checked(self, prompt: Prompt) -> list[int]:
        ids = self.encoder.prompt_ids(prompt)
        if not ids:
            raise ValueError("the tokenizer makes no token of this text")
        if len(ids) > self._room():
            raise ValueError(f"this text has {len(ids)} tokens and the model reads {self._room()} at most")
        return ids

    def _room(self) -> int:
        return self.context - self.max_new_tokens


def open_conversation(
    policy: str | Path, *, temperature: float, max_new_tokens: int, engine: EngineKind, seed: int | None
) -> Conversation:
    """Load the policy at `policy` (a stage's directory, a model directory or a hub id) and its tokenizer.

    Without a `seed` every conversation differs. Raises UserError for a path that holds no policy, or options that do
    not fit it.
    """
    from transformers import AutoTokenizer

    from rollout.engine import DTYPES, EngineOptions, make_engine, read_config
    from rollout.stop import with_stops

    directory = _directory(open_artifact(policy, kinds=POLICIES, wanted_as="chat").path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
        encoder = Encoder(tokenizer, UNKNOWN_CONTEXT, max_new_tokens)
    except (OSError, ValueError) as error:
        raise UserError(
            f"chat: the tokenizer of {policy} cannot be used: {error}.", mend="Give a directory with tokenizer files."
        ) from error
    config = read_config(directory).to_dict()
    context = config.get("max_position_embeddings") or UNKNOWN_CONTEXT
    if not 0 < max_new_tokens < context:
        raise UserError(
            f"chat: --max-new-tokens is {max_new_tokens} and the model's context {context}.",
            mend=f"Choose 1 to {context - 1}.",
        )
    stops = _stop_token_ids(directory, tokenizer)
    dtype = str(config.get("dtype")).removeprefix("torch.")
    options = EngineOptions(
        max_model_len=context,
        max_sequences=1,
        stop_token_ids=stops,
        dtype=dtype if dtype in DTYPES else "float32",
    )
    start = random.SystemRandom().randrange(2**31) if seed is None else seed
    opened = with_stops(make_engine(engine, directory, options), _stop_texts(directory), encoder)
    conversation = Conversation(opened, encoder, context, max_new_tokens=max_new_tokens, seed=start, name=str(policy))
    try:
        conversation.set_temperature(str(temperature))
    except ValueError as error:
        raise UserError(f"chat: --temperature: {error}.", mend="Choose 0, or 0.01 and more.") from error
    return conversation


def _directory(path: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"chat: {path} cannot be fetched from the hub: {reason}", mend="Check the name and the network."
        ) from error


def _stop_texts(directory: Path) -> tuple[str, ...]:
    """`rollout.stop` of the recipe that the policy was trained with; none for a model from elsewhere."""
    resolved = directory / RESOLVED
    if not resolved.is_file():
        return ()
    return tuple(yaml.safe_load(resolved.read_text(encoding="utf-8")).get("rollout", {}).get("stop", ()))


def _stop_token_ids(directory: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokenizer's EOS and those of the generation configuration: chat models often have two."""
    from transformers import GenerationConfig

    stops: list[Any] = [tokenizer.eos_token_id]
    if (directory / "generation_config.json").exists():
        named = GenerationConfig.from_pretrained(directory).eos_token_id
        stops += named if isinstance(named, list) else [named]
    return tuple(dict.fromkeys(stop for stop in stops if stop is not None))


def printable(text: str) -> str:
    """Text without control characters, which a model may sample and a terminal would obey."""
    return "".join(character for character in text if character in "\n\t" or character.isprintable())
