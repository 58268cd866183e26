"""PPO with responses from a vLLM server: the colocated run's numbers, whatever happens to the server meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.test_kill import family, logged, wait_until
from tests.e2e.test_rollout_server import START_SECONDS, Server
from tests.workplace import ROOT, Workplace

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1500)]
FSDP2 = ("--launch.processes", "2", "--launch.accelerate", str(ROOT / "configs" / "accelerate" / "fsdp2.yaml"))
ASYNC = ("--rollout.async_steps", "1", "--ppo.importance_level", "token")
ENGINES_OWN = ("rollout/max_logprob_gap", "rollout/mean_probability_gap")
"""Metrics of the engine's own log-probabilities, whose rounding depends on which requests it computes together."""
PARITY = 1e-4
RANKS_TOLERANCE = 1e-5
SHORT_PATIENCE = 3.0
AT_ONCE_SECONDS = 10.0
"""For an end that waits for nothing: the pauses between tries and an interpreter that shuts down."""
GENERATE, HAND_OVER = "/inference/v1/generate", "/pause"
EACH = 8
"""Requests of one update, and of one evaluation."""


class PpoServer(Server):
    """`tristage serve` for the tiny recipe."""

    def __init__(self, place: Workplace, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        words = ["serve", str(place.path / "recipe.yaml"), "--policy", str(place.run / "sft"), "--port", str(self.port)]
        self._words = [sys.executable, "-m", "pipeline.cli", *words, "--rollout.kv_cache_gib", "0.1"]
        self.process = self.start()

    def start_again(self) -> None:
        """Where it is not running."""
        if self.process.poll() is not None:
            self.start()


class Way(ThreadingHTTPServer):
    """An address that leads to the server, and on which something happens just before a chosen request reaches it.

    Attributes:
        counts: requests so far by path.
    """

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Passer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.client = httpx.Client(base_url=target, trust_env=False, timeout=START_SECONDS)
        self.counts = Counter[str]()
        self._lock = threading.Lock()
        self._events: dict[tuple[str, int], Callable[[], None]] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def at(self, path: str, number: int, act: Callable[[], None]) -> None:
        """Acts when request `number` of the path, counted from now on, comes by."""
        self._events[path, self.counts[path] + number] = act

    def passes(self, path: str) -> None:
        """Counts a request; all others wait while something happens."""
        with self._lock:
            self.counts[path] += 1
            self._events.pop((path, self.counts[path]), lambda: None)()


class _Passer(BaseHTTPRequestHandler):
    """Passes a request on; where the server does not answer, the connection is cut."""

    protocol_version = "HTTP/1.1"
    server: Way  # pyright: ignore[reportIncompatibleVariableOverride]

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.passes(self.path.partition("?")[0])
        try:
            answer = self.server.client.request(self.command, self.path, content=body, headers=_json(self.headers))
        except httpx.TransportError:
            self.close_connection = True
            return
        self.send_response(answer.status_code)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    do_GET = do_POST = _pass

    def log_message(self, format: str, *args: Any) -> None: ...


def _json(headers: Any) -> dict[str, str]:
    return {"Content-Type": headers["Content-Type"]} if "Content-Type" in headers else {}


@pytest.fixture(scope="module")
def server(finished_run: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PpoServer]:
    served = PpoServer(finished_run, tmp_path_factory.mktemp("ppo_server"))
    try:
        served.wait()
        yield served
    finally:
        served.kill()


@pytest.fixture
def way(server: PpoServer) -> Iterator[Way]:
    server.start_again()
    server.wait()
    with Way(server.url) as leading:
        yield leading
        leading.shutdown()


@pytest.fixture(autouse=True)
def nothing_left_but_the_server(server: PpoServer) -> Iterator[None]:
    yield
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) not in (os.getsid(0), server.process.pid):
                process.kill()


