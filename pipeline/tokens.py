"""Tokenizers and the one rendering of prompts and responses as token ids that every stage uses.

`transformers` is imported inside the functions that need it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.lengths import LengthReport, LengthTally
from pipeline.recipe import DataSection, ModelSection
from pipeline.records import Message, Prompt, Ranking, SftExample
from pipeline.sources import may_be_hub_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "Hello, world! Don't 12345  naïve café 你好 🙂\n\tdef f(x): return x**2"
PAD_LIKE = (r"pad", r"unused|reserved|extra_id|dummy", r"unk")
PAD_CANDIDATES = 5
PROMPT_FORM, PROMPT_SLOT = "prompt_form", "{prompt}"
"""Key of a tokenizer's configuration that holds its prompt form, and where the prompt stands in it."""
SPECIAL_INSIDE = "responses hold the text of an EOS or padding token"
SAME_AFTER_CUT = "rankings have answers of different rank that are equal once truncated"


def load_tokenizer(path: str | Path, model: ModelSection) -> PreTrainedTokenizerBase:
    """Tokenizer of a directory or hub id with `model.pad_token` and `model.chat_template` applied.

    Raises UserError when it cannot be loaded, has no EOS or no padding token, pads with the EOS
    token (then no model could learn to stop), or when `model.pad_token` is not in its vocabulary.
    """
    if not Path(path).exists() and not may_be_hub_id(str(path)):
        raise UserError(
            f"{path} does not exist, so no tokenizer can be loaded from it.",
            mend="Give the directory of a model with its tokenizer, or a hub id.",
        )
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: no tokenizer could be loaded from here ({reason}).",
            mend="Give a directory with tokenizer.json and tokenizer_config.json, or a hub id.",
        ) from error
    if model.pad_token is not None:
        if model.pad_token not in tokenizer.get_vocab():
            raise UserError(
                f"model.pad_token {model.pad_token!r} is not in the vocabulary of {path}.",
                mend=_pad_mend(tokenizer),
            )
        tokenizer.pad_token = model.pad_token
    if model.chat_template is not None:
        tokenizer.chat_template = _chat_template(model.chat_template)
        _try_chat_template(tokenizer)
    _check_special_tokens(tokenizer, path)
    return tokenizer


def _check_special_tokens(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{path}: the tokenizer has no EOS token, so no response could end.",
            mend="Set `eos_token` in its tokenizer_config.json.",
        )
    if tokenizer.pad_token_id is None:
        raise UserError(f"{path}: the tokenizer has no padding token.", mend=_pad_mend(tokenizer))
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"{path}: the tokenizer pads with its EOS token {tokenizer.eos_token!r}, which hides "
            "every EOS from training.",
            mend=_pad_mend(tokenizer),
        )


def _pad_mend(tokenizer: PreTrainedTokenizerBase) -> str:
    taken = (tokenizer.eos_token, tokenizer.bos_token)
    marked = [t for t in tokenizer.get_vocab() if re.fullmatch(r"[<\[].*[>\]]", t, re.DOTALL)]
    found: list[str] = []
    for pattern in PAD_LIKE:
        found += sorted(t for t in marked if re.search(pattern, t, re.IGNORECASE) and t not in (*taken, *found))
    if not found:
        return (
            "Set model.pad_token to a token of its vocabulary that the text never uses; none there "
            "looks like one, so add a padding token to the tokenizer and resize the model first."
        )
    names = ", ".join(repr(token) for token in found[:PAD_CANDIDATES])
    return f"Set model.pad_token to an unused token of its vocabulary, for example {names}."


def _chat_template(value: str) -> str:
    if "{" in value:
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"model.chat_template {value!r} is neither a Jinja template nor a readable file.",
            mend="Give the template itself or the path of a file that holds it.",
        ) from error


def _try_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    from jinja2 import TemplateError

    try:
        rendered = _render(tokenizer, ({"role": "user", "content": "Hello"},))
    except TemplateError as error:
        raise UserError(
            f"model.chat_template does not render one user message ({error}).",
            mend="Mend the template.",
        ) from error
    if "Hello" not in rendered:
        raise UserError(
            "model.chat_template leaves out the text of a user message.",
            mend="Print `message['content']` in it.",
        )


