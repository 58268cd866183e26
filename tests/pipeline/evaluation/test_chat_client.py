"""Servers that misbehave: what is tried again and for how long, what is told, and what is never told."""

from __future__ import annotations

import email.utils
import itertools
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.pipeline.evaluation.chat_server import Request, Response, chat_server, refuses, says
from tests.pipeline.evaluation.test_llm_judge import contests, judge_at, longer

KEY = "sk-hush-hush-0123456789"
Behaviour = Callable[[Request], Response]


def once(response: Response) -> Behaviour:
    """The response to the first request; the others are judged by length."""
    return lambda request: longer(request) if request.number else response


@pytest.mark.parametrize(
    "response",
    [
        refuses(429, "slow down"),
        refuses(500, "oops"),
        refuses(503, "loading", {"retry-after": "nonsense"}),
        refuses(408, "late"),
        Response("", hangs=True),
        Response('{"choices": [', cut=True),
        Response("{nope"),
        Response('{"choices": []}'),
        Response("null"),
        Response("<html>starting</html>", headers={"content-type": "text/html"}),
    ],
    ids=["429", "500", "503", "408", "hang", "cut", "no-json", "no-choice", "null", "html"],
)
def test_what_passes_is_tried_again(tmp_path: Path, response: Response) -> None:
    with chat_server(once(response)) as server:
        judge = judge_at(server.url, tmp_path, timeout_seconds=0.5)
        assert [decision.outcome for decision in judge.decide(contests(1))] == [1.0]
        assert len(server.requests) == 3
    now = judge.costs()["now"]
    assert (now["requests"], now["retries"], now["prompt_tokens"]) == (3, 1, 200)


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured(tmp_path: Path, as_date: bool) -> None:
    """A date has whole seconds: one that is two seconds ahead is more than one second ahead."""
    wait = email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "1.2"
    with chat_server(once(refuses(429, "slow down", {"retry-after": wait}))) as server:
        started = time.monotonic()
        judge_at(server.url, tmp_path).decide(contests(1))
        assert 0.9 < time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("response", "requests", "problem"),
    [
        (refuses(429, "slow down"), 3, "answered 429: slow down, tried 3 times. Lower concurrency or wait"),
        (refuses(500, "oops"), 3, "answered 500: oops, tried 3 times. See what is wrong with the server"),
        (
            refuses(429, "b", {"retry-after": "3600"}),
            1,
            "answered 429: b (and asks to wait 3600 seconds). Wait as long",
        ),
        (refuses(429, "broke", code="insufficient_quota"), 1, "broke (insufficient_quota). Raise the account's quota"),
        (refuses(401, "no"), 1, "answered 401: no. The environment variable JUDGE_KEY is not set: export a valid key"),
        (refuses(403, "no"), 1, "answered 403: no. The environment variable JUDGE_KEY is not set: export a valid key"),
        (
            refuses(404, "The model `m` does not exist."),
            1,
            "does not exist. Check base_url, which mostly ends in /v1, and",
        ),
        (
            refuses(400, "temperature must be 1"),
            1,
            "answered 400: temperature must be 1. Mend the request: model, temp",
        ),
        (Response("", hangs=True), 3, "gave no answer within 0.3 seconds, tried 3 times. See what the server is busy"),
        (
            Response("[]"),
            3,
            "sent no chat completion: [], tried 3 times. Make base_url the address of an OpenAI-compat",
        ),
    ],
)
def test_what_does_not_pass_is_told(tmp_path: Path, response: Response, requests: int, problem: str) -> None:
    with chat_server(lambda _: response) as server, pytest.raises(UserError) as caught:
        judge_at(server.url, tmp_path, api_key_env="JUDGE_KEY", timeout_seconds=0.3).decide(contests(1))
    assert problem in str(caught.value)
    assert f"eval.judges.x.llm: {server.url} " in str(caught.value)
    assert str(caught.value).endswith("and run the same command again: the answers so far are kept.")
    assert len(server.requests) == requests


