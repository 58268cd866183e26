"""A tiny real tokenizer, built once per run, for the tests that need token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

CORPUS = [
    "this film is a quiet wonder and the cast is splendid .",
    "the plot was dull , the jokes were old and the end came late .",
    "what is two plus two ? two plus two is four .",
    "system user assistant tool",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '[' + message['role'] + '] ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def save_tiny_tokenizer(directory: Path, *, pad: str | None = "<pad>", chat_template: str | None = None) -> Path:
    """Byte-level BPE of 300 tokens with `<s>`, `</s>`, `<pad>` and `<unused0>`; adds BOS only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>", "<unused0>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token=pad)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    return directory


def save_other_tokenizer(directory: Path, *, words: Sequence[str] | None = None) -> Path:
    """Byte-level BPE of 280 tokens without BOS whose EOS is 1 and padding 2; or `words` only, all else unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<end>", "<fill>"]
    if words is None:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        core.train_from_iterator(["quiet quiet wonder old old"], trainer)
    else:
        core = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *words])}, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<end>", pad_token="<fill>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def chat_template() -> str:
    """The chat template of `tiny_chat_tokenizer_dir`."""
    return CHAT_TEMPLATE


@pytest.fixture(scope="session")
def tokenizer_factory() -> Callable[..., Path]:
    """Saves further tokenizers: `tokenizer_factory(directory, pad="<pad>", chat_template=None)`."""
    return save_tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a fast tokenizer with distinct BOS, EOS and padding, without a chat template."""
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tiny-tokenizer"))


@pytest.fixture(scope="session")
def tiny_chat_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template that prints BOS, `[role] content` lines and `[assistant]`."""
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tiny-chat-tokenizer"), chat_template=CHAT_TEMPLATE)