def _render(tokenizer: PreTrainedTokenizerBase, messages: tuple[Message, ...]) -> str:
    conversation = [dict(message) for message in messages]
    return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what makes two tokenizers interchangeable.

    It covers the vocabulary with its ids, the ids of BOS, EOS and padding, and how a probe text is
    encoded, which shows a different normaliser or merge table behind an equal vocabulary.
    """
    probe: Any = tokenizer(PROBE)["input_ids"]
    identity = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "probe": list(probe),
    }
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash of the chat template; None without one."""
    template = tokenizer.chat_template
    if not template:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def set_prompt_form(tokenizer: PreTrainedTokenizerBase, form: str) -> None:
    """Has every `Encoder` of this tokenizer, also once saved and loaded, put prompts into `form` at {prompt}."""
    if form.count(PROMPT_SLOT) != 1:
        raise ValueError(f"a prompt form has {PROMPT_SLOT} once, not {form!r}")
    tokenizer.init_kwargs[PROMPT_FORM] = form


class Encoder:
    """Renders prompts and responses as token ids, the same way in every stage.

    Prompt and response are tokenised apart and concatenated, so a response has the same tokens
    whether it is learnt from, scored or sampled. A text prompt gets the BOS token if the tokenizer
    adds one; a chat prompt is the chat template's output with its generation prompt and nothing
    else. A response is its own tokens, a leading space included, and EOS. A tokenizer with a prompt
    form (`set_prompt_form`) has text prompts, and the last message of chat prompts, put into it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int,
        max_response_tokens: int,
    ) -> None:
        eos: Any = tokenizer.eos_token_id
        if eos is None:
            raise ValueError("the tokenizer has no EOS token")
        pad: Any = tokenizer.pad_token_id
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.eos_token_id = int(eos)
        self.form: str = tokenizer.init_kwargs.get(PROMPT_FORM, PROMPT_SLOT)
        self._stops: set[int] = {eos, pad}
        probe: Any = tokenizer("a")["input_ids"]
        first = list(probe)[:1]
        adds_bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
        self.bos: tuple[int, ...] = tuple(first) if adds_bos else ()

    @property
    def pad_token_id(self) -> int:
        """Token that fills batches; masks, not this id, say what is padding."""
        pad: Any = self.tokenizer.pad_token_id
        return int(pad)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a response."""
        return (self.eos_token_id,)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Tokens of the prompt, whatever its length; limits are applied by `encode_prompts`."""
        return self.prompts_ids([prompt])[0]

    def prompts_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Tokens of many prompts, in one call of the tokenizer."""
        tokens = self.raw_ids([self._prompt_source_text(prompt) for prompt in prompts])
        return [
            self.with_bos(ids) if isinstance(prompt.content, str) else ids
            for prompt, ids in zip(prompts, tokens, strict=True)
        ]

    def response_ids(self, text: str) -> tuple[list[int], bool]:
        """Tokens of a response with EOS, and whether it was cut to `max_response_tokens`.

        A cut response has no EOS: it did not end there.
        """
        return self._cut(self.whole_responses_ids([text])[0], self.max_response_tokens)

    def whole_responses_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of many responses with EOS, before any cut."""
        return [self._with_eos(ids) for ids in self.raw_ids(texts)]

    def with_bos(self, ids: list[int]) -> list[int]:
        """The tokens behind a BOS, if the tokenizer adds one; never behind a second one."""
        return ids if tuple(ids[: len(self.bos)]) == self.bos else [*self.bos, *ids]

    def prompt_text(self, prompt: Prompt) -> str:
        """The prompt for judges and people: its text, a lone message's text, else a script."""
        if isinstance(prompt.content, str):
            return prompt.content
        if len(prompt.content) == 1:
            return prompt.content[0]["content"]
        return "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt.content)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of the tokens, without that of special tokens unless they are asked for."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return str(text)

    def raw_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of the texts and nothing else, neither BOS nor EOS."""
        if not texts:
            return []
        encoded: Any = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoded["input_ids"]

    def _prompt_source_text(self, prompt: Prompt) -> str:
        if isinstance(prompt.content, str):
            return self.form.replace(PROMPT_SLOT, prompt.content)
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise UserError(
                f"{prompt.source}: the prompt is a list of messages, but the tokenizer has no chat template.",
                mend="Set model.chat_template, or write the prompts as text.",
            )
        try:
            *before, last = prompt.content
            asked = {**last, "content": self.form.replace(PROMPT_SLOT, last["content"])}
            return _render(self.tokenizer, (*before, asked))
        except TemplateError as error:
            raise UserError(
                f"{prompt.source}: the chat template refuses this prompt ({error}).",
                mend="Change the roles of the messages or set model.chat_template.",
            ) from error

    def _with_eos(self, ids: list[int]) -> list[int]:
        return ids if ids[-1:] == [self.eos_token_id] else [*ids, self.eos_token_id]

    @staticmethod
    def _cut(ids: list[int], limit: int) -> tuple[list[int], bool]:
        return (ids[:limit], True) if len(ids) > limit else (ids, False)

    def tally(self, data: DataSection) -> LengthTally:
        """An empty tally with this encoder's limits."""
        return LengthTally(data, self.max_prompt_tokens, self.max_response_tokens, self.bos)

    def cut_response(self, ids: list[int], tally: LengthTally, limit: int = 0) -> list[int]:
        """The response within the limit (default `max_response_tokens`), counted in the tally."""
        cut, truncated = self._cut(ids, limit or self.max_response_tokens)
        tally.response(len(ids), truncated)
        if not self._stops.isdisjoint(ids[:-1]):
            tally.warnings[SPECIAL_INSIDE] += 1
        return cut


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt and its tokens."""

    prompt: Prompt
    ids: list[int]


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """A demonstration: `ids` = prompt + response; loss falls on `ids[response_start:]`."""

    ids: list[int]
    response_start: int
    """Length of the prompt; of a plain text row, the number of leading BOS tokens."""


@dataclass(frozen=True, slots=True)
class EncodedRanking:
    """A ranking: tokens of the prompt and of each of the K answers, with ranks and ratings."""

    prompt_ids: list[int]
    response_ids: list[list[int]]
    ranks: tuple[float, ...]
    ratings: tuple[float, ...] | None


def encode_prompts(
    prompts: Sequence[Prompt], encoder: Encoder, data: DataSection
) -> tuple[list[EncodedPrompt], LengthReport]:
    """Tokens of the prompts under `data.long_prompts`, and what that dropped or cut."""
    tally = encoder.tally(data)
    encoded = []
    for prompt, ids in zip(prompts, encoder.prompts_ids(prompts), strict=True):
        admitted = tally.admit(prompt, ids)
        if admitted is not None:
            encoded.append(EncodedPrompt(prompt, admitted))
    return encoded, tally.report(len(encoded))


def encode_sft(
    examples: Sequence[SftExample], encoder: Encoder, data: DataSection
) -> tuple[list[EncodedExample], LengthReport]:
    """Tokens of the demonstrations; a plain text row may be as long as a prompt and a response."""
    tally = encoder.tally(data)
    whole = encoder.max_prompt_tokens + encoder.max_response_tokens
    prompts = [example.prompt for example in examples if example.prompt is not None]
    prompts_ids = iter(encoder.prompts_ids(prompts))
    responses = encoder.whole_responses_ids([example.response for example in examples])
    encoded = []
    for example, response in zip(examples, responses, strict=True):
        if example.prompt is None:
            tally.rows += 1
            ids = encoder.cut_response(encoder.with_bos(response), tally, whole)
            encoded.append(EncodedExample(ids, len(encoder.bos)))
            continue
        prompt = tally.admit(example.prompt, next(prompts_ids))
        if prompt is not None:
            ids = prompt + encoder.cut_response(response, tally)
            encoded.append(EncodedExample(ids, len(prompt)))
    return encoded, tally.report(len(encoded))


def encode_rankings(
    rankings: Sequence[Ranking], encoder: Encoder, data: DataSection
) -> tuple[list[EncodedRanking], LengthReport]:
    """Tokens of the rankings; a dropped prompt takes its answers with it."""
    tally = encoder.tally(data)
    prompts_ids = encoder.prompts_ids([ranking.prompt for ranking in rankings])
    answers = iter(encoder.whole_responses_ids([text for r in rankings for text in r.responses]))
    encoded = []
    for ranking, ids in zip(rankings, prompts_ids, strict=True):
        whole = [next(answers) for _ in ranking.responses]
        prompt = tally.admit(ranking.prompt, ids)
        if prompt is None:
            continue
        responses = [encoder.cut_response(response, tally) for response in whole]
        rank_of: dict[tuple[int, ...], float] = {}
        pairs = zip(responses, ranking.ranks, strict=True)
        if any(rank_of.setdefault(tuple(response), rank) != rank for response, rank in pairs):
            tally.warnings[SAME_AFTER_CUT] += 1
        encoded.append(EncodedRanking(prompt, responses, ranking.ranks, ranking.ratings))
    return encoded, tally.report(len(encoded))
