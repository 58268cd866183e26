"""vLLM's own OpenAI server with a small local model as the judge, from the recipe to the decisions."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.evaluation.contests import Contest, PairwiseJudge
from pipeline.evaluation.judges import load_pairwise_judges
from pipeline.evaluation.llm_judge import IS_TOO_LONG
from pipeline.load import load_recipe

pytest.importorskip("vllm")
ROOT = Path(__file__).resolve().parent.parent.parent
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
START_SECONDS = 300
RECIPE = """\
name: judged
model:
  name_or_path: m
eval:
  judges:
    model:
      llm:
        base_url: {url}
        model: critic
        template: "A: {{a}} B: {{b}} Which one answers {{prompt}} best?"
        max_tokens: 8
        retries: 1
        constrain: true
        concurrency: 4
"""
CONTESTS = [
    Contest(i, 0, 0, "ppo", "sft", f"number {i}", f"a wonderful film {i}", f"dull and far too long {i}")
    for i in range(6)
]
ENDLESS = Contest(9, 0, 0, "ppo", "sft", "number 9", "very " * 2000, "good")


@contextlib.contextmanager
def vllm_server(model: Path, folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """vLLM's server on a free port of loopback; it and all that it started are ended at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE)
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", "critic", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8",
        "--chat-template", str(folder / "chat.jinja"),
    ]  # fmt: skip
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, (folder / "server.log").read_text()[-3000:]
            assert time.monotonic() < deadline, "vLLM's server did not start"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", server
    finally:
        _end(server)


def _answers(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ends the server, and with its group whatever it left behind."""
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _judge(url: str, folder: Path, *overrides: str) -> PairwiseJudge:
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(url=url))
    return load_pairwise_judges(load_recipe(file, overrides).eval, folder / "judges", print)["model"]


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_s_server_judges(tmp_path: Path) -> None:
    """A model this small has no opinion, so the server is told to allow nothing but the three verdicts."""
    with vllm_server(ROOT / "assets" / "demo-base", tmp_path) as (url, server):
        judge = _judge(url, tmp_path)
        decisions = judge.decide([*CONTESTS, ENDLESS])
        assert [d.outcome in (0.0, 0.25, 0.5, 0.75, 1.0) for d in decisions[:-1]] == [True] * 6
        assert all(d.orders is not None and set(d.orders) <= {"a", "b", "tie"} for d in decisions[:-1])
        assert (decisions[-1].outcome, decisions[-1].reason) == (None, IS_TOO_LONG)
        costs = judge.costs()
        assert (costs["requests"], costs["cached"], costs["now"]["requests"], costs["now"]["retries"]) == (12, 0, 13, 0)
        assert costs["prompt_tokens"] > 12 * 10
        assert 12 <= costs["completion_tokens"] <= 12 * 8

        free = _judge(url, tmp_path, "--eval.judges.model.llm.constrain", "false")
        with pytest.raises(UserError, match="critic came to a verdict on none of 6 contests"):
            free.decide(CONTESTS)
        unknown = _judge(url, tmp_path, "--eval.judges.model.llm.model", "nobody")
        with pytest.raises(UserError, match=r"answered 404: .*nobody.*Check base_url.*model \('nobody'\)"):
            unknown.decide(CONTESTS)

        server.terminate()
        server.wait(30)
        again = _judge(url, tmp_path)
        assert again.decide(CONTESTS) == decisions[:-1]
        assert again.costs()["now"]["requests"] == 0
        with pytest.raises(UserError, match=r"eval\.judges\.model\.llm: .* cannot be reached: .* Start the server"):
            again.decide([ENDLESS])