def test_a_wrong_path_is_told(tmp_path: Path) -> None:
    with chat_server(longer) as server, pytest.raises(UserError, match=r"answered 404: .*Check base_url"):
        judge_at(server.url.removesuffix("/v1"), tmp_path).decide(contests(1))


def test_a_refused_connection_is_told_and_asked_again_later(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be reached: .*[Cc]onnect.*, tried 3 times\. Start the server"):
        judge_at(f"http://127.0.0.1:{port}/v1", tmp_path).decide(contests(3))
    assert time.monotonic() - started < 10
    with chat_server(longer, port) as server:
        assert [d.outcome for d in judge_at(server.url, tmp_path).decide(contests(3))] == [1.0] * 3


def test_pauses_grow(tmp_path: Path) -> None:
    """At a first pause of at most 0.02 s: 0.01 to 0.02, then 0.02 to 0.04, 0.04 to 0.08, 0.08 to 0.16."""
    times: list[float] = []

    def behave(request: Request) -> Response:
        times.append(time.monotonic())
        return refuses(503, "loading")

    with chat_server(behave) as server, pytest.raises(UserError):
        judge_at(server.url, tmp_path, retries=4).decide(contests(1))
    gaps = [later - before for before, later in itertools.pairwise(times)]
    assert [gap >= low for gap, low in zip(gaps, (0.01, 0.02, 0.04, 0.08), strict=True)] == [True] * 4


def test_the_key_is_sent_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """A server that repeats the key in an answer's error and in a refusal gets it struck out; logs are at DEBUG."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with chat_server(once(refuses(500, f"bad luck with {KEY}"))) as server:
        judge = judge_at(server.url, tmp_path, api_key_env="JUDGE_KEY")
        judge.decide(contests(2))
        assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {KEY}"}
    refusal = refuses(401, f"Incorrect API key provided: {KEY}")
    with chat_server(lambda _: refusal) as server, pytest.raises(UserError, match="holds a key that it ref") as caught:
        judge_at(server.url, tmp_path, api_key_env="JUDGE_KEY").decide(contests(3))
    assert "/chat/completions" in caplog.text
    chain: list[BaseException | None] = [caught.value, caught.value.__cause__]
    shown = capfd.readouterr()
    written = "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    everything = f"{chain} {judge.details()} {judge.costs()} {judge.about} {caplog.text} {shown} {written}"
    assert "hush-hush" not in everything
    assert "provided: ***" in str(caught.value)


@pytest.mark.parametrize("key", [f"{KEY}\nX-Other: {KEY}", f"\N{LEFT DOUBLE QUOTATION MARK}{KEY}", f"{KEY}\tb"])
def test_a_key_that_no_header_holds_is_refused_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", key)
    with chat_server(lambda _: says("A")) as server:
        with pytest.raises(UserError, match="variable JUDGE_KEY holds characters that no key has") as caught:
            judge_at(server.url, tmp_path, api_key_env="JUDGE_KEY").decide(contests(1))
        assert server.requests == []
    assert "hush-hush" not in str(caught.value)


def test_nothing_but_the_key_is_taken_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\r\n")  # as a file of secrets gives it
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "x-elsewhere: elsewhere")
    with chat_server(lambda _: says("A")) as server:
        judge_at(server.url, tmp_path, api_key_env="JUDGE_KEY").decide(contests(1))
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
        assert "elsewhere" not in str(server.requests[0].headers)
    assert os.environ["OPENAI_ORG_ID"] == "elsewhere"


def test_a_server_that_asks_for_no_key_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # which is for the world outside
    monkeypatch.delenv("NO_PROXY", raising=False)
    with chat_server(lambda _: says("A")) as server:
        judge_at(server.url, tmp_path).decide(contests(1))
        assert server.requests[0].headers["authorization"] == "Bearer none"
