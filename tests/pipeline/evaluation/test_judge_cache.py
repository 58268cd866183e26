"""The cache of answers: what survives a cut line, what is refused, who may hold it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.evaluation.judge_cache import Reply, cache_key, open_cache

LINE = '{"key": "%s", "text": "%s", "finish": "stop", "prompt_tokens": 3, "completion_tokens": 1, "contest": "x"}\n'
ONE, TWO = Reply("A\nü", "stop", 3, 1), Reply("", None, None, None)


def test_answers_come_back_whole(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "x.jsonl"
    with open_cache(file) as cache:
        cache.put("one", ONE, {"contest": "c"})
        cache.put("two", TWO, {})
        assert (cache.get("one"), cache.was_there("one"), cache.get("three")) == (ONE, False, None)
    with open_cache(file) as cache:
        assert (cache.get("one"), cache.get("two"), cache.was_there("one")) == (ONE, TWO, True)
    assert file.read_text().startswith('{"key": "one", "text": "A\\n\\u00fc", "finish": "stop", "prompt_tokens": 3')


@pytest.mark.parametrize("cut", ['{"key": "tw', LINE[:-1] % ("two", "B"), "\0\0\0"])
def test_a_last_line_that_was_cut_is_dropped(tmp_path: Path, cut: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(LINE % ("one", "A") + cut)
    with open_cache(file) as cache:
        assert cache.get("one") == Reply("A", "stop", 3, 1)
        assert cache.get("two") is None
        cache.put("two", TWO, {})
    with open_cache(file) as cache:
        assert cache.get("two") == TWO
    assert len(file.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "damaged",
    [
        '{"key": "tw\n',
        "\n",
        "[1]\n",
        '{"key": "two"}\n',
        '{"key": "k", "text": null, "finish": null, "prompt_tokens": 1, "completion_tokens": 1}\n',
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, damaged: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(LINE % ("one", "A") + damaged + LINE % ("three", "B"))
    with pytest.raises(UserError, match=r"x\.jsonl:2: .*Remove the line"), open_cache(file):
        pass


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    refusal = pytest.raises(UserError, match=r"x\.jsonl: another process asks this judge")
    with open_cache(file), refusal, open_cache(file):
        pass
    with open_cache(file):
        pass


def test_a_key_is_that_of_address_and_request() -> None:
    request = {"model": "m", "messages": [{"role": "user", "content": "q"}], "temperature": 0.0}
    key = cache_key("http://h/v1", request)
    assert cache_key("http://h/v1/", dict(reversed(request.items()))) == key
    others = [{**request, "model": "n"}, {**request, "temperature": 0.5}, {**request, "seed": 1}]
    assert len({key, cache_key("http://i/v1", request), *(cache_key("http://h/v1", other) for other in others)}) == 5
