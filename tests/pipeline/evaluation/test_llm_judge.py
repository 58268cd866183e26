"""A language model as the judge, asked over HTTP: verdicts in both orders, what is kept, what is counted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.evaluation.contests import EQUAL, Contest, PairwiseJudge
from pipeline.evaluation.judges import load_judges, load_pairwise_judges
from pipeline.evaluation.llm_judge import IS_TOO_LONG, NO_VERDICT, ChatJudge
from pipeline.recipe import EvalSection
from tests.pipeline.evaluation.chat_server import Request, Response, chat_server, refuses, says

TEMPLATE = "{criterion}\nP={prompt}\nA={a}\nB={b}\n"


def contests(count: int, a: str = "long{}!", b: str = "b{}") -> list[Contest]:
    return [Contest(i, 0, 0, "dpo", "sft", f"prompt {i}", a.format(i), b.format(i)) for i in range(count)]


def texts(request: Request) -> tuple[str, str]:
    found = re.search(r"\nA=(.*)\nB=(.*)\n", request.question)
    assert found
    return found[1], found[2]


def longer(request: Request) -> Response:
    """A judge without a bias: the longer answer wins."""
    first, second = texts(request)
    return says("Verdict: " + ("A" if len(first) > len(second) else "B" if len(second) > len(first) else "TIE"))


def judge_at(url: str, folder: Path, **keys: Any) -> ChatJudge:
    settings = {"base_url": url, "model": "m", "template": TEMPLATE, "criterion": "length", "retries": 2, **keys}
    section = EvalSection.model_validate({"judges": {"x": {"llm": settings}}})
    llm = section.judges["x"].llm
    assert llm is not None
    return ChatJudge("x", llm, folder, print, backoff_seconds=0.02)


def test_both_orders_are_asked_and_averaged(tmp_path: Path) -> None:
    cases = [*contests(2), *contests(1, "b{}", "long{}"), *contests(1, "same", "same"), *contests(1, "aa", "bb")]
    with chat_server(longer) as server:
        judge = judge_at(server.url, tmp_path, temperature=0.5, request={"top_p": 0.9})
        decisions = judge.decide(cases)
    assert [decision.contest for decision in decisions] == cases
    assert [decision.outcome for decision in decisions] == [1.0, 1.0, 0.0, 0.5, 0.5]
    assert [d.orders for d in decisions] == [("a", "a"), ("a", "a"), ("b", "b"), None, ("tie", "tie")]
    assert decisions[3].reason == EQUAL
    asked = {request.question for request in server.requests}
    assert len(asked) == len(server.requests) == 8
    assert {"length\nP=prompt 0\nA=long0!\nB=b0\n", "length\nP=prompt 0\nA=b0\nB=long0!\n"} <= asked
    sent = {k: v for k, v in server.requests[0].body.items() if k != "messages"}
    assert sent == {"model": "m", "temperature": 0.5, "max_tokens": 512, "top_p": 0.9}


def test_a_judge_that_goes_by_position_comes_out_at_a_half(tmp_path: Path) -> None:
    """Always "A": each contest is a tie, whatever is in it, and the bias is told."""
    with chat_server(lambda _: says("A")) as server:
        judge = judge_at(server.url, tmp_path)
        decisions = judge.decide(contests(10))
    assert [(d.outcome, d.orders) for d in decisions] == [(0.5, ("a", "b"))] * 10
    bias = {"contests": 10, "first_in_both": 1.0, "second_in_both": 0.0, "first_shown_wins": 1.0}
    assert judge.details()["position_bias"] == bias


def test_position_bias_by_hand(tmp_path: Path) -> None:
    """Contests a-a, B-B (second twice), tie then b: verdicts for the first place 1, 0; 0, 0; 1/2, 1 of six."""
    script = {"0": ("A", "B"), "1": ("B", "B"), "2": ("TIE", "A")}

    def behave(request: Request) -> Response:
        first, second = texts(request)
        straight = first.startswith("long")
        return says(script[(first if straight else second)[4]][0 if straight else 1])

    with chat_server(behave) as server:
        judge = judge_at(server.url, tmp_path)
        decisions = judge.decide(contests(3))
    assert [(d.orders, d.outcome) for d in decisions] == [
        (("a", "a"), 1.0), (("b", "a"), 0.5), (("tie", "b"), 0.25)
    ]  # fmt: skip
    assert judge.details()["position_bias"] == {
        "contests": 3, "first_in_both": 0.0, "second_in_both": 1 / 3, "first_shown_wins": 2.5 / 6
    }  # fmt: skip


def test_an_answer_without_a_verdict_is_asked_again_in_the_same_conversation(tmp_path: Path) -> None:
    def behave(request: Request) -> Response:
        return says("Both have merits.") if len(request.body["messages"]) == 1 else longer(request)

    with chat_server(behave) as server:
        judge = judge_at(server.url, tmp_path)
        assert [d.outcome for d in judge.decide(contests(3))] == [1.0] * 3
        assert len(server.requests) == 12
        roles = [message["role"] for message in server.requests[-1].body["messages"]]
        assert roles == ["user", "assistant", "user"]
        assert server.requests[-1].body["messages"][1]["content"] == "Both have merits."


def test_a_contest_that_stays_without_a_verdict_has_no_outcome(tmp_path: Path) -> None:
    """Contest 1 never gets one: three tries in the first order, none in the other; nor is it asked in a second run."""

    def behave(request: Request) -> Response:
        return says(None) if "prompt 1\n" in request.question else longer(request)

    with chat_server(behave) as server:
        judge = judge_at(server.url, tmp_path)
        decisions = judge.decide(contests(3))
        assert len(server.requests) == 2 + 3 + 2
        assert [(d.outcome, d.reason) for d in decisions] == [(1.0, ""), (None, NO_VERDICT), (1.0, "")]
        assert judge.details()["undecided"] == 1
        again = judge_at(server.url, tmp_path)
        assert again.decide(contests(3)) == decisions
        assert len(server.requests) == 7
        assert again.details() == judge.details()


def test_an_answer_that_was_cut_off_is_no_verdict(tmp_path: Path) -> None:
    """It ends at a heading here, before the judge has come to its point."""

    def behave(request: Request) -> Response:
        first = len(request.body["messages"]) == 1
        return says("Let me compare them.\n\n**Answer A**", finish_reason="length") if first else longer(request)

    with chat_server(behave) as server:
        assert [d.outcome for d in judge_at(server.url, tmp_path).decide(contests(2))] == [1.0] * 2
        assert len(server.requests) == 8


def test_a_conversation_that_outgrows_the_judge_was_no_question_too_long(tmp_path: Path) -> None:
    def behave(request: Request) -> Response:
        if "prompt 0\n" not in request.question:
            return longer(request)
        again = len(request.body["messages"]) > 1
        return refuses(400, "maximum context length is 9 tokens") if again else says("Hard to say.")

    with chat_server(behave) as server:
        judge = judge_at(server.url, tmp_path)
        assert [(d.outcome, d.reason) for d in judge.decide(contests(2))] == [(None, NO_VERDICT), (1.0, "")]
    assert judge.details()["too_long"] == 0


def test_a_prompt_too_long_for_the_judge_has_no_outcome(tmp_path: Path) -> None:
    def behave(request: Request) -> Response:
        long = "prompt 0\n" in request.question
        return refuses(400, "This model's maximum context length is 9 tokens.") if long else longer(request)

    with chat_server(behave) as server:
        judge = judge_at(server.url, tmp_path)
        assert [(d.outcome, d.reason) for d in judge.decide(contests(2))] == [(None, IS_TOO_LONG), (1.0, "")]
        assert len(server.requests) == 3
    assert judge.details()["too_long"] == 1


def test_a_judge_without_any_verdict_is_given_up(tmp_path: Path) -> None:
    with chat_server(lambda _: says("I would rather not say.")) as server:
        with pytest.raises(
            UserError, match=r"eval\.judges\.x\.llm: m came to a verdict on none of 20 .*'I would rather"
        ):
            judge_at(server.url, tmp_path, retries=0, concurrency=1).decide(contests(100))
        assert len(server.requests) == 20


def test_costs_count_tokens_and_money_and_what_this_process_paid(tmp_path: Path) -> None:
    """Six answers of 100 and 7 tokens, at 2 and 10 a million: 0.0012 + 0.00042; one of them tells no tokens."""

    def behave(request: Request) -> Response:
        return says("A", None) if request.question == "length\nP=prompt 0\nA=b0\nB=long0!\n" else says("A")

    prices = {"price_per_million_input_tokens": 2, "price_per_million_output_tokens": 10}
    spent = {"prompt_tokens": 500, "completion_tokens": 35, "money": pytest.approx(0.00135), "tokens_untold": 1}
    with chat_server(behave) as server:
        first = judge_at(server.url, tmp_path, **prices)
        first.decide(contests(3))
        costs = first.costs()
        assert {key: costs[key] for key in ("requests", "cached", *spent)} == {"requests": 6, "cached": 0, **spent}
        assert costs["now"] == {"requests": 6, "retries": 0, **spent}
        again = judge_at(server.url, tmp_path, **prices)
        again.decide([*contests(3), *contests(3)[:1]])
        costs = again.costs()
        nothing = {"prompt_tokens": 0, "completion_tokens": 0, "money": 0.0, "tokens_untold": 0}
        assert {key: costs[key] for key in ("requests", "cached", *spent)} == {"requests": 6, "cached": 6, **spent}
        assert costs["now"] == {"requests": 0, "retries": 0, **nothing}
    unpriced = judge_at(server.url, tmp_path)
    unpriced.decide(contests(3))
    assert unpriced.costs()["money"] is None


def test_the_same_question_of_two_contests_is_asked_once(tmp_path: Path) -> None:
    """Other methods, other seed, sides changed: the texts are the same, and the judge sees nothing else."""
    swapped = Contest(0, 0, 3, "sft", "kto", "prompt 0", "b0", "long0!")
    with chat_server(longer) as server:
        decisions = judge_at(server.url, tmp_path).decide([*contests(1), swapped, *contests(1)])
        assert len(server.requests) == 2
    assert [decision.outcome for decision in decisions] == [1.0, 0.0, 1.0]


def test_requests_go_out_side_by_side_and_results_keep_their_order(tmp_path: Path) -> None:
    def behave(request: Request) -> Response:
        time.sleep(0.01 * (7 - request.number % 7))
        return longer(request)

    mixed = [c for i in range(12) for c in (contests(12)[i], contests(12, "b{}", "long{}!")[i])]
    with chat_server(behave) as server:
        decisions = judge_at(server.url, tmp_path, concurrency=5).decide(mixed)
        assert server.busiest == 5
    assert [decision.outcome for decision in decisions] == [1.0, 0.0] * 12


@pytest.mark.parametrize("change", ["model", "temperature", "criterion", "request"])
def test_a_changed_judge_is_asked_anew(tmp_path: Path, change: str) -> None:
    changed = {"model": "n", "temperature": 0.1, "criterion": "brevity", "request": {"top_p": 0.5}}
    with chat_server(longer) as server:
        judge_at(server.url, tmp_path).decide(contests(1))
        judge_at(server.url, tmp_path, **{change: changed[change]}).decide(contests(1))
        assert len(server.requests) == 4


def test_a_half_written_answer_is_asked_again_and_nothing_else(tmp_path: Path) -> None:
    with chat_server(longer) as server:
        judge_at(server.url, tmp_path, concurrency=1).decide(contests(3))
        file = tmp_path / "x.answers.jsonl"
        whole = file.read_text()
        file.write_text(whole[:-20])
        assert [d.outcome for d in judge_at(server.url, tmp_path, concurrency=1).decide(contests(3))] == [1.0] * 3
        assert len(server.requests) == 7
        assert file.read_text() == whole


def test_what_was_decided_before_a_failure_is_kept(tmp_path: Path) -> None:
    """The server fails from its fifth request on; the same command, once it is mended, asks what is missing."""
    with chat_server(
        lambda request: longer(request) if request.number < 5 else refuses(500, "out of memory")
    ) as server:
        with pytest.raises(UserError, match=r"answered 500: out of memory, tried 3 times\..*same command"):
            judge_at(server.url, tmp_path, concurrency=1).decide(contests(6))
        port = server.server_port
    with chat_server(longer, port) as server:
        judge = judge_at(server.url, tmp_path)
        assert [decision.outcome for decision in judge.decide(contests(6))] == [1.0] * 6
        assert len(server.requests) == 12 - 5
    assert judge.costs()["cached"] == 5


CHILD = """\
import sys
from pathlib import Path
from tests.pipeline.evaluation.test_llm_judge import contests, judge_at
judge_at(sys.argv[1], Path(sys.argv[2]), concurrency=2).decide(contests(6))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, number: signal.Signals) -> None:
    """Interrupted while two requests hang: it ends at once, and the next run asks for what is not in the cache."""

    def behave(request: Request) -> Response:
        return longer(request) if request.number < 4 else Response("", hangs=True)

    with chat_server(behave) as server:
        command = [sys.executable, "-c", CHILD, server.url, str(tmp_path)]
        child = subprocess.Popen(
            command, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        )
        try:
            deadline = time.monotonic() + 60
            while len(server.requests) < 6 and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            child.send_signal(number)
            sent_at = time.monotonic()
            _, errors = child.communicate(timeout=30)
        finally:
            child.kill()
        assert len(server.requests) == 6, errors.decode()
        assert time.monotonic() - sent_at < 5
        assert child.returncode
        server.behave = longer
        server.requests.clear()
        assert [d.outcome for d in judge_at(server.url, tmp_path).decide(contests(6))] == [1.0] * 6
        assert len(server.requests) == 12 - 4


def test_the_recipe_s_judges_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("length_judge_of_llm.py").write_text(
        textwrap.dedent("""
            def characters(prompts, responses):
                return [float(len(response)) for response in responses]
        """)
    )
    section = EvalSection.model_validate(
        {
            "judges": {
                "plain": {"function": "length_judge_of_llm:characters"},
                "model": {"llm": {"base_url": "http://127.0.0.1:1/v1", "model": "m", "pairs": "all", "prompts": 3}},
                "people": {"votes": "votes.csv"},
            }
        }
    )
    assert list(load_judges(section)) == ["plain"]
    judges: dict[str, PairwiseJudge] = load_pairwise_judges(section, tmp_path / "judges", print)
    assert [(judge.name, judge.kind) for judge in judges.values()] == [("model", "llm"), ("people", "votes")]
    assert vars(judges["model"].selection) == {"pairs": "all", "prompts": 3, "samples_per_prompt": 1}
    assert not (tmp_path / "judges").exists()


def test_details_are_json(tmp_path: Path) -> None:
    with chat_server(longer) as server:
        judge = judge_at(server.url, tmp_path)
        judge.decide(contests(1))
    json.dumps([judge.details(), judge.costs()], allow_nan=False)