@pytest.fixture(scope="module")
def colocated(finished_run: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """The run whose numbers are expected: vLLM inside the stage's process. Only to be read."""
    place = Workplace(Path(shutil.copytree(finished_run.path, tmp_path_factory.mktemp("colocated") / "work")))
    shutil.rmtree(place.run / "ppo")
    ended_well(place, ("ppo", "recipe.yaml", "--rollout.engine", "vllm"))
    assert place.manifest("ppo")["engine"]["name"] == "vllm"
    return place


def served_by(url: str, patience: float = START_SECONDS, *more: str) -> tuple[str, ...]:
    """A command."""
    server = ("--rollout.server.url", url, "--rollout.server.patience_seconds", str(patience))
    return ("ppo", "recipe.yaml", "--rollout.mode", "server", "--rollout.engine", "vllm", *server, *more)


def ended_well(place: Workplace, words: tuple[str, ...]) -> str:
    done = place.tristage(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def updates_of(place: Workplace) -> list[dict[str, Any]]:
    return [row for row in place.rows("ppo") if "objective/kl" in row]


def decided_by_tokens(place: Workplace) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not key.startswith("time/") and key not in ENGINES_OWN}
        for row in place.rows("ppo")
    ]


def assert_the_colocated_run(place: Workplace, expected: Workplace, tolerance: float = 0.0) -> None:
    """The same responses, and so the same metrics and weights: the engine decides nothing but the tokens.

    One process computes alike from the same tokens, bit for bit; several round sums otherwise. Every update's gap says
    that the server had that update's weights.
    """
    rows = updates_of(place)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert all(row["rollout/max_logprob_gap"] < PARITY for row in rows)
    assert [row["rollout/staleness"] for row in rows] == [0.0] * 7
    samples = place.rows("ppo", "samples.jsonl"), expected.rows("ppo", "samples.jsonl")
    answers = [[(row["step"], row["prompt"], row["response"]) for row in every] for every in samples]
    assert answers[0] == answers[1]
    assert place.manifest("ppo")["engine"]["name"] == "vllm server"
    for one, other in zip(decided_by_tokens(place), decided_by_tokens(expected), strict=True):
        assert {key: one[key] for key in other} == pytest.approx(other, rel=tolerance, abs=tolerance)
    for folder in ("", "critic"):
        weights, wanted = (load_file(p.run / "ppo" / folder / "model.safetensors") for p in (place, expected))
        assert weights.keys() == wanted.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=tolerance, atol=tolerance)
    assert not (place.run / "rollout_weights").exists()


def test_a_served_run_is_the_colocated_run(
    server: PpoServer, colocated: Workplace, copied: Callable[..., Workplace]
) -> None:
    place = copied("ppo")
    ended_well(place, served_by(server.url))
    assert_the_colocated_run(place, colocated)


def test_only_the_first_of_two_ranks_talks_to_the_server(
    way: Way, colocated: Workplace, copied: Callable[..., Workplace]
) -> None:
    """Sharded, so that the weights that go to the server come from both."""
    place = copied("ppo")
    ended_well(place, served_by(way.url, START_SECONDS, *FSDP2))
    assert way.counts[GENERATE] == 7 * EACH + 4 * EACH, "of seven updates and four evaluations"
    assert way.counts[HAND_OVER] == 2 + 7
    assert_the_colocated_run(place, colocated, RANKS_TOLERANCE)


