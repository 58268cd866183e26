"""Token ids of pairs and labelled answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.encoding import EncodedLabelled, EncodedPair, encode_labelled, encode_pairs
from pipeline.errors import UserError
from pipeline.preferences import Pair
from pipeline.recipe import DataSection, ModelSection
from pipeline.records import LabelledResponse, Prompt
from pipeline.tokens import Encoder, load_tokenizer

BOS, EOS = 1, 2
FILM, LONG = Prompt("this film"), Prompt("x" * 40, "f:2")


@pytest.fixture(scope="module")
def encoder(tiny_tokenizer_dir: Path) -> Encoder:
    return Encoder(load_tokenizer(tiny_tokenizer_dir, ModelSection(name_or_path="unused")), 12, 8)


def plain(encoder: Encoder, text: str) -> list[int]:
    """Tokens of a text without special tokens, from the tokenizers library itself."""
    return encoder.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[attr-defined]


def test_pairs(encoder: Encoder) -> None:
    pairs = [
        Pair(FILM, " is", "x" * 9),
        Pair(LONG, "a", "b"),
        Pair(FILM, "x" * 9, "x" * 10),
        Pair(FILM, " was", "x" * 7),
    ]
    encoded, report = encode_pairs(pairs, encoder, DataSection())
    prompt = [BOS, *plain(encoder, "this film")]
    [x] = plain(encoder, "x")
    assert encoded == [
        EncodedPair(prompt, [*plain(encoder, " is"), EOS], [x] * 8, pairs[0]),
        EncodedPair(prompt, [*plain(encoder, " was"), EOS], [*[x] * 7, EOS], pairs[3]),
    ]
    assert (report.rows, report.kept, report.prompts_dropped) == (4, 2, 1)
    assert (report.responses, report.responses_truncated) == (6, 3)
    assert report.warnings == {"pairs left out because their answers are the same tokens, as a rule once truncated": 1}


def test_pairs_that_are_all_equal_once_truncated_are_refused(encoder: Encoder) -> None:
    pairs = [Pair(LONG, "a", "b"), Pair(FILM, "x" * 9, "x" * 10)]
    with pytest.raises(UserError, match=r"differ within data\.max_response_tokens = 8\. Raise"):
        encode_pairs(pairs, encoder, DataSection())
    with pytest.raises(UserError, match=r"all 1 prompts are over data\.max_prompt_tokens"):
        encode_pairs(pairs[:1], encoder, DataSection())


def test_labelled_answers(encoder: Encoder) -> None:
    rows = [
        LabelledResponse(FILM, " is", True),
        LabelledResponse(LONG, " was", False),
        LabelledResponse(FILM, "x" * 9, False),
    ]
    encoded, report = encode_labelled(rows, encoder, DataSection())
    prompt = [BOS, *plain(encoder, "this film")]
    assert encoded == [
        EncodedLabelled(prompt, [*plain(encoder, " is"), EOS], rows[0]),
        EncodedLabelled(prompt, plain(encoder, "x") * 8, rows[2]),
    ]
    assert (report.rows, report.kept, report.prompts_dropped, report.responses_truncated) == (3, 2, 1, 1)


def test_long_prompts_are_cut_on_the_left_on_request(encoder: Encoder) -> None:
    data = DataSection(long_prompts="truncate_left")
    [pair], _ = encode_pairs([Pair(LONG, "a", "b")], encoder, data)
    [row], _ = encode_labelled([LabelledResponse(LONG, "a", True)], encoder, data)
    assert pair.prompt_ids == row.prompt_ids == [BOS, *plain(encoder, "x") * 11]
