"""`rollout.mode: server` with a real vLLM server, from `tristage serve` to its death in the middle of a rollout."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from transformers import LlamaForCausalLM

from pipeline.recipe_rollout import ServerSection
from rollout.batch import Completion
from rollout.engine import EngineOptions, RolloutEngine, SamplingOptions, make_engine
from rollout.server_client import RolloutServerError
from rollout.server_engine import ServerEngine
from tests.rollout.test_processes import in_session
from tests.rollout.tiny import POSITIONS, STOP, forward_logprobs, load_llama, perturb, prompts_of, save_llama

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]
OPTIONS = EngineOptions(max_model_len=POSITIONS, max_sequences=64, stop_token_ids=STOP, kv_cache_gib=0.1)
BLOCK = 128
PARITY = 1e-4
START_SECONDS = 300
RECIPE = """\
name: served
model:
  name_or_path: m
data:
  max_prompt_tokens: 384
  max_response_tokens: 128
rollout:
  kv_cache_gib: 0.1
"""


class Server:
    """`tristage serve` on a free port of loopback, in a session of its own."""

    def __init__(self, model: Path, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        (folder / "recipe.yaml").write_text(RECIPE)
        self._words = [sys.executable, "-m", "pipeline.cli", "serve", str(folder / "recipe.yaml")]
        self._words += ["--policy", str(model), "--port", str(self.port)]
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._words, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        return self.process

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, "the server did not start"
            try:
                if httpx.get(f"{self.url}/health", trust_env=False, timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)

    def kill(self) -> None:
        """All of it at once, as when its machine goes, but for what gives shared memory back."""
        for process in map(psutil.Process, in_session(self.process.pid)):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "resource_tracker" not in " ".join(process.cmdline()):
                    process.kill()
        self.process.wait()
        assert self.left_over(30) == []

    def left_over(self, seconds: float) -> list[int]:
        """Its processes that are still there after so long."""
        deadline = time.monotonic() + seconds
        while (left := in_session(self.process.pid)) and time.monotonic() < deadline:
            self.process.poll()
            time.sleep(0.2)
        return left


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    served = Server(model_dir, tmp_path_factory.mktemp("server"))
    try:
        served.wait()
        yield served
    finally:
        served.kill()


@pytest.fixture(scope="module")
def colocated(model_dir: Path) -> Iterator[RolloutEngine]:
    engine = make_engine("vllm", model_dir, OPTIONS)
    yield engine
    engine.close()


def connect(server: Server, model_dir: Path, folder: Path, notices: list[str], **settings: float) -> ServerEngine:
    section = ServerSection.model_validate({"url": server.url, "patience_seconds": START_SECONDS, **settings})
    return ServerEngine(model_dir, OPTIONS, section, folder / "weights", notices.append)


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "weights").glob("*/*"))


def worst_gap(completions: list[Completion], prompts: list[list[int]], model: LlamaForCausalLM) -> float:
    return max(
        float((torch.tensor(c.logprobs) - forward_logprobs(model, p, c.token_ids)).abs().max())
        for p, c in zip(prompts, completions, strict=True)
    )


def assert_same(ours: list[Completion], theirs: list[Completion]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.token_ids == other.token_ids
        assert one.finished == other.finished
        assert one.logprobs == pytest.approx(other.logprobs, abs=PARITY)


def test_the_server_samples_what_the_colocated_engine_samples(
    server: Server, colocated: RolloutEngine, model_dir: Path, tmp_path: Path
) -> None:
    engine = connect(server, model_dir, tmp_path, [])
    assert (engine.name, engine.version, engine.policy_version) == ("vllm server", colocated.version, 0)
    policy = load_llama(model_dir)
    prompts = prompts_of([3, 1, 40, 17, 300, *[5] * 90])
    seeds = [2**40, *range(94)]
    for update, temperature in ((0, 1.0), (5, 0.7), (6, 0.0)):
        if update:
            perturb(policy, seed=update)
            engine.load_weights(policy.named_parameters(), version=update)
            colocated.load_weights(policy.named_parameters(), version=update)
        sampling = SamplingOptions(40, temperature)
        ours = engine.generate(prompts, sampling, seeds)
        assert {completion.policy_version for completion in ours} == {update}
        assert {completion.finished for completion in ours} == {True, False}
        assert_same(ours, colocated.generate(prompts, sampling, seeds))
    assert written(tmp_path) == ["version-5", "version-6"]
    engine.load_weights(policy.state_dict().items())
    assert engine.policy_version == 7
    assert written(tmp_path) == ["version-6", "version-7"]
    engine.close()
    assert not (tmp_path / "weights").exists()


def test_every_hand_over_renews_the_tied_head_and_cached_prefixes(
    server: Server, model_dir: Path, tmp_path: Path
) -> None:
    engine = connect(server, model_dir, tmp_path, [])
    policy = load_llama(model_dir)
    shared = prompts_of([2 * BLOCK + 10])[0]
    prompts = [[*shared, extra] for extra in (9, 10, 11)]
    for update in (1, 2):
        perturb(policy, seed=10 + update)
        stale = engine.generate(prompts, SamplingOptions(24, 0.0), [0] * 3)
        assert worst_gap(stale, prompts, policy) > 0.01
        engine.load_weights(policy.named_parameters())
        fresh = engine.generate(prompts, SamplingOptions(24, 0.0), [0] * 3)
        assert worst_gap(fresh, prompts, policy) < PARITY
        assert {completion.policy_version for completion in fresh} == {update}
    engine.close()


def test_weights_that_do_not_fit_leave_the_server_as_it_was(server: Server, model_dir: Path, tmp_path: Path) -> None:
    engine = connect(server, model_dir, tmp_path, [])
    policy = load_llama(model_dir)
    expected = engine.generate([[7, 8]], SamplingOptions(8, 0.0), [0])
    broken = dict(policy.named_parameters())
    del broken["model.norm.weight"]
    with pytest.raises(ValueError, match=r"1 weights were not given.*model\.norm"):
        engine.load_weights(broken.items())
    with pytest.raises(RuntimeError, match="half-way"):
        engine.generate([[7, 8]], SamplingOptions(8, 0.0), [0])
    longer = save_llama(tmp_path / "longer", tied=True)
    config = (longer / "config.json").read_text().replace(str(POSITIONS), str(2 * POSITIONS))
    (longer / "config.json").write_text(config)
    with pytest.raises(RolloutServerError, match=r"takes 512 tokens, but 513 are needed.*`tristage serve`"):
        ServerEngine(longer, EngineOptions(513, 64, STOP), ServerSection(url=server.url), tmp_path / "w", print)
    policy.save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    client = vars(engine)["_client"]
    for name, reason in (("cut", "cannot be read"), ("nowhere", "does not exist"), ("longer", None)):
        answer = client.rpc("receive_weights", str(tmp_path / name))
        assert reason in answer["error"] if reason else answer["error"] is None
    engine.load_weights(policy.named_parameters(), version=0)
    assert_same(engine.generate([[7, 8]], SamplingOptions(8, 0.0), [0]), expected)


def test_a_server_killed_and_restarted_in_a_rollout_goes_on_with_the_right_weights(
    server: Server, colocated: RolloutEngine, model_dir: Path, tmp_path: Path
) -> None:
    notices: list[str] = []
    engine = connect(server, model_dir, tmp_path, notices)
    policy = load_llama(model_dir)
    perturb(policy, seed=3)
    engine.load_weights(policy.named_parameters(), version=3)
    prompts, sampling, seeds = prompts_of([8] * 256), SamplingOptions(400, 1.5), list(range(256))

    def fail_and_return() -> None:
        time.sleep(0.5)
        server.kill()
        server.start()

    chaos = threading.Thread(target=fail_and_return)
    chaos.start()
    ours = engine.generate(prompts, sampling, seeds)
    chaos.join()
    assert any("waiting for it" in notice for notice in notices)
    assert any("loading them again" in notice for notice in notices)
    assert {completion.policy_version for completion in ours} == {3}
    colocated.load_weights(policy.named_parameters())
    assert_same(ours, colocated.generate(prompts, sampling, seeds))
    engine.close()


def test_a_server_gone_for_good_is_an_error_and_leaves_nothing_behind(
    server: Server, model_dir: Path, tmp_path: Path
) -> None:
    engine = connect(server, model_dir, tmp_path, [], patience_seconds=3)
    engine.load_weights(load_llama(model_dir).named_parameters(), version=1)
    server.process.kill()  # `tristage serve` alone: what it started must notice
    assert server.left_over(60) == []
    started = time.monotonic()
    with pytest.raises(RolloutServerError, match=r"cannot be reached.*patience_seconds.*`tristage serve") as failure:
        engine.generate([[7, 8]], SamplingOptions(8), [0])
    assert 1 < time.monotonic() - started < 8
    assert server.url in str(failure.value)
    engine.close()
    assert not (tmp_path / "weights").exists()


def test_serve_ends_in_order_when_told_to(server: Server) -> None:
    server.start()
    server.wait()
    server.process.terminate()
    assert server.process.wait(30) == 0
    assert server.left_over(10) == []
    assert server.log.read_text().rstrip().endswith("the server has ended.")