def test_a_server_killed_and_started_again_only_costs_time(
    way: Way, server: PpoServer, colocated: Workplace, copied: Callable[..., Workplace]
) -> None:
    """In the middle of update 3's rollout, and after evaluation 0 and two updates of eight requests."""

    def die_and_return() -> None:
        server.kill()
        server.start()

    place = copied("ppo")
    way.at(GENERATE, 3 * EACH + EACH // 2, die_and_return)
    said = ended_well(place, served_by(way.url))
    assert f"the rollout server at {way.url} broke off its answer to {GENERATE}" in said
    assert "does not hold weights 2: loading them again" in said
    assert "resumed" not in said
    assert_the_colocated_run(place, colocated)


def test_a_server_gone_for_good_leaves_a_state_that_goes_on_whenever_it_dies(
    way: Way, server: PpoServer, colocated: Workplace, copied: Callable[..., Workplace]
) -> None:
    """While it samples for update 4, at the hand-over after update 5, at that after the last, and while it samples for
    the last evaluation. `save_every` is 2: what is saved after updates 3, 5 and 7 is saved for want of a server."""
    place = copied("ppo")
    words = served_by(way.url, SHORT_PATIENCE)
    hand_over_at_start = 2  # when the engine connects, and when the stage has loaded its state
    for path, number, saved in (
        (GENERATE, EACH + 3 * EACH + EACH + EACH // 2, 3),
        (HAND_OVER, hand_over_at_start + 2, 5),
        (HAND_OVER, hand_over_at_start + 2, 7),
        (GENERATE, EACH // 2, 7),
    ):
        died: list[float] = []

        def die(died: list[float] = died) -> None:
            server.kill()
            died.append(time.monotonic())

        way.at(path, number, die)
        ended = place.tristage(*words)
        assert ended.returncode == 2, ended.stderr[-3000:]
        assert SHORT_PATIENCE / 2 < time.monotonic() - died[0] < SHORT_PATIENCE + AT_ONCE_SECONDS
        assert ended.stderr.count("\n") == 1
        assert f"error: rollout.server.url: the server at {way.url} " in ended.stderr
        assert "(rollout.server.patience_seconds). Start the server with `tristage serve RECIPE`" in ended.stderr
        assert "run the same command again" in ended.stderr
        assert max((place.run / "ppo.partial" / "state").iterdir()).name == f"update_{saved:06d}"
        server.start()
        server.wait()
    assert "resumed after update 7 of 7" in ended_well(place, words)
    assert_the_colocated_run(place, colocated)


def test_responses_sampled_ahead_are_one_update_old_and_survive_a_kill(
    server: PpoServer, copied: Callable[..., Workplace], tmp_path: Path
) -> None:
    server.start_again()
    server.wait()
    place = copied("ppo")
    words = served_by(server.url, START_SECONDS, *ASYNC)
    expected = Workplace(Path(shutil.copytree(place.path, tmp_path / "undisturbed")))
    ended_well(expected, words)
    rows = updates_of(expected)
    assert [row["rollout/staleness"] for row in rows] == [0.0] + [1.0] * 6
    assert rows[0]["rollout/importance_weight"] == 1.0
    assert all(0.0 < abs(row["rollout/importance_weight"] - 1.0) < 0.2 for row in rows[1:])
    assert rows[0]["rollout/max_logprob_gap"] < PARITY < min(row["rollout/max_logprob_gap"] for row in rows[1:])

    process = place.start(*words)
    wait_until(lambda: logged(place, 3), process)
    os.killpg(family(process)[0].pid, signal.SIGKILL)
    process.communicate(timeout=60)
    newest = max((place.run / "ppo.partial" / "state").glob("update_*"))
    saved = int(newest.name.removeprefix("update_"))
    ahead = torch.load(newest / "replicated.pt", weights_only=True)["parts"]["rollouts"]["ahead"]
    assert {update: {version for *_, version in rows} for update, rows in ahead.items()} == {saved + 1: {saved - 1}}
    assert f"resumed after update {saved} of 7" in ended_well(place, words)
    assert [{k: v for k, v in row.items() if not k.startswith("time/")} for row in place.rows("ppo")] == [
        {k: v for k, v in row.items() if not k.startswith("time/")} for row in expected.rows("ppo")
    ]
    assert place.rows("ppo", "samples.jsonl") == expected.rows("ppo", "samples.jsonl")
    weights = [p.manifest("ppo")["files"]["model.safetensors"] for p in (place, expected)]
    assert weights[0] == weights[1]
