"""What the server engine makes of a server that refuses, hangs, restarts, forgets or lies."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from pipeline.errors import UserError
from pipeline.recipe_rollout import ServerSection
from rollout.engine import EngineOptions, SamplingOptions
from rollout.server_client import RolloutServerError, ServerClient
from rollout.server_engine import UNFINISHED, ServerEngine
from rollout.weight_files import read_weights
from tests.rollout.fake_server import (
    FakeServer,
    Fault,
    Handler,
    garbage,
    hang,
    response,
    restart,
    serving,
    slow,
    status,
    tokens_for,
)
from tests.rollout.tiny import POSITIONS, STOP, VOCABULARY

OPTIONS = EngineOptions(POSITIONS, 8, STOP)
SAMPLING = SamplingOptions(5, 0.7)
PROMPTS = [[7, 8], [9], [10, 11, 12], [13]]
SEEDS = [3, 1, 2**40, 7]
HAND_OVER = [
    "/pause?mode=wait", "/update_weight_version", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version",
    "/resume",
]  # fmt: skip


def shapes_of(policy: LlamaForCausalLM) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in policy.named_parameters()}


@pytest.fixture
def fake(policy: LlamaForCausalLM) -> Iterator[FakeServer]:
    with serving(FakeServer(shapes_of(policy))) as server:
        yield server


def connect(
    fake: FakeServer, tied_dir: Path, folder: Path, *, patience: float = 5.0, timeout: float = 5.0
) -> ServerEngine:
    settings = ServerSection(url=fake.url, patience_seconds=patience, timeout_seconds=timeout)
    engine = ServerEngine(tied_dir, OPTIONS, settings, folder / "weights", lambda line: None)
    fake.bodies.clear()
    return engine


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "weights").glob("*/*"))


def check(engine: ServerEngine, version: int = 0) -> None:
    """A rollout gives every prompt its own response, whatever happens."""
    completions = engine.generate(PROMPTS, SAMPLING, SEEDS)
    assert [list(c.token_ids) for c in completions] == [
        tokens_for(prompt, seed, 5) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    for completion in completions:
        assert completion.logprobs == tuple(-token / 128 for token in completion.token_ids)
        assert completion.policy_version == version
        assert not completion.finished


def test_tokens_and_settings_go_out_as_they_are(fake: FakeServer, tied_dir: Path, tmp_path: Path) -> None:
    engine = connect(fake, tied_dir, tmp_path)
    assert fake.loaded == [str(tied_dir)]
    assert fake.calls == ["/collective_rpc", *HAND_OVER]
    check(engine)
    bodies = sorted(fake.bodies, key=lambda body: SEEDS.index(body["sampling_params"]["seed"]))
    assert [body["token_ids"] for body in bodies] == PROMPTS
    parameters = bodies[0]["sampling_params"]
    assert parameters["temperature"] == 0.7
    assert parameters["max_tokens"] == 5
    assert parameters["stop_token_ids"] == list(STOP)
    assert parameters["ignore_eos"] is True
    assert (parameters["top_p"], parameters["top_k"], parameters["min_p"]) == (1.0, 0, 0.0)
    assert engine.generate([], SAMPLING, []) == []
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate([[7]], SAMPLING, [0])


def test_a_response_that_ends_with_a_stop_token_is_finished(
    fake: FakeServer, tied_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = connect(fake, tied_dir, tmp_path)
    monkeypatch.setattr("tests.rollout.fake_server.tokens_for", lambda prompt, seed, size: [9, STOP[1]])
    assert engine.generate([[7]], SAMPLING, [0])[0].finished


@pytest.mark.parametrize(
    ("fault", "fewest", "most"),
    [(status(500), 6, 6), (status(503), 6, 6), (status(429), 6, 6), (restart, 6, 8), (slow, 4, 4)],
    ids=["500", "503", "429", "restart", "slow"],
)
def test_what_passes_is_tried_again(
    fake: FakeServer, tied_dir: Path, tmp_path: Path, fault: Fault, fewest: int, most: int
) -> None:
    """A restart in between may spoil the two responses that did not fail."""
    engine = connect(fake, tied_dir, tmp_path)
    fake.faults += [fault, fault]
    check(engine)
    assert not fake.faults
    assert fewest <= len(fake.bodies) <= most


def test_a_hang_ends_with_the_time_limit(fake: FakeServer, tied_dir: Path, tmp_path: Path) -> None:
    engine = connect(fake, tied_dir, tmp_path, timeout=0.5)
    fake.faults.append(hang)
    started = time.monotonic()
    check(engine)
    assert 0.5 < time.monotonic() - started < 4


def test_a_server_that_hangs_is_sent_nothing_more(fake: FakeServer, tied_dir: Path, tmp_path: Path) -> None:
    """Forty rows, eight at once, a limit of half a second: five such limits would pass if all of them were sent."""
    engine = connect(fake, tied_dir, tmp_path, timeout=0.5, patience=0.6)
    fake.faults += [hang] * 40
    started = time.monotonic()
    with pytest.raises(RolloutServerError, match="gave no answer to /inference"):
        engine.generate([[7]] * 40, SAMPLING, list(range(40)))
    assert time.monotonic() - started < 2
    assert len(fake.bodies) <= 16


def test_responses_of_other_weights_are_thrown_away(fake: FakeServer, tied_dir: Path, tmp_path: Path) -> None:
    """One sampled by another version, one in part, one without a label, and one that was broken off."""
    engine = connect(fake, tied_dir, tmp_path)

    def lie(*labels: str, **changes: Any) -> Any:
        def act(handler: Handler) -> bool:
            answer = response(handler.server.bodies[-1], *labels)
            answer["choices"][0].update(changes, token_ids=[99] * 5)
            handler.answer(answer)
            return True

        return act

    fake.faults += [lie("default"), lie(fake.label, "other"), lie(), lie(fake.label, finish_reason="abort")]
    check(engine)
    assert len(fake.bodies) == 8


def test_a_restarted_server_gets_the_current_weights_before_it_samples(
    fake: FakeServer, tied_dir: Path, tmp_path: Path, policy: LlamaForCausalLM
) -> None:
    engine = connect(fake, tied_dir, tmp_path)
    engine.load_weights(policy.named_parameters(), version=9)
    label, fake.label = fake.label, "default"
    check(engine, version=9)
    assert fake.label == label
    assert fake.loaded[1] == fake.loaded[2]
    assert Path(fake.loaded[1]).name == "version-9"


def test_two_programs_on_one_server_are_told_apart(fake: FakeServer, tied_dir: Path, tmp_path: Path) -> None:
    engine = connect(fake, tied_dir, tmp_path)

    def steal(handler: Handler) -> bool:
        handler.answer(response(handler.server.bodies[-1], "another/0"))
        return True

    fake.faults += [steal] * 50
    with pytest.raises(RolloutServerError, match=r"another program loads weights.*server of its own"):
        engine.generate([[7]], SAMPLING, [0])
    assert len(fake.bodies) == 5


# Answers that no other try mends


@pytest.mark.parametrize("data", [b"<html>", b"[]", b'{"choices": [{}]}', b'{"choices": []}'])
def test_an_answer_that_is_none_of_vllm_s(fake: FakeServer, tied_dir: Path, tmp_path: Path, data: bytes) -> None:
    engine = connect(fake, tied_dir, tmp_path)
    fake.faults.append(garbage(data))
    with pytest.raises(RolloutServerError, match=r"cannot be understood.*`tristage serve"):
        engine.generate([[7]], SAMPLING, [0])
    assert len(fake.bodies) == 1


def test_a_refusal_is_told_at_once(fake: FakeServer, tied_dir: Path, tmp_path: Path) -> None:
    engine = connect(fake, tied_dir, tmp_path)
    fake.faults.append(status(403))
    with pytest.raises(RolloutServerError, match=r"answered 403.*out of sorts.*`tristage serve"):
        engine.generate([[7]], SAMPLING, [0])
    with pytest.raises(ValueError, match=f"0 to {VOCABULARY - 1}"):
        engine.generate([[VOCABULARY]], SAMPLING, [0])


def test_log_probabilities_without_a_value_are_refused(fake: FakeServer, tied_dir: Path, tmp_path: Path) -> None:
    engine = connect(fake, tied_dir, tmp_path)

    def act(handler: Handler) -> bool:
        answer = response(handler.server.bodies[-1], handler.server.label)
        answer["choices"][0]["logprobs"]["content"][2]["logprob"] = -9999.0
        handler.answer(answer)
        return True

    fake.faults.append(act)
    with pytest.raises(ValueError, match="not finite"):
        engine.generate([[7]], SAMPLING, [0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_model_len": 100}, "takes 100 tokens, but 512 are needed"),
        ({"logprobs_mode": "raw_logprobs"}, "logprobs_mode raw_logprobs"),
        ({"dtype": "bfloat16"}, "dtype bfloat16, but float32"),
    ],
)
def test_a_server_that_was_started_for_something_else(
    fake: FakeServer, tied_dir: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    fake.model |= change
    with pytest.raises(RolloutServerError, match=rf"{message}.*tristage serve"):
        connect(fake, tied_dir, tmp_path)
    fake.receiver = None
    fake.calls.clear()
    with pytest.raises(RolloutServerError, match="was not started by `tristage serve`"):
        connect(fake, tied_dir, tmp_path)
    assert fake.calls == []  # a worker that does not know the method would die of the call


def test_no_server_is_an_error_within_the_patience(tied_dir: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ServerSection(url=f"http://127.0.0.1:{port}", patience_seconds=2.0)
    notices: list[str] = []
    started = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be reached.*waited for \d seconds.*Start the server") as failure:
        ServerEngine(tied_dir, OPTIONS, settings, tmp_path, notices.append)
    assert time.monotonic() - started < 4
    assert str(port) in failure.value.message
    assert len(notices) == 1


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://localhost:8000", "`tristage serve RECIPE`"),
        ("http://[::1]:8000", "`tristage serve RECIPE`"),
        ("http://node:8000", "on its machine with `tristage serve RECIPE --host 0.0.0.0`"),
    ],
)
def test_how_the_server_is_started_depends_on_where_it_is(url: str, words: str) -> None:
    client = ServerClient(ServerSection(url=url))
    assert client.start.endswith(words)
    client.close()


def test_a_server_that_starts_late_is_waited_for(policy: LlamaForCausalLM, tied_dir: Path, tmp_path: Path) -> None:
    late = FakeServer(shapes_of(policy))
    port = late.server_address[1]
    late.server_close()
    settings = ServerSection(url=late.url, patience_seconds=20.0)
    ready = threading.Event()

    def open_late() -> None:
        time.sleep(0.7)
        with serving(FakeServer(shapes_of(policy), port)):
            ready.wait(20)

    thread = threading.Thread(target=open_late)
    thread.start()
    try:
        check(ServerEngine(tied_dir, OPTIONS, settings, tmp_path, lambda line: None))
    finally:
        ready.set()
        thread.join()


# Weights


def test_weights_go_through_files_of_which_two_versions_stay(
    fake: FakeServer, tied_dir: Path, tmp_path: Path, policy: LlamaForCausalLM
) -> None:
    folder = tmp_path / "weights"
    engine = connect(fake, tied_dir, tmp_path)
    for version, given in ((4, 4), (5, None), (6, 6)):
        engine.load_weights(policy.state_dict().items(), version=given)  # names the tied head too
        assert engine.policy_version == version
        assert Path(fake.loaded[-1]).name == f"version-{version}"
        check(engine, version)
    assert written(tmp_path) == ["version-5", "version-6"]
    held = dict(read_weights(Path(fake.loaded[-1])))
    assert held.keys() == dict(policy.named_parameters()).keys()
    for name, parameter in policy.named_parameters():
        assert torch.equal(held[name], parameter)
    engine.close()
    assert not folder.exists()


def test_two_engines_of_one_directory_keep_their_weights_apart(
    fake: FakeServer, tied_dir: Path, tmp_path: Path, policy: LlamaForCausalLM
) -> None:
    one, other = connect(fake, tied_dir, tmp_path), connect(fake, tied_dir, tmp_path)
    given = dict(policy.named_parameters())
    one.load_weights(given.items())
    first = Path(fake.loaded[-1])
    other.load_weights((name, tensor + 1) for name, tensor in given.items())
    second = Path(fake.loaded[-1])
    for directory, difference in ((first, 0), (second, 1)):
        held = dict(read_weights(directory))
        assert all(torch.equal(held[name], tensor + difference) for name, tensor in given.items())
    other.close()
    assert first.exists()
    assert not second.parent.exists()
    check(one, version=1)
    assert fake.loaded[-1] == str(first)
    one.close()
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize("kind", ["missing", "unknown", "shape"])
def test_half_given_weights_never_reach_the_server(
    fake: FakeServer, tied_dir: Path, tmp_path: Path, policy: LlamaForCausalLM, kind: str
) -> None:
    engine = connect(fake, tied_dir, tmp_path)
    weights: dict[str, torch.Tensor] = dict(policy.named_parameters())
    norm = weights["model.norm.weight"]
    if kind == "missing":
        del weights["model.norm.weight"]
    else:
        weights["module.norm" if kind == "unknown" else "model.norm.weight"] = norm[:1]
    fake.calls.clear()
    with pytest.raises(ValueError, match="norm"):
        engine.load_weights(weights.items())
    assert fake.calls == []
    assert written(tmp_path) == []
    with pytest.raises(RuntimeError, match="half-way"):
        engine.generate([[7]], SAMPLING, [0])
    engine.load_weights(policy.named_parameters())
    check(engine, version=1)


def test_a_cache_that_is_not_emptied_is_no_hand_over(
    fake: FakeServer, tied_dir: Path, tmp_path: Path, policy: LlamaForCausalLM
) -> None:
    engine = connect(fake, tied_dir, tmp_path)
    fake.calls.clear()
    fake.cache_resets = [False]
    engine.load_weights(policy.named_parameters())
    assert fake.calls == [*HAND_OVER[:4], "/resume", *HAND_OVER]
    impatient = connect(fake, tied_dir, tmp_path, patience=0.1)
    fake.cache_resets = [False] * 9
    with pytest.raises(RolloutServerError, match="prefix cache"):
        impatient.load_weights(policy.named_parameters())
    assert fake.label == UNFINISHED
    assert fake.calls[-1] == "/resume"


def test_weights_that_the_server_does_not_see(
    fake: FakeServer, tied_dir: Path, tmp_path: Path, policy: LlamaForCausalLM
) -> None:
    engine = connect(fake, tied_dir, tmp_path, patience=1.5)
    fake.refusals = [{"error": "version-1 does not exist here", "passing": True}]
    engine.load_weights(policy.named_parameters())
    check(engine, version=1)
    fake.refusals = [{"error": "version-2 does not exist here", "passing": True}] * 99
    started = time.monotonic()
    with pytest.raises(RolloutServerError, match=r"does not exist here.*weights_dir"):
        engine.load_weights(policy.named_parameters())
    assert 1.5 < time.monotonic() - started < 4
    fake.refusals = [{"error": "of another shape", "passing": False}]
    with pytest.raises(RolloutServerError, match="of another shape"):
        engine.load_weights(policy.named_parameters())
    assert fake.refusals == []
