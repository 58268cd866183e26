"""Row forms: what each becomes, and what each refusal says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.formats import Row
from pipeline.records import LabelledResponse, Prompt, Ranking, RowError, SftExample
from pipeline.rows import FORMS, RowParser

U = {"role": "user", "content": "hi"}
A = {"role": "assistant", "content": "hello"}
B = {"role": "assistant", "content": "go away"}
S = {"role": "system", "content": "be kind"}
U2 = {"role": "user", "content": "and you?"}


def parse(kind: str, values: dict[str, Any]) -> list[Any]:
    return RowParser(kind, FORMS[kind]).parse(Row("f.jsonl:7", values))


SFT_ROWS: list[tuple[dict[str, Any], list[SftExample]]] = [
    ({"text": " a b "}, [SftExample(None, " a b ")]),
    ({"prompt": "p", "response": " r"}, [SftExample(Prompt("p"), " r")]),
    ({"prompt": "p", "completion": " r"}, [SftExample(Prompt("p"), " r")]),
    ({"prompt": [S, U], "response": "r"}, [SftExample(Prompt((S, U)), "r")]),
    ({"prompt": [U], "response": [A]}, [SftExample(Prompt((U,)), "hello")]),
    ({"messages": [S, U, A]}, [SftExample(Prompt((S, U)), "hello")]),
    (
        {"messages": [U, A, U2, B, U]},
        [SftExample(Prompt((U,)), "hello"), SftExample(Prompt((U, A, U2)), "go away")],
    ),
    ({"messages": [A, U, B]}, [SftExample(Prompt((A, U)), "go away")]),
    ({"messages": [U, A], "prompt": "hi"}, [SftExample(Prompt((U,)), "hello")]),
    (
        {"messages": [{**U, "name": None, "id": 3}, A]},
        [SftExample(Prompt((U,)), "hello")],
    ),
]


@pytest.mark.parametrize(("values", "expected"), SFT_ROWS)
def test_sft_forms(values: dict[str, Any], expected: list[SftExample]) -> None:
    examples = parse("sft", values)
    assert examples == expected
    assert {example.source for example in examples} == {"f.jsonl:7"}


def pair(prompt: Any, chosen: str = "hello", rejected: str = "go away") -> Ranking:
    return Ranking(Prompt(prompt), (chosen, rejected), (0.0, 1.0))


def label(prompt: Any, response: str, desirable: bool) -> LabelledResponse:
    return LabelledResponse(Prompt(prompt), response, desirable)


ASKED = "\n\nHuman: hi\n\nAssistant:"
ASKED_AGAIN = ASKED + " hello\n\nAll fine?\n\nHuman: and you?\n\nAssistant:"
PREFERENCE_ROWS: list[tuple[dict[str, Any], Ranking | LabelledResponse]] = [
    ({"prompt": "p", "chosen": " c", "rejected": " r"}, pair("p", " c", " r")),
    ({"prompt": "p", "chosen": [A], "rejected": [B]}, pair("p")),
    ({"prompt": [U], "chosen": [A], "rejected": [B]}, pair((U,))),
    ({"prompt": [S, U], "chosen": [S, U, A], "rejected": [S, U, B]}, pair((S, U))),
    ({"prompt": "hi", "chosen": [U, A], "rejected": [U, B]}, pair((U,))),
    ({"chosen": [U, A, U2, A], "rejected": [U, A, U2, B]}, pair((U, A, U2))),
    (
        {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 2},
        Ranking(Prompt("p"), ("c", "r"), (0.0, 1.0), (2.0, 0.0)),
    ),
    ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": None}, pair("p", "c", "r")),
    (
        {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 0, 1]},
        Ranking(Prompt("p"), ("a", "b", "c"), (1.0, 0.0, 1.0)),
    ),
    (
        {"prompt": [U], "responses": [[A], [B]], "ranks": [0, 3.5], "scores": [4, -1]},
        Ranking(Prompt((U,)), ("hello", "go away"), (0.0, 3.5), (4.0, -1.0)),
    ),
    (
        {"prompt": "p", "responses": ["a", "a", "b"], "ranks": [1, 1, 1]},
        Ranking(Prompt("p"), ("a", "a", "b"), (1.0, 1.0, 1.0)),
    ),
    # Anthropic/hh-rlhf: one turn, several turns, an answer of several paragraphs
    ({"chosen": ASKED + " hello", "rejected": ASKED + " go away"}, pair(ASKED, " hello", " go away")),
    ({"chosen": ASKED_AGAIN + " A\n\nB ", "rejected": ASKED_AGAIN + " C"}, pair(ASKED_AGAIN, " A\n\nB ", " C")),
    # HuggingFaceH4/ultrafeedback_binarized and trl-lib/ultrafeedback_binarized
    (
        {
            "prompt": "hi",
            "prompt_id": "ab12",
            "chosen": [U, A],
            "rejected": [U, B],
            "messages": [U, A],
            "score_chosen": 8.5,
            "score_rejected": 6,
        },
        Ranking(Prompt((U,)), ("hello", "go away"), (0.0, 1.0), (8.5, 6.0)),
    ),
    (
        {"chosen": [U, A], "rejected": [U, B], "score_chosen": 4.0, "score_rejected": 4.5},
        Ranking(Prompt((U,)), ("hello", "go away"), (0.0, 1.0), (4.0, 4.5)),
    ),
    (
        {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 2, "score_chosen": 7, "score_rejected": 6},
        Ranking(Prompt("p"), ("c", "r"), (0.0, 1.0), (2.0, 0.0)),
    ),
    (
        {"prompt": "p", "chosen": "c", "rejected": "r", "score_chosen": None, "score_rejected": None},
        pair("p", "c", "r"),
    ),
    # trl-lib/kto-mix-14k, and rows with `response`
    ({"prompt": "p", "completion": " r", "label": True}, label("p", " r", True)),
    ({"prompt": [S, U], "completion": [A], "label": False}, label((S, U), "hello", False)),
    ({"prompt": "p", "response": "r", "label": 1}, label("p", "r", True)),
    ({"prompt": "p", "response": "r", "label": 0}, label("p", "r", False)),
    ({"prompt": "p", "response": "r", "label": 1.0}, label("p", "r", True)),
]


@pytest.mark.parametrize(("values", "expected"), PREFERENCE_ROWS)
def test_preference_forms(values: dict[str, Any], expected: Ranking | LabelledResponse) -> None:
    [record] = parse("preferences", values)
    assert record == expected
    assert record.source == "f.jsonl:7"


TURNS = st.lists(st.text("ab \n:", min_size=1).filter(str.strip), min_size=2, max_size=7).filter(
    lambda t: len(t) % 2 == 0
)


@given(TURNS, st.text("cd \n:").map("c".__add__))
def test_a_transcript_is_cut_in_two_and_nothing_is_lost(turns: list[str], other: str) -> None:
    text = "".join(f"\n\n{('Human', 'Assistant')[i % 2]}:{turn}" for i, turn in enumerate(turns))
    rejected = text.removesuffix(turns[-1]) + other
    [ranking] = parse("preferences", {"chosen": text, "rejected": rejected, "id": 4})
    assert ranking.responses == (turns[-1], other)
    assert [ranking.prompt.content + answer for answer in ranking.responses] == [text, rejected]
    assert ranking.prompt.columns == {"id": 4}


def test_other_columns_go_with_the_prompt() -> None:
    [prompt] = parse("prompts", {"prompt": "p", "split": "eval", "topic": "x", "n": [1]})
    assert prompt.columns == {"topic": "x", "n": [1]}
    [ranking] = parse("preferences", {"id": 4, "prompt": "p", "chosen": "c", "rejected": "r"})
    assert ranking.prompt.columns == {"id": 4}


def test_a_multi_turn_conversation_is_counted() -> None:
    parser = RowParser("sft", FORMS["sft"])
    parser.parse(Row("f:1", {"messages": [U, A, U2, B]}))
    parser.parse(Row("f:2", {"messages": [U, A, U2]}))
    assert parser.tally == {
        "conversations": 2,
        "conversations_with_several_answers": 1,
        "unanswered_last_messages": 1,
    }


def test_a_column_nobody_reads_is_noted() -> None:
    parser = RowParser("preferences", FORMS["preferences"])
    parser.parse(Row("f:1", {"prompt": "p", "chosen": "c", "rejected": "r", "marign": 3}))
    assert parser.unused == {"marign"}


P = {"prompt": "p"}
PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
RANKED = {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}


def transcripts(chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"chosen": chosen, "rejected": rejected}


BAD_ROWS: list[tuple[str, dict[str, Any], list[str]]] = [
    # form
    (
        "sft",
        {"prompt": "p", "completions": "r"},
        ["prompt, completions", "Did you mean `response`"],
    ),
    ("sft", {"prompt": "p", "answer": "r"}, ["Did you mean `response` by `answer`"]),
    ("sft", {"promt": "p", "response": "r"}, ["Did you mean `prompt` by `promt`"]),
    ("sft", {"conversations": []}, ["Did you mean `messages`", "prompt/response", "text"]),
    ("sft", PAIR, ["looks like rows for data.preferences"]),
    ("sft", {"text": "t", "messages": [U, A]}, ["mix the forms text and messages"]),
    ("sft", {**P, "response": "r", "completion": "r"}, ["mix the forms"]),
    ("sft", {}, ["(none)", "no accepted form"]),
    ("preferences", {**PAIR, **RANKED}, ["mix the forms", "prompt/responses/ranks"]),
    ("preferences", {**P, "completions": ["a", "b"], "ranks": [0, 1]}, ["mean `responses`"]),
    ("prompts", {"question": "p"}, ["Did you mean `prompt` by `question`"]),
    # text fields
    ("sft", {"text": ""}, ["`text` is empty"]),
    ("sft", {"text": None}, ["`text` is null"]),
    ("sft", {**P, "response": 3}, ["`response` must be text, not '3'"]),
    ("sft", {**P, "response": " \n"}, ["`response` is empty"]),
    ("sft", {**P, "response": "x\ud800"}, ["`response` holds half a surrogate pair", "ud800"]),
    ("prompts", {"prompt": ""}, ["`prompt` is empty"]),
    ("preferences", {**PAIR, "chosen": ""}, ["`chosen` is empty"]),
    ("preferences", {**PAIR, "rejected": "c"}, ["`rejected` is the same answer", "'c'"]),
    # messages
    ("sft", {"messages": []}, ["`messages` must be a list of messages"]),
    ("sft", {"messages": "hi"}, ["must be a list of messages, not 'hi'"]),
    ("sft", {"messages": [U]}, ["no assistant message that answers a user"]),
    ("sft", {"messages": [S, A]}, ["no assistant message that answers a user"]),
    (
        "sft",
        {"messages": [U, {"role": "gpt", "content": "x"}]},
        ["`messages[1]`", "mean assistant"],
    ),
    ("sft", {"messages": [{"from": "human", "value": "x"}]}, ["`messages[0]`", "Rename `from`"]),
    ("sft", {"messages": [U, {"role": "assistant", "content": None}]}, ["`messages[1].content`"]),
    ("sft", {"messages": [U, {"role": "assistant", "content": " "}]}, ["[1].content` is empty"]),
    ("sft", {"messages": [U, {**A, "tool_calls": [{}]}]}, ["`messages[1]` has tool_calls"]),
    ("prompts", {"prompt": [U, A]}, ["ends with an assistant message", "hello"]),
    ("prompts", {"prompt": [{"role": "user", "content": ""}]}, ["only empty messages"]),
    # pairs as chats
    ("preferences", {"chosen": "c", "rejected": "r"}, ["when there is no `prompt` column", "'c'"]),
    ("preferences", {"chosen": [A], "rejected": [B]}, ["must be a conversation"]),
    ("preferences", {"chosen": [U, A], "rejected": [U2, B]}, ["`rejected` does not begin with"]),
    ("preferences", {"chosen": [U, A], "rejected": [U, B, U]}, ["`rejected` ends with a user"]),
    ("preferences", {"prompt": "ho", "chosen": [U, A], "rejected": [B]}, ["prompt 'ho'", "'hi'"]),
    (
        "preferences",
        {"prompt": [S], "chosen": [U, A], "rejected": [B]},
        ["`chosen` does not begin"],
    ),
    ("preferences", {**PAIR, "margin": "2"}, ["`margin` must be a finite number"]),
    ("preferences", {**PAIR, "margin": -1}, ["`margin` is negative (-1)"]),
    ("preferences", {**PAIR, "score_chosen": 3}, ["`score_rejected` must be a finite number, not 'None'"]),
    ("preferences", {**PAIR, "score_chosen": "3", "score_rejected": 2}, ["`score_chosen` must be a finite number"]),
    # transcripts
    ("preferences", transcripts("hello", "hello"), ["when there is no `prompt` column", "Human:"]),
    ("preferences", transcripts(ASKED + " a", ASKED + " a"), ["`rejected` is the same answer as `chosen`: 'a'"]),
    ("preferences", transcripts(ASKED + " a", ASKED + " \n"), ["`rejected (last turn)` is empty (' \\n')"]),
    ("preferences", transcripts(ASKED, ASKED + " a"), ["`chosen (last turn)` is empty ('')"]),
    ("preferences", transcripts(ASKED + " a", [U, A]), ["`rejected` must be text"]),
    (
        "preferences",
        transcripts(ASKED_AGAIN + " a", ASKED_AGAIN.replace("hello", "help me") + " b"),
        ["`rejected` differs from `chosen` before the last", "'p me All fine?", "'lo All fine?"],
    ),
    (
        "preferences",
        transcripts(ASKED_AGAIN + " a", ASKED + " b"),
        ["differs from `chosen` before the last", "'' where", "'hello All fine?"],
    ),
    ("preferences", transcripts(ASKED + " a\n\nHuman: b", ASKED + " c"), ["`chosen` is no transcript", "hi"]),
    ("preferences", transcripts("\n\nHuman: x" + ASKED + " a", ASKED + " b"), ["`chosen` is no transcript"]),
    (
        "preferences",
        transcripts("\n\nAssistant: a", "\n\nAssistant: b"),
        ["no transcript", "its turns are 'Assistant:'"],
    ),
    ("preferences", transcripts("x" + ASKED + " a", "x" + ASKED + " b"), ["no transcript", "begins 'x Human: hi"]),
    # labels
    (
        "preferences",
        {**P, "response": "r", "label": "true"},
        ["`label` must be the boolean", "not the text 'true'", "CSV"],
    ),
    ("preferences", {**P, "response": "r", "label": None}, ["`label` must be the boolean true or false, not 'None'"]),
    ("preferences", {**P, "response": "r", "label": 2}, ["`label` must be the boolean true or false, not '2'"]),
    ("preferences", {**P, "response": "r", "label": 0.5}, ["`label` must be the boolean true or false, not '0.5'"]),
    ("preferences", {**P, "completion": " ", "label": True}, ["`completion` is empty"]),
    ("preferences", {**P, "completion": "r", "desirable": True}, ["Did you mean `label` by `desirable`"]),
    ("preferences", {**P, "response": "r"}, ["looks like rows for data.sft"]),
    ("preferences", {**PAIR, "completion": "r", "label": True}, ["mix the forms"]),
    # rankings
    ("preferences", {**RANKED, "responses": ["a"], "ranks": [0]}, ["two or more answers"]),
    ("preferences", {**RANKED, "ranks": [0, 1, 2]}, ["`ranks` has 3 entries for 2 responses"]),
    ("preferences", {**RANKED, "ranks": [0]}, ["`ranks` has 1 entries for 2 responses"]),
    ("preferences", {**RANKED, "ranks": "01"}, ["`ranks` must be a list of numbers"]),
    ("preferences", {**RANKED, "ranks": [0, None]}, ["`ranks[1]` must be a finite number"]),
    ("preferences", {**RANKED, "ranks": [True, 1]}, ["`ranks[0]` must be a finite number"]),
    ("preferences", {**RANKED, "ranks": [0, float("nan")]}, ["`ranks[1]`", "nan"]),
    ("preferences", {**RANKED, "ranks": [0, float("inf")]}, ["`ranks[1]`", "inf"]),
    ("preferences", {**RANKED, "scores": [1]}, ["`scores` has 1 entries"]),
    ("preferences", {**RANKED, "responses": ["a", " "]}, ["`responses[1]` is empty"]),
    (
        "preferences",
        {**RANKED, "responses": ["x", "x"]},
        ["one answer with two ranks (0 and 1)", "'x'"],
    ),
]


@pytest.mark.parametrize(("kind", "values", "parts"), BAD_ROWS)
def test_refusals_name_place_field_and_excerpt(kind: str, values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(RowError) as caught:
        parse(kind, values)
    message = f"{caught.value} {caught.value.mend}"
    assert message.startswith("f.jsonl:7: ")
    for part in parts:
        assert part in message


def test_a_second_form_in_one_source_is_refused() -> None:
    parser = RowParser("sft", FORMS["sft"])
    parser.parse(Row("f:1", {"text": "a"}))
    with pytest.raises(RowError, match=r"f:2: is a messages row.*rows before it are text"):
        parser.parse(Row("f:2", {"messages": [U, A]}))
    parser = RowParser("preferences", FORMS["preferences"])
    parser.parse(Row("f:1", PAIR))
    with pytest.raises(RowError, match=r"f:2: is a prompt/completion/label row.*rows before it are prompt/chosen/rej"):
        parser.parse(Row("f:2", {**P, "completion": "r", "label": True}))


ANSWERS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=5)
RANKS = st.lists(st.one_of(st.integers(-2, 2), st.sampled_from([0.5, float("nan"), float("inf")])), max_size=5)


@given(ANSWERS, RANKS)
def test_a_ranking_is_taken_exactly_when_it_is_consistent(answers: list[str], ranks: list[float]) -> None:
    one_rank_each = len({(a, r) for a, r in zip(answers, ranks, strict=False)}) == len(set(answers))
    good = len(answers) >= 2 and len(ranks) == len(answers) and all(abs(rank) <= 2 for rank in ranks) and one_rank_each
    row = {"prompt": "p", "responses": answers, "ranks": ranks}
    if good:
        [ranking] = parse("preferences", row)
        assert ranking.responses == tuple(answers)
        assert ranking.ranks == tuple(ranks)
    else:
        with pytest.raises(RowError):
            parse("preferences", row)
