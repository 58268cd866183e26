"""A server on loopback that speaks the chat-completions protocol, and misbehaves when it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Response:
    """What the server sends; `hangs` sends nothing until the server is closed, `cut` breaks off in the body."""

    body: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    hangs: bool = False
    cut: bool = False


@dataclass(frozen=True)
class Request:
    """What came in: its number from 0, headers by lower-case name, and the body."""

    number: int
    headers: Mapping[str, str]
    body: Mapping[str, Any]

    @property
    def question(self) -> str:
        return self.body["messages"][0]["content"]


class ChatServer(ThreadingHTTPServer):
    """Answers every request with what `behave` makes of it, and remembers the requests.

    Attributes:
        url: base URL for clients.
        busiest: most requests that were under way at once.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, behave: Callable[[Request], Response], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.behave = behave
        self.requests: list[Request] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.under_way = 0
        self.busiest = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        server = self.server
        assert isinstance(server, ChatServer)
        with server.lock:
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(len(server.requests), headers, json.loads(content))
            server.requests.append(request)
            server.under_way += 1
            server.busiest = max(server.busiest, server.under_way)
        try:
            found = self.path == "/v1/chat/completions"
            self._send(server, server.behave(request) if found else Response('{"detail": "Not Found"}', 404))
        finally:
            with server.lock:
                server.under_way -= 1

    def _send(self, server: ChatServer, response: Response) -> None:
        if response.hangs:
            server.closing.wait()
            self.close_connection = True
            return
        body = response.body.encode()
        self.send_response(response.status)
        for name, value in {"content-type": "application/json", **response.headers}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if response.cut else body)
        if response.cut:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@contextmanager
def chat_server(behave: Callable[[Request], Response], port: int = 0) -> Iterator[ChatServer]:
    """A running server on a free port of loopback, or on `port`."""
    server = ChatServer(behave, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def says(text: str | None, usage: tuple[int, int] | None = (100, 7), **fields: Any) -> Response:
    """A chat completion with this text, that used (prompt, completion) tokens."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **fields}
    body: dict[str, Any] = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return Response(json.dumps(body))


def refuses(status: int, message: str, headers: Mapping[str, str] | None = None, **fields: Any) -> Response:
    """An error in OpenAI's form."""
    return Response(json.dumps({"error": {"message": message, **fields}}), status, headers or {})
