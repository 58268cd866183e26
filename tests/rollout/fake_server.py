"""A stand-in for vLLM's server over real HTTP: it answers by arithmetic and fails when told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rollout.server_engine import RECEIVER
from tests.rollout.tiny import POSITIONS, VOCABULARY

Fault = Callable[["Handler"], bool]
"""Does something to one request; True when the request is dealt with."""


def tokens_for(prompt: list[int], seed: int, size: int) -> list[int]:
    """What the server samples."""
    return [7 + (sum(prompt) + seed + 3 * n) % 100 for n in range(size)]


class FakeServer(ThreadingHTTPServer):
    """State of the server, and what was asked of it.

    Attributes:
        faults: taken from the front by requests for responses.
        label: of the weights; `loaded`: directories that were received.
        refusal: what `receive_weights` answers, in turn; {} accepts.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, shapes: dict[str, list[int]], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.model: dict[str, Any] = {
            "vocab_size": VOCABULARY, "max_model_len": POSITIONS, "logprobs_mode": "processed_logprobs",
            "dtype": "float32", "weights": shapes,
        }  # fmt: skip
        self.receiver: str | None = RECEIVER
        self.label = "default"
        self.faults: list[Fault] = []
        self.refusals: list[dict[str, Any]] = []
        self.cache_resets: list[bool] = []
        self.loaded: list[str] = []
        self.calls: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        del format, args

    def answer(self, body: Any, status: int = 200) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        answers = {
            "/version": {"version": "0.0"},
            "/weight_info": {"weight_version": self.server.label},
            "/server_info": {"vllm_config": {"parallel_config": {"worker_extension_cls": self.server.receiver}}},
        }
        self.answer(answers.get(path, {}), 200 if path in answers else 404)

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if path == "/inference/v1/generate":
            self.generate(body)
            return
        self.server.calls.append(self.path)
        if path == "/update_weight_version":
            self.server.label = body["new_version"]
        if path == "/reset_prefix_cache":
            success = self.server.cache_resets.pop(0) if self.server.cache_resets else True
            self.answer({"success": success})
        elif path == "/collective_rpc":
            self.answer({"results": [self.worker(body["method"], body["args"])]})
        else:
            self.answer({})

    def worker(self, method: str, words: list[str]) -> dict[str, Any]:
        if method == "describe_model":
            return self.server.model
        if self.server.refusals:
            return self.server.refusals.pop(0)
        self.server.loaded.append(words[0])
        return {"error": None, "passing": False}

    def generate(self, body: dict[str, Any]) -> None:
        with self.server.lock:
            self.server.bodies.append(body)
            fault = self.server.faults.pop(0) if self.server.faults else None
        if fault is None or not fault(self):
            self.answer(response(body, self.server.label))


def response(body: dict[str, Any], *labels: str) -> dict[str, Any]:
    """A response of as many tokens as may be, sampled under the labels one after the other."""
    parameters = body["sampling_params"]
    ids = tokens_for(body["token_ids"], parameters["seed"], parameters["max_tokens"])
    spans = [{"version": label, "start": 0, "end": len(ids)} for label in labels]
    logprobs = {"content": [{"token_id": token, "logprob": -token / 128} for token in ids]}
    choice = {"token_ids": ids, "logprobs": logprobs, "weight_versions": spans, "finish_reason": "length"}
    return {"choices": [choice]}


def status(code: int) -> Fault:
    def act(handler: Handler) -> bool:
        handler.answer({"error": {"message": "out of sorts"}}, code)
        return True

    return act


def hang(handler: Handler) -> bool:
    handler.server.released.wait(20)
    return True


def slow(handler: Handler) -> bool:
    time.sleep(0.2)
    return False


def garbage(data: bytes) -> Fault:
    def act(handler: Handler) -> bool:
        handler.answer(data)
        return True

    return act


def restart(handler: Handler) -> bool:
    """The weights are gone, and what ran is broken off."""
    handler.server.label = "default"
    handler.close_connection = True
    handler.connection.close()
    return True


@contextmanager
def serving(server: FakeServer) -> Iterator[FakeServer]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
