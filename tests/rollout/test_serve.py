"""`tristage serve` and what it puts into vLLM's worker; tests/e2e/test_rollout_server.py starts it for real."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoConfig

from pipeline import cli
from pipeline.errors import UserError
from pipeline.process import Ended
from pipeline.recipe import Recipe
from pipeline.recipe_rollout import ServerSection
from rollout import serve as module
from rollout.engine import engine_options
from rollout.serve import say_who_reaches, serve, server_environment, server_words
from rollout.weight_files import write_weights
from tests.rollout.tiny import POSITIONS, load_llama, save_llama

RECIPE = Recipe.model_validate(
    {
        "name": "served",
        "seed": 3,
        "model": {"name_or_path": "m", "dtype": "bfloat16"},
        "data": {"max_prompt_tokens": 384, "max_response_tokens": 128},
        "rollout": {"kv_cache_gib": 0.5, "server": {"options": ["--tensor-parallel-size", "2"]}},
    }
)


def given(words: list[str]) -> dict[str, str]:
    return {word: following for word, following in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}


@pytest.mark.parametrize("cpu", [True, False])
def test_the_server_is_started_with_what_the_colocated_engine_has(cpu: bool) -> None:
    words = server_words(Path("policy"), engine_options(RECIPE, ()), "127.0.0.1", 8001, cpu=cpu)
    options = given(words)
    assert (options["--model"], options["--host"], options["--port"]) == ("policy", "127.0.0.1", "8001")
    assert (options["--dtype"], options["--seed"], options["--max-model-len"]) == ("bfloat16", "3", "512")
    assert (options["--logprobs-mode"], options["--generation-config"]) == ("processed_logprobs", "vllm")
    assert options.get("--kv-cache-memory-bytes") == (str(2**29) if cpu else None)
    assert {"--enforce-eager", "--no-enable-chunked-prefill"} <= set(words) if cpu else "--enforce-eager" not in words
    assert {"--enable-scale-out", "--skip-tokenizer-init"} <= set(words)


def test_the_server_finds_this_package_and_reports_to_nobody() -> None:
    environment = server_environment({"PYTHONPATH": "mine", "VLLM_LOGGING_LEVEL": "DEBUG"})
    assert environment["PYTHONPATH"].split(":") == [str(Path(__file__).resolve().parent.parent.parent), "mine"]
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert environment["VLLM_NO_USAGE_STATS"] == "1"
    assert environment["VLLM_LOGGING_LEVEL"] == "DEBUG"


def test_a_server_that_ends_by_itself_is_an_error(tied_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run_child(words: list[str], *, lock: int) -> Ended:
        del lock
        seen.append(words)
        return Ended(7, None)

    monkeypatch.setattr(module, "_say_ready", lambda *arguments: None)
    for name in server_environment({}):
        monkeypatch.setenv(name, "")
    lines: list[str] = []
    monkeypatch.setattr(module, "run_child", run_child)
    with pytest.raises(UserError, match="ended with exit code 7"):
        serve(RECIPE, str(tied_dir), "10.0.0.1", 8001, lines.append)
    assert seen[0][:3] == [sys.executable, "-m", "rollout.serve_child"]
    assert seen[0][-2:] == ["--tensor-parallel-size", "2"]
    assert any("10.0.0.1:8001" in line and "change its model" in line for line in lines)


@pytest.mark.parametrize(
    ("host", "url", "words"),
    [
        ("127.0.0.1", "http://localhost:8000", None),
        ("0.0.0.0", "http://node:8000", "whoever reaches 0.0.0.0:8001 can use"),
        ("fd00::7", "http://node:8000", r"whoever reaches \[fd00::7\]:8001 can use"),
        ("127.0.0.1", "http://node:8000", r"names node, and the server listens on 127\.0\.0\.1 only: add --host 0"),
    ],
)
def test_who_reaches_the_server_is_told(host: str, url: str, words: str | None) -> None:
    lines: list[str] = []
    say_who_reaches(host, 8001, url, lines.append)
    if words is None:
        assert lines == []
    else:
        (line,) = lines
        assert re.search(words, line)


@pytest.mark.parametrize(
    ("host", "asked", "told"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("::1", "[::1]", "[::1]"),
        ("0.0.0.0", "127.0.0.1", socket.gethostname()),
        ("::", "[::1]", socket.gethostname()),
    ],
)
def test_the_ready_line_is_an_address_for_the_recipe(
    host: str, asked: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for: list[str] = []

    def get(client: httpx.Client, url: str) -> httpx.Response:
        asked_for.append(url)
        return httpx.Response(200)

    monkeypatch.setattr(httpx.Client, "get", get)
    lines: list[str] = []
    vars(module)["_say_ready"](host, 8001, lines.append)
    assert asked_for == [f"http://{asked}:8001/health"]
    assert lines == [f"ready: rollout.server.url: http://{told}:8001"]


@pytest.mark.parametrize("port", ["abc", "70000", "0", ""])
def test_a_url_without_a_real_port_is_refused(port: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "r.yaml").write_text("name: x\nmodel: {name_or_path: m}\n")
    with pytest.raises(SystemExit):
        cli.main(["serve", str(tmp_path / "r.yaml"), "--rollout.server.url", f"http://node:{port}"])
    assert "rollout.server.url" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://node", "https://a.b:443/", "http://[fd00::7]:8000", "http://me:word@node:80"])
def test_urls_that_are_taken(url: str) -> None:
    assert ServerSection(url=url).url == url


def test_ranks_wait_for_each_other_as_long_as_for_the_server() -> None:
    server = {"mode": "server", "server": {"timeout_seconds": 600, "patience_seconds": 300}}
    sections = {"name": "x", "model": {"name_or_path": "m"}, "rollout": server}
    with pytest.raises(ValueError, match=r"must be at least 2 \* .*\(1500\)"):
        Recipe.model_validate({**sections, "launch": {"processes": 2, "timeout_seconds": 1499}})
    Recipe.model_validate({**sections, "launch": {"processes": 2, "timeout_seconds": 1500}})
    Recipe.model_validate({**sections, "launch": {"timeout_seconds": 5}})


def test_what_cannot_be_served_is_told_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "r.yaml").write_text("name: x\nmodel: {name_or_path: m}\n")
    with pytest.raises(SystemExit):
        cli.main(["serve", str(tmp_path / "r.yaml"), "--policy", str(tmp_path)])
    assert "has no config.json" in capsys.readouterr().err


def test_policy_and_port_come_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.yaml").write_text("name: x\noutput_dir: out\nmodel: {name_or_path: m}\n")
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "serve", lambda recipe, *words: asked.append(words[:3]))
    recipe = str(tmp_path / "r.yaml")
    cli.main(["serve", recipe])
    cli.main(["serve", recipe, "--rollout.server.url", "http://node:81", "--ppo.policy", "p", "--host", "0.0.0.0"])
    cli.main(["serve", recipe, "--port", "5", "--policy", "q"])
    assert asked == [("out/x/sft", "127.0.0.1", 8000), ("p", "0.0.0.0", 81), ("q", "127.0.0.1", 5)]


@pytest.mark.vllm
@pytest.mark.slow
def test_the_child_ends_with_the_exit_code_of_the_server() -> None:
    """vLLM's parser refuses the word."""
    words = [sys.executable, "-m", "rollout.serve_child", "--no-such-option"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, process_group=0)
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr


