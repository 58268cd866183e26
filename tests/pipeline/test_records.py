"""Record types: identity of prompts, the part that splits them, pairs in a ranking."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.records import Message, Prompt, Ranking


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def chat(*turns: str) -> tuple[Message, ...]:
    """Messages from "u:text" shorthand."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return tuple(message(roles[turn[0]], turn[2:]) for turn in turns)


def test_key_is_the_text_or_sorted_json() -> None:
    assert Prompt("é  x ").key == "é  x "
    assert Prompt(({"role": "user", "content": "é"},)).key == '[{"content": "é", "role": "user"}]'
    assert Prompt(({"content": "é", "role": "user"},)).key == '[{"content": "é", "role": "user"}]'


def test_equality_ignores_place_and_columns() -> None:
    assert Prompt("a", "f:1", {"x": 1}) == Prompt("a", "f:2")
    assert hash(Prompt("a", "f:1", {"x": [1]})) == hash(Prompt("a"))
    assert Prompt(chat("u:a")) == Prompt(chat("u:a"), "f:9")
    assert Prompt("a") != Prompt("a ")
    assert len({Prompt(chat("u:a")), Prompt(chat("u:a")), Prompt(chat("u:b"))}) == 2


def test_split_key_stops_at_the_first_answered_turn() -> None:
    first = Prompt(chat("s:be brief", "u:hi"))
    later = Prompt(chat("s:be brief", "u:hi", "a:hello", "u:bye"))
    assert first.split_key == first.key
    assert later.split_key == first.key
    assert later.key != first.key


def test_split_key_of_a_conversation_that_begins_with_a_greeting() -> None:
    prompt = Prompt(chat("a:welcome", "u:hi"))
    assert prompt.split_key == prompt.key
    longer = Prompt(chat("a:welcome", "u:hi", "a:yes?", "u:x"))
    assert longer.split_key == prompt.key


@given(st.lists(st.sampled_from(["u:a", "u:b", "a:c", "t:d"]), min_size=1, max_size=6))
def test_every_later_prompt_of_a_conversation_has_the_first_one_s_split_key(
    turns: list[str],
) -> None:
    messages = chat("u:start", "a:answer", *turns)
    keys = {Prompt(messages[:end]).split_key for end in range(1, len(messages) + 1)}
    assert keys == {Prompt(chat("u:start")).key}


def test_split_key_of_a_transcript_stops_at_the_first_answer() -> None:
    first = "\n\nHuman: hi\n\nAssistant:"
    assert Prompt(first).split_key == first
    assert Prompt(first + " hello\n\nHuman: bye\n\nAssistant:").split_key == first
    assert Prompt("\n\nHuman: hi").split_key == "\n\nHuman: hi"
    quoted = "He wrote:" + first + " hello"
    assert Prompt(quoted).split_key == quoted


def test_pairs_of_a_ranking() -> None:
    ranking = Ranking(Prompt("p"), ("a", "b", "c", "d"), (0.0, 1.0, 1.0, 2.0))
    # (0,1) (0,1) (0,2) (1,2) (1,2) are ordered; (1,1) is the tie
    assert ranking.ordered_pairs() == 5
    assert ranking.tied_pairs() == 1
    tied = Ranking(Prompt("p"), ("a", "b", "c"), (1.0, 1.0, 1.0))
    assert (tied.ordered_pairs(), tied.tied_pairs()) == (0, 3)
