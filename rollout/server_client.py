"""HTTP to a vLLM server: time limits everywhere, and which failures are worth another try."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from pipeline.errors import UserError
from pipeline.recipe_rollout import ServerSection

SHORT_SECONDS = 30.0
"""For what a server answers at once unless it hangs."""
CONNECT_SECONDS = 10.0
SHOWN = 300
PASSING = (408, 425, 429)
"""Refusals that the same request may outlive; so it may every 5xx."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
START = "Start the server with `tristage serve RECIPE`"
START_ELSEWHERE = "Start the server on its machine with `tristage serve RECIPE --host 0.0.0.0`"


class ServerDown(Exception):
    """A request failed in a way that passes when the server is there again: refused, hung, restarted or overloaded."""


class RolloutServerError(UserError):
    """The rollout server cannot be used, or has not come back in time."""


class ServerClient:
    """One server's address and time limits.

    Every method raises ServerDown where another try may help, RolloutServerError where none does.

    Attributes:
        start: how the server is started, for the mend of an error.
    """

    def __init__(self, settings: ServerSection) -> None:
        self.url = settings.url.rstrip("/")
        self._long = httpx.Timeout(settings.timeout_seconds, connect=CONNECT_SECONDS, pool=None)
        is_here = urlsplit(self.url).hostname in LOOPBACK
        self.start = START if is_here else START_ELSEWHERE
        self._trust_env = not is_here  # a proxy that the environment names is for the world outside
        self._client = httpx.Client(base_url=self.url, trust_env=self._trust_env)

    def get(self, path: str) -> Any:
        """JSON of a route that answers at once; None where the body is empty."""
        return self._send("GET", path, {"timeout": SHORT_SECONDS})

    def post(self, path: str, body: Mapping[str, Any] | None = None, **parameters: str) -> Any:
        """JSON that a route answers after as long as a response may take."""
        return self._send("POST", path, {"json": body or {}, "params": parameters, "timeout": self._long})

    def rpc(self, method: str, *words: str) -> dict[str, Any]:
        """What the worker answers to a method of `WeightReceiver`; the first of several that is not content."""
        answer = self.post("/collective_rpc", {"method": method, "args": list(words)})
        try:
            results = answer["results"]
            return next((result for result in results if result.get("error")), results[0])
        except (TypeError, KeyError, IndexError, AttributeError):
            raise self.unreadable("/collective_rpc", answer) from None

    async def post_all(self, path: str, bodies: Sequence[Mapping[str, Any]], at_once: int) -> AsyncIterator[Any]:
        """Each body's index and its JSON, or the ServerDown it ended in, as they come; `at_once` are on their way.

        After the first ServerDown nothing more is sent, and the bodies that are left end in it too: a server that hangs
        is waited for once or, by what was sent shortly before, twice.
        """
        gate = asyncio.Semaphore(at_once)
        down: list[ServerDown] = []

        async def one(client: httpx.AsyncClient, index: int, body: Mapping[str, Any]) -> tuple[int, Any]:
            async with gate:
                if down:
                    return index, down[0]
                answer = await self._post_one(client, path, body)
                if isinstance(answer, ServerDown):
                    down.append(answer)
                return index, answer

        async with self._connections(at_once) as client:
            tasks = [asyncio.create_task(one(client, index, body)) for index, body in enumerate(bodies)]
            try:
                for task in asyncio.as_completed(tasks):
                    yield await task
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def unreadable(self, path: str, body: Any) -> RolloutServerError:
        """The error for an answer that is none of vLLM's."""
        return RolloutServerError(
            f"rollout.server.url: {self.url}{path} sent an answer that cannot be understood: {_shown(str(body))}.",
            mend=f"{self.start}, and make url its address.",
        )

    @asynccontextmanager
    async def _connections(self, at_once: int) -> AsyncIterator[httpx.AsyncClient]:
        limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
        async with httpx.AsyncClient(base_url=self.url, trust_env=self._trust_env, limits=limits) as client:
            yield client

    async def _post_one(self, client: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> Any:
        try:
            return self._answer(path, await client.post(path, json=body, timeout=self._long))
        except httpx.TransportError as error:
            return self._down(path, error)
        except ServerDown as error:
            return error

    def _send(self, method: str, path: str, options: Mapping[str, Any]) -> Any:
        try:
            return self._answer(path, self._client.request(method, path, **options))
        except httpx.TransportError as error:
            raise self._down(path, error) from None

    def _answer(self, path: str, response: httpx.Response) -> Any:
        status = response.status_code
        if status >= 500 or status in PASSING:
            raise ServerDown(f"answered {status} to {path}: {_shown(response.text)}")
        if status != 200:
            raise RolloutServerError(
                f"rollout.server.url: {self.url} answered {status} to {path}: {_shown(response.text)}.",
                mend=f"{self.start}, which turns on the routes that are needed, and make url its address.",
            )
        if not response.content:
            return None
        try:
            return response.json()
        except ValueError:
            raise self.unreadable(path, response.text) from None

    def _down(self, path: str, error: httpx.TransportError) -> ServerDown:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return ServerDown(f"cannot be reached ({_shown(str(error)) or type(error).__name__})")
        if isinstance(error, httpx.TimeoutException):
            return ServerDown(f"gave no answer to {path} in time")
        return ServerDown(f"broke off its answer to {path} ({_shown(str(error)) or type(error).__name__})")


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return (line if len(line) <= SHOWN else line[:SHOWN] + "...").rstrip(".")