# In the worker


class Worker:
    """What `WeightReceiver` needs of vLLM's worker; `loaded` are the weights that reached the model."""

    def __init__(self, directory: Path) -> None:
        config = AutoConfig.from_pretrained(directory)
        model_config = type("ModelConfig", (), {"hf_config": config, "hf_text_config": config})
        model_config.max_model_len, model_config.logprobs_mode, model_config.dtype = 512, "raw_logprobs", torch.float32  # pyright: ignore[reportAttributeAccessIssue]
        self.vllm_config = type("VllmConfig", (), {"model_config": model_config})
        self.loaded: dict[str, torch.Tensor] = {}

    def reload_weights(self, *, weights_iterator: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.loaded = dict(weights_iterator)

    def get_model(self) -> torch.nn.Module:
        return torch.nn.Module()


@pytest.mark.vllm
def test_the_worker_checks_everything_before_it_touches_the_model(tied_dir: Path, tmp_path: Path) -> None:
    from rollout.server_worker import WeightReceiver

    worker = type("Served", (Worker, WeightReceiver), {})(tied_dir)
    policy = load_llama(tied_dir)
    described = worker.describe_model()
    assert described["vocab_size"] == 128
    assert (described["max_model_len"], described["logprobs_mode"], described["dtype"]) == (
        POSITIONS,
        "raw_logprobs",
        "float32",
    )
    assert described["weights"] == {name: list(each.shape) for name, each in policy.named_parameters()}

    assert worker.receive_weights(str(tmp_path / "nowhere"))["passing"]
    cut = save_llama(tmp_path / "cut", tied=True) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    weights = dict(policy.named_parameters())
    write_weights(list(weights.items())[1:], tmp_path / "lacking", torch.float32)
    for name, reason in (("cut", "cannot be read"), ("lacking", "lacks 1 weights of the model")):
        answer = worker.receive_weights(str(tmp_path / name))
        assert reason in answer["error"]
        assert not answer["passing"]
    assert worker.loaded == {}
    write_weights(weights.items(), tmp_path / "whole", torch.float32)
    assert worker.receive_weights(str(tmp_path / "whole")) == {"error": None, "passing": False}
    assert all(torch.equal(worker.loaded[name], weight) for name, weight in weights.items())
