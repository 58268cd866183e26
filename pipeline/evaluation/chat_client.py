"""Chat completions from an OpenAI-compatible server, asked for until they come or the failure is worth telling.

The openai package sends and reads; tries, pauses and time limits are decided here, so that every one of them is counted
and told. The key is read from the environment when the client opens, and stands in no message.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import openai

from pipeline.errors import UserError
from pipeline.evaluation.judge_cache import Reply
from pipeline.recipe_judges import LlmJudge

NO_KEY = "none"
LONGEST_BACKOFF_SECONDS = 60.0
LONGEST_WAIT_SECONDS = 300.0
"""A server that asks for a longer pause is given up at once."""
SHOWN = 300
TOO_LONG = ("context_length_exceeded", "context length", "context size", "context window", "exceed_context_size")
PASSING = (408, 409, 425, 429)
"""Refusals that the same request may outlive; so it may every 5xx."""


class TooLong(Exception):
    """The server refuses this request because of its length: others may pass."""


@dataclass(frozen=True)
class Failure:
    """Why a try failed.

    Attributes:
        what: clause for the error text.
        mend: what to do about it.
        wait: seconds that the server asks to wait.
        final: another try is pointless.
    """

    what: str
    mend: str
    wait: float = 0.0
    final: bool = False


class ChatClient:
    """One judge's connection, to be used with `async with`.

    Args:
        name: key of `eval.judges`, for error texts.
        settings: of the judge.
        backoff_seconds: upper end of the first pause; each further one may be twice as long.

    Attributes:
        sent: requests sent, failed ones included.
        retried: those of them that repeated a failed one.
    """

    def __init__(self, name: str, settings: LlmJudge, backoff_seconds: float = 1.0) -> None:
        self.sent = 0
        self.retried = 0
        self._key = f"eval.judges.{name}.llm"
        self._settings = settings
        self._backoff_seconds = backoff_seconds
        self._random = random.Random()  # pauses must not move the generators that a run is seeded with
        self._secret = _secret(name, settings.api_key_env)
        self._client: openai.AsyncOpenAI | None = None

    async def __aenter__(self) -> ChatClient:
        # A proxy that the environment names is for the world outside, not for this machine.
        here = urlsplit(self._settings.base_url).hostname in ("localhost", "127.0.0.1", "::1")
        with _without_openai_settings():
            self._client = openai.AsyncOpenAI(
                api_key=self._secret or NO_KEY,
                base_url=self._settings.base_url,
                max_retries=0,
                timeout=None,
                http_client=openai.DefaultAsyncHttpxClient(trust_env=not here),
            )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            await self._client.close()

    async def ask(self, request: Mapping[str, Any]) -> Reply:
        """The answer to a request, tried up to `retries` times more.

        Between tries it waits for 0.5 to 1 times the current back-off, or as long as the server's Retry-After says.

        Args:
            request: fields of a chat completion, messages included.

        Errors:
            TooLong: the request is too long for the model.
            UserError: refused for good, or failed at every try.
        """
        outcome = await self._try(request)
        for tries in range(1, self._settings.retries + 1):
            if isinstance(outcome, Reply) or outcome.final:
                break
            await asyncio.sleep(max(self._pause(tries), outcome.wait))
            self.retried += 1
            outcome = await self._try(request)
        if isinstance(outcome, Reply):
            return outcome
        times = "" if outcome.final else f", tried {self._settings.retries + 1} times"
        raise UserError(
            f"{self._key}: {self._settings.base_url} {outcome.what}{times}.",
            mend=f"{outcome.mend}, and run the same command again: the answers so far are kept.",
        )

    async def _try(self, request: Mapping[str, Any]) -> Reply | Failure:
        assert self._client is not None
        self.sent += 1
        unreadable = "Make base_url the address of an OpenAI-compatible server; it mostly ends in /v1"
        try:
            async with asyncio.timeout(self._settings.timeout_seconds):
                body = await self._client.post("/chat/completions", cast_to=object, body=dict(request))
        except TimeoutError:
            what = f"gave no answer within {self._settings.timeout_seconds:g} seconds"
            return Failure(what, "See what the server is busy with, or raise timeout_seconds")
        except openai.APIStatusError as error:
            return self._refusal(error)
        except openai.APIConnectionError as error:
            return Failure(f"cannot be reached: {self._clean(_innermost(error))}", "Start the server or mend base_url")
        except (openai.APIError, ValueError) as error:  # a body that is no JSON
            return Failure(f"sent no chat completion: {self._clean(str(error))}", unreadable)
        reply = _reply(body)
        return reply or Failure(f"sent no chat completion: {self._clean(str(body))}", unreadable)

    def _refusal(self, error: openai.APIStatusError) -> Failure:
        """Errors: TooLong."""
        status, said = error.status_code, self._clean(_said(error))
        what = f"answered {status}: {said}"
        if status == 413 or (status == 400 and any(word in said.lower() for word in TOO_LONG)):
            raise TooLong(said) from None
        if status in (401, 403):
            state = "holds a key that it refuses" if self._secret else "is not set"
            variable = self._settings.api_key_env
            return Failure(what, f"The environment variable {variable} {state}: export a valid key", final=True)
        if status == 404:
            mend = f"Check base_url, which mostly ends in /v1, and model ({self._settings.model!r})"
            return Failure(what, mend, final=True)
        if status not in PASSING and status < 500:
            return Failure(what, "Mend the request: model, temperature, max_tokens, constrain, request", final=True)
        wait = _retry_after(error.response.headers)
        mend = "Lower concurrency or wait" if status == 429 else "See what is wrong with the server"
        if wait > LONGEST_WAIT_SECONDS:
            return Failure(f"{what} (and asks to wait {wait:.0f} seconds)", "Wait as long", final=True)
        if "insufficient_quota" in (error.code, error.type):
            return Failure(what, "Raise the account's quota", final=True)
        return Failure(what, mend, wait)

    def _pause(self, tries: int) -> float:
        longest = min(self._backoff_seconds * 2.0 ** (tries - 1), LONGEST_BACKOFF_SECONDS)
        return longest * self._random.uniform(0.5, 1.0)

    def _clean(self, text: str) -> str:
        """One line of the text, cut, with the key struck out wherever a server repeats it."""
        line = " ".join((text.replace(self._secret, "***") if self._secret else text).split())
        return (line if len(line) <= SHOWN else line[:SHOWN] + "...").rstrip(".")


def _secret(name: str, variable: str) -> str:
    """The key in an environment variable, without blanks and line ends around it; "" where it is not set.

    Errors:
        UserError: it cannot be sent in a header. The key itself stands in no message.
    """
    secret = os.environ.get(variable, "").strip()
    if not (secret.isascii() and secret.isprintable()):
        raise UserError(
            f"eval.judges.{name}.llm: the environment variable {variable} holds characters that no key has.",
            mend="Export the key alone, without quotes, line ends or blanks inside.",
        )
    return secret


@contextmanager
def _without_openai_settings() -> Iterator[None]:
    """The openai package would send an organisation, a project and headers that the environment names to any server."""
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("OPENAI_")}
    try:
        yield
    finally:
        os.environ.update(kept)


def _reply(body: Any) -> Reply | None:
    """The first choice's text and the counted tokens; None where the body is no chat completion.

    The openai package reads JSON and checks none of it.
    """
    try:
        choice = body["choices"][0]
        content, finish = choice["message"].get("content"), choice.get("finish_reason")
        usage = body.get("usage") or {}
        tokens = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
    except (AttributeError, IndexError, KeyError, TypeError):
        return None
    counts = [count if isinstance(count, int) else None for count in tokens]
    return Reply(content if isinstance(content, str) else "", finish, *counts)


def _said(error: openai.APIStatusError) -> str:
    """What the server says in its refusal."""
    body = error.body
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return f"{body['message']} ({error.code})" if error.code else body["message"]
    return str(body or error.message)


def _innermost(error: BaseException) -> str:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return str(error) or type(error).__name__


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that Retry-After asks for, as a number or as a date; 0 where it says nothing readable."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
        return 0.0 if math.isnan(seconds) else max(seconds, 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0
