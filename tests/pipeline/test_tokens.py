"""Tokenizers, the rendering of prompts and responses, and the length report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.lengths import percentiles
from pipeline.recipe import DataSection, ModelSection
from pipeline.records import Prompt, Ranking, SftExample
from pipeline.tokens import (
    EncodedExample,
    EncodedRanking,
    Encoder,
    chat_template_sha256,
    encode_prompts,
    encode_rankings,
    encode_sft,
    load_tokenizer,
    tokenizer_sha256,
)

PAD, BOS, EOS = 0, 1, 2
DEMO_BASE = Path(__file__).parents[2] / "assets" / "demo-base"


def model(**keys: Any) -> ModelSection:
    return ModelSection(name_or_path="unused", **keys)


@pytest.fixture(scope="module")
def encoder(tiny_tokenizer_dir: Path) -> Encoder:
    return Encoder(load_tokenizer(tiny_tokenizer_dir, model()), 12, 8)


@pytest.fixture(scope="module")
def chat_encoder(tiny_chat_tokenizer_dir: Path) -> Encoder:
    return Encoder(load_tokenizer(tiny_chat_tokenizer_dir, model()), 64, 8)


def plain(encoder: Encoder, text: str) -> list[int]:
    """Tokens of a text without special tokens, from the tokenizers library itself."""
    return encoder.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[attr-defined]


def test_text_prompt_is_bos_and_tokens(encoder: Encoder) -> None:
    assert encoder.prompt_ids(Prompt("this film")) == [BOS, *plain(encoder, "this film")]
    assert encoder.prompt_ids(Prompt("<s>this film")) == [BOS, *plain(encoder, "this film")]
    assert encoder.stop_token_ids == (EOS,)


def test_response_is_tokens_and_eos(encoder: Encoder) -> None:
    assert encoder.response_ids(" is") == ([*plain(encoder, " is"), EOS], False)
    assert encoder.response_ids(" is")[0] != encoder.response_ids("is")[0]
    assert encoder.response_ids(" is</s>") == ([*plain(encoder, " is"), EOS], False)


def test_a_long_response_is_cut_without_eos(encoder: Encoder) -> None:
    text = "x" * 7
    assert plain(encoder, text) == plain(encoder, "x") * 7
    assert encoder.response_ids("x" * 7) == ([*plain(encoder, "x" * 7), EOS], False)
    assert encoder.response_ids("x" * 8) == (plain(encoder, "x" * 8), True)
    assert encoder.response_ids("x" * 9) == (plain(encoder, "x" * 8), True)


def test_chat_prompt_is_the_template_with_one_bos(chat_encoder: Encoder) -> None:
    prompt = Prompt(({"role": "system", "content": "be"}, {"role": "user", "content": "hi"}))
    rendered = "[system] be\n[user] hi\n[assistant]"
    assert chat_encoder.prompt_ids(prompt) == [BOS, *plain(chat_encoder, rendered)]
    theirs: Any = chat_encoder.tokenizer.apply_chat_template(
        [dict(m) for m in prompt.content if not isinstance(m, str)], add_generation_prompt=True
    )
    assert chat_encoder.prompt_ids(prompt) == theirs["input_ids"]


def test_text_for_people(chat_encoder: Encoder) -> None:
    user = {"role": "user", "content": "hi"}
    assert chat_encoder.prompt_text(Prompt(" as it is ")) == " as it is "
    assert chat_encoder.prompt_text(Prompt((user,))) == "hi"
    two = Prompt(({"role": "system", "content": "be"}, user))
    assert chat_encoder.prompt_text(two) == "system: be\n\nuser: hi"


def test_messages_without_a_template_are_refused(encoder: Encoder) -> None:
    with pytest.raises(UserError, match=r"f:3: .*no chat template.*model\.chat_template"):
        encoder.prompt_ids(Prompt(({"role": "user", "content": "hi"},), "f:3"))


def test_a_template_that_refuses_names_the_row(tiny_tokenizer_dir: Path) -> None:
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ messages[0]['content'] }}"
    )
    encoder = Encoder(load_tokenizer(tiny_tokenizer_dir, model(chat_template=strict)), 64, 8)
    messages = ({"role": "system", "content": "a"}, {"role": "user", "content": "b"})
    with pytest.raises(UserError, match=r"f:3: .*refuses this prompt \(no system\)"):
        encoder.prompt_ids(Prompt(messages, "f:3"))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@given(TEXTS, TEXTS)
def test_round_trip(encoder: Encoder, prompt: str, response: str) -> None:
    """Byte-level BPE loses nothing: prompt and response decode to themselves, apart or joined."""
    long = Encoder(encoder.tokenizer, 1000, 1000)
    prompt_ids = long.prompt_ids(Prompt(prompt))
    response_ids, truncated = long.response_ids(response)
    assert not truncated
    assert prompt_ids[0] == BOS
    assert response_ids[-1] == EOS
    assert BOS not in prompt_ids[1:]
    assert EOS not in response_ids[:-1]
    assert long.decode(response_ids) == response
    assert long.decode(prompt_ids + response_ids) == prompt + response


@pytest.mark.skipif(not (DEMO_BASE / "tokenizer.json").is_file(), reason="the demo base model is not there")
def test_the_demo_base_tokenizer() -> None:
    encoder = Encoder(load_tokenizer(DEMO_BASE, model()), 100, 100)
    for text in ("this movie is", " a quiet , well made film ."):
        ids, truncated = encoder.response_ids(text)
        assert not truncated
        assert ids[-1:] == list(encoder.stop_token_ids)
        assert encoder.decode(ids) == text
        assert encoder.decode(encoder.prompt_ids(Prompt(text))) == text


def test_pad_token_is_checked(tmp_path: Path, tokenizer_factory: Callable[..., Path]) -> None:
    same = tokenizer_factory(tmp_path / "same", pad="</s>")
    with pytest.raises(UserError, match=r"pads with its EOS token '</s>'.*example '<pad>', '<unused0>'"):
        load_tokenizer(same, model())
    assert load_tokenizer(same, model(pad_token="<unused0>")).pad_token_id == 3
    with pytest.raises(UserError, match=r"model\.pad_token '<nope>' is not in the vocabulary"):
        load_tokenizer(same, model(pad_token="<nope>"))
    none = tokenizer_factory(tmp_path / "none", pad=None)
    with pytest.raises(UserError, match=r"has no padding token\. Set model\.pad_token"):
        load_tokenizer(none, model())
    assert load_tokenizer(none, model(pad_token="<pad>")).pad_token_id == PAD


def test_a_missing_eos_is_refused(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    for file in tiny_tokenizer_dir.iterdir():
        text = file.read_text(encoding="utf-8")
        if file.name == "tokenizer_config.json":
            config = json.loads(text)
            del config["eos_token"]
            text = json.dumps(config)
        (tmp_path / file.name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="no EOS token"):
        load_tokenizer(tmp_path, model())


def test_a_directory_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer could be loaded from here"):
        load_tokenizer(tmp_path, model())
    with pytest.raises(UserError, match=r"missing does not exist"):
        load_tokenizer(tmp_path / "missing", model())


def test_chat_template_from_text_or_file(tiny_tokenizer_dir: Path, tmp_path: Path, chat_template: str) -> None:
    (tmp_path / "chat.jinja").write_text(chat_template)
    by_text = load_tokenizer(tiny_tokenizer_dir, model(chat_template=chat_template))
    by_file = load_tokenizer(tiny_tokenizer_dir, model(chat_template=str(tmp_path / "chat.jinja")))
    assert by_text.chat_template == by_file.chat_template == chat_template
    with pytest.raises(UserError, match="neither a Jinja template nor a readable file"):
        load_tokenizer(tiny_tokenizer_dir, model(chat_template="missing.jinja"))
    with pytest.raises(UserError, match="does not render one user message"):
        load_tokenizer(tiny_tokenizer_dir, model(chat_template="{% if %}"))
    with pytest.raises(UserError, match="leaves out the text"):
        load_tokenizer(tiny_tokenizer_dir, model(chat_template="{{ bos_token }}"))


def test_hashes_tell_tokenizers_apart(
    tiny_tokenizer_dir: Path,
    tmp_path: Path,
    chat_template: str,
    tokenizer_factory: Callable[..., Path],
) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_dir, model())
    again = load_tokenizer(tokenizer_factory(tmp_path / "again"), model())
    assert tokenizer_sha256(tokenizer) == tokenizer_sha256(again)
    padded = load_tokenizer(tiny_tokenizer_dir, model(pad_token="<unused0>"))
    assert tokenizer_sha256(tokenizer) != tokenizer_sha256(padded)
    again.add_tokens(["zzzz"])
    assert tokenizer_sha256(tokenizer) != tokenizer_sha256(again)
    assert chat_template_sha256(tokenizer) is None
    tokenizer.chat_template = chat_template
    assert chat_template_sha256(tokenizer) is not None


def test_percentiles_are_nearest_rank() -> None:
    assert percentiles([]) == {}
    assert percentiles([5]) == {"min": 5, "p50": 5, "p90": 5, "p99": 5, "max": 5}
    hundred = percentiles(range(100, 0, -1))
    assert hundred == {"min": 1, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    assert percentiles([1, 2, 3])["p50"] == 2


def x(count: int) -> str:
    """A text of that many tokens: no two x are merged."""
    return "x" * count


PROMPTS = [Prompt(x(11), "f:1"), Prompt(x(12), "f:2"), Prompt("y" + x(19), "f:3")]


def test_long_prompts_are_dropped_and_counted(encoder: Encoder) -> None:
    encoded, report = encode_prompts(PROMPTS, encoder, DataSection(long_prompts="drop"))
    assert [e.prompt.source for e in encoded] == ["f:1"]
    assert len(encoded[0].ids) == 12
    assert (report.rows, report.kept, report.prompts_dropped) == (3, 1, 2)
    assert report.prompts_truncated == 0
    assert report.dropped_sources == ("f:2", "f:3")
    assert report.prompt_tokens["max"] == 21
    assert any("limit 12: 2 dropped, 0 truncated of 3" in line for line in report.lines())
    assert json.loads(json.dumps(report.as_dict()))["prompts_dropped"] == 2


def test_long_prompts_are_cut_on_the_left_behind_bos(encoder: Encoder) -> None:
    data = DataSection(long_prompts="truncate_left")
    encoded, report = encode_prompts(PROMPTS, encoder, data)
    [token] = plain(encoder, "x")
    assert [e.ids for e in encoded] == [[BOS] + [token] * 11] * 3
    assert (report.kept, report.prompts_dropped, report.prompts_truncated) == (3, 0, 2)


def test_long_prompts_are_an_error_on_request(encoder: Encoder) -> None:
    with pytest.raises(UserError, match=r"f:2: the prompt has 13 tokens, over data\.max_prompt"):
        encode_prompts(PROMPTS, encoder, DataSection(long_prompts="error"))


def test_nothing_left_is_an_error(encoder: Encoder) -> None:
    with pytest.raises(UserError, match=r"all 2 prompts are over data\.max_prompt_tokens = 12"):
        encode_prompts(PROMPTS[1:], encoder, DataSection())


def test_a_prompt_that_ends_in_a_space_is_reported(encoder: Encoder) -> None:
    prompts = [Prompt("this film "), Prompt("this film")]
    _, report = encode_prompts(prompts, encoder, DataSection())
    assert list(report.warnings.values()) == [1]
    assert any(line.startswith("warning: 1 prompts end in a space") for line in report.lines())


def test_sft_examples(encoder: Encoder) -> None:
    examples = [
        SftExample(Prompt("this film"), " is"),
        SftExample(Prompt(x(30), "f:2"), " dropped"),
        SftExample(None, x(18)),
        SftExample(None, x(25)),
        SftExample(Prompt("this film"), x(9)),
    ]
    encoded, report = encode_sft(examples, encoder, DataSection())
    prompt = [BOS, *plain(encoder, "this film")]
    [token] = plain(encoder, "x")
    assert encoded == [
        EncodedExample([*prompt, *plain(encoder, " is"), EOS], len(prompt)),
        EncodedExample([BOS] + [token] * 18 + [EOS], 1),
        EncodedExample([BOS] + [token] * 19, 1),
        EncodedExample(prompt + [token] * 8, len(prompt)),
    ]
    assert (report.rows, report.kept, report.prompts_dropped) == (5, 4, 1)
    assert (report.responses, report.responses_truncated) == (4, 2)
    assert report.response_tokens["max"] == 27


def test_rankings(encoder: Encoder) -> None:
    rankings = [
        Ranking(Prompt("this film"), (" is", x(9), " was"), (0.0, 1.0, 1.0), (3.0, 1.0, 1.0)),
        Ranking(Prompt(x(40), "f:2"), ("a", "b"), (0.0, 1.0)),
        Ranking(Prompt("the plot"), (x(9), x(10)), (0.0, 1.0)),
    ]
    encoded, report = encode_rankings(rankings, encoder, DataSection())
    [token] = plain(encoder, "x")
    assert encoded[0] == EncodedRanking(
        [BOS, *plain(encoder, "this film")],
        [[*plain(encoder, " is"), EOS], [token] * 8, [*plain(encoder, " was"), EOS]],
        (0.0, 1.0, 1.0),
        (3.0, 1.0, 1.0),
    )
    assert encoded[1].response_ids == [[token] * 8] * 2
    assert len(encoded) == 2
    assert (report.responses, report.responses_truncated) == (5, 3)
    assert report.warnings == {"rankings have answers of different rank that are equal once truncated": 1}


def test_special_tokens_inside_a_response_are_reported(encoder: Encoder) -> None:
    examples = [SftExample(Prompt("p"), "a</s>b"), SftExample(Prompt("p"), "a</s>")]
    _, report = encode_sft(examples, encoder, DataSection())
    assert report.warnings == {"responses hold the text of an EOS or padding token": 1}
