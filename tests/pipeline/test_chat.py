"""The conversation in the terminal: commands, memory, several lines, a real pseudo-terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.chat import chat
from pipeline.conversation import Conversation, open_conversation, printable
from pipeline.errors import UserError
from pipeline.load import RESOLVED
from tests.pipeline.conftest import CHAT_TEMPLATE
from tests.tiny_stage import save_tiny_policy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def chat_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("chat-policy"), chat_template=CHAT_TEMPLATE)


def _open(policy: Path, max_new_tokens: int = 8) -> Conversation:
    return open_conversation(policy, temperature=1.0, max_new_tokens=max_new_tokens, engine="transformers", seed=1)


def _said(policy: Path, typed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    chat(policy, max_new_tokens=8, seed=1)
    return capsys.readouterr().out


def test_a_text_model_completes_and_remembers_nothing(policy: Path) -> None:
    conversation = _open(policy)
    conversation.set_temperature("0")
    first = conversation.reply("this film is")
    assert conversation.reply("this film is") == first
    assert conversation.messages == []
    assert (first.tokens, first.finished) in [(8, False)] or first.finished


def test_the_reply_is_the_engines_sample_after_the_prompt(policy: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    conversation = _open(policy)
    conversation.set_temperature("0")
    tokenizer, model = AutoTokenizer.from_pretrained(policy), AutoModelForCausalLM.from_pretrained(policy)
    ids = tokenizer("this film is")["input_ids"]
    start = len(ids)
    while len(ids) < start + 8 and ids[-1] != tokenizer.eos_token_id:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert conversation.reply("this film is").text == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_a_reply_ends_where_the_recipe_of_the_policy_stops_responses(policy: Path, tmp_path: Path) -> None:
    conversation = _open(policy)
    conversation.set_temperature("0")
    whole = conversation.reply("this film is")
    assert whole.tokens > 2
    first_words = whole.text[: len(whole.text) // 2]
    trained = tmp_path / "trained"
    shutil.copytree(policy, trained)
    (trained / RESOLVED).write_text(yaml.safe_dump({"name": "t", "rollout": {"stop": [first_words]}}))
    stopped = _open(trained)
    stopped.set_temperature("0")
    reply = stopped.reply("this film is")
    assert reply.finished
    assert reply.tokens < whole.tokens
    assert first_words in reply.text


def test_a_chat_model_remembers_until_reset(chat_policy: Path) -> None:
    conversation = _open(chat_policy)
    first = conversation.reply("this film")
    conversation.reply("the plot")
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert conversation.messages[1]["content"] == first.text
    conversation.reset()
    assert conversation.messages == []


def test_the_oldest_exchanges_make_room(chat_policy: Path) -> None:
    conversation = _open(chat_policy)
    forgotten = [conversation.reply("this film is a quiet wonder").forgotten for _ in range(8)]
    assert forgotten[0] == 0
    assert max(forgotten) >= 2
    assert all(count % 2 == 0 for count in forgotten)
    assert conversation.messages[0]["role"] == "user"


def test_a_message_over_the_context_is_refused_and_not_kept(chat_policy: Path) -> None:
    conversation = _open(chat_policy)
    with pytest.raises(ValueError, match="the model reads 120 at most"):
        conversation.reply("wonder " * 200)
    assert conversation.messages == []


@pytest.mark.parametrize("text", ["warm", "", "-1", "0.001", "nan"])
def test_a_temperature_that_cannot_be_is_refused(policy: Path, text: str) -> None:
    conversation = _open(policy)
    with pytest.raises(ValueError, match=r"is not a number|temperature must be"):
        conversation.set_temperature(text)
    assert conversation.temperature == 1.0


def test_commands(policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed = "/help\n/temp 0.5\n/temp hot\n/wrong\n/reset\n\n//slash\n/quit\nnever reached\n"
    said = _said(policy, typed, monkeypatch, capsys)
    for part in ("completes what you type", "/temp 0.7", "(temperature 0.5)", "'hot' is not a number", "no /wrong"):
        assert part in said
    assert "\n/slash" in said
    assert said.count(" tokens, ") == 1
    assert "never reached" not in said


def test_several_lines_are_one_message(
    policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = _said(policy, '"""\nthis film\nis old\n"""\nthe plot\n', monkeypatch, capsys)
    assert "this film\nis old" in said
    assert said.count(" tokens, ") == 2


def test_an_unclosed_block_ends_with_the_input(
    policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _said(policy, '"""\nthis film\nis old', monkeypatch, capsys).count(" tokens, ") == 1


def test_wrong_directories_and_options_are_told(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        chat(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="chat"):
        chat(tmp_path / "empty")
    with pytest.raises(UserError, match="--max-new-tokens is 128"):
        chat(policy, max_new_tokens=128)
    with pytest.raises(UserError, match="--temperature"):
        chat(policy, temperature=-1.0, max_new_tokens=8)


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("red \x1b[31m text\r\x07\n\tend é 你") == "red [31m text\n\tend é 你"


@pytest.mark.slow
def test_pasted_lines_are_one_message_on_a_terminal(policy: Path) -> None:
    parent, child = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "pipeline.cli", "chat", str(policy), "--max-new-tokens", "8"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=child, stdout=child, stderr=child)
    os.close(child)
    try:
        seen = read_until(parent, "> ")
        os.write(parent, b"\x1b[200~this film\ris old\x1b[201~\r")
        seen += read_until(parent, " tokens, ")
        os.write(parent, b"/quit\r")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(parent)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen).replace("\r", "")
    assert "/help lists the commands" in plain
    assert "this film\nis old" in plain
    assert plain.count(" tokens, ") == 1


def read_until(terminal: int, text: str, seconds: float = 120.0) -> str:
    deadline, seen = time.monotonic() + seconds, ""
    while text not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no {text!r} within {seconds} s, only {seen!r}"
        try:
            seen += os.read(terminal, 4096).decode(errors="replace")
        except OSError:  # the other side has gone
            pytest.fail(f"no {text!r} before the end of {seen!r}")
    return seen
