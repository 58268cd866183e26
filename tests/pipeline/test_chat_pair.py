"""Two policies in one terminal: the same input and random numbers, conversations of their own, columns or not."""

from __future__ import annotations

import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.chat import chat
from pipeline.chat_pair import reply_pair, show_pair
from pipeline.conversation import Conversation, Reply, open_conversation
from pipeline.errors import UserError
from tests.pipeline.conftest import CHAT_TEMPLATE
from tests.pipeline.test_chat import ROOT, read_until
from tests.tiny_stage import save_tiny_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def chat_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("other"), chat_template=CHAT_TEMPLATE)


def opened(*policies: Path) -> list[Conversation]:
    return [
        open_conversation(policy, temperature=1.0, max_new_tokens=8, engine="transformers", seed=1)
        for policy in policies
    ]


def said(policy: Path, against: Path, typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    chat(policy, against=against, max_new_tokens=8, seed=1)


def test_the_same_policy_twice_says_the_same_turn_after_turn(policy: Path) -> None:
    pair = opened(policy, policy)
    answers = [reply_pair("this film is", pair) for _ in range(3)]
    assert all(one == other for one, other in answers)
    assert len({one.text for one, _ in answers if isinstance(one, Reply)}) > 1


def test_each_remembers_its_own_conversation(policy: Path, chat_policy: Path) -> None:
    pair = opened(chat_policy, policy)
    first, _ = reply_pair("this film", pair)
    assert isinstance(first, Reply)
    assert pair[0].messages == [
        {"role": "user", "content": "this film"},
        {"role": "assistant", "content": first.text},
    ]
    assert pair[1].messages == []


def test_a_message_that_one_cannot_read_is_answered_by_the_other(policy: Path, chat_policy: Path) -> None:
    """The template adds a few tokens, which are too many for the one and not there for the other."""
    pair = opened(chat_policy, policy)
    text = "a" * 119
    refused, answered = reply_pair(text, pair)
    assert isinstance(refused, str)
    assert "the model reads 120 at most" in refused
    assert isinstance(answered, Reply)
    assert pair[0].messages == []
    both = reply_pair("this", pair)
    assert pair[0].turns == pair[1].turns == 2
    assert all(isinstance(reply, Reply) for reply in both)


def test_commands_act_on_both(
    policy: Path, chat_policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said(chat_policy, policy, "/temp hot\n/temp 0\nthis film\n/reset\nthis film\n/quit\n", monkeypatch)
    out = capsys.readouterr().out
    assert f"{chat_policy} answers turn by turn. {policy} completes what you type." in out
    assert "which act on both" in out
    assert "'hot' is not a number" in out
    before, after = out.partition("(temperature 0)")[2].split("(nothing is remembered)")
    assert before.strip() == after.strip()
    assert out.count(" tokens, ") == 4


def test_in_a_pipe_the_answers_stand_one_under_the_other(
    policy: Path, chat_policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    said(policy, chat_policy, "this film\n", monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    places = [lines.index(str(policy)), lines.index(str(chat_policy))]
    assert lines[places[0] + 1].startswith("this film")
    assert places[0] < places[1]


@pytest.mark.parametrize(("width", "columns"), [(100, True), (160, True), (99, False), (40, False)])
def test_a_wide_terminal_shows_columns_and_a_narrow_one_does_not(policy: Path, width: int, columns: bool) -> None:
    pair = opened(policy, policy)
    pair[0].name, pair[1].name = "runs/x/ppo", "runs/x/dpo"
    replies = [Reply("one " * 30, 30, True, 0), Reply("two " * 30, 30, False, 2)]
    console = Console(width=width, force_terminal=True, file=io.StringIO(), record=True, highlight=False)
    show_pair(console, "ask ", pair, replies)
    lines = console.export_text().splitlines()
    assert any("runs/x/ppo" in line and "runs/x/dpo" in line for line in lines) == columns
    assert any("one" in line and "two" in line for line in lines) == columns
    text = " ".join(line for line in lines)
    assert "30 tokens, ended by itself" in text
    assert "cut at the limit" in text
    if columns:
        assert all(len(line) <= width for line in lines)


def test_control_characters_of_neither_reach_the_terminal(policy: Path) -> None:
    console = Console(width=120, force_terminal=True, file=io.StringIO(), record=True, highlight=False)
    show_pair(console, "", opened(policy, policy), [Reply("a\x1b[2Jb", 1, True, 0), Reply("c\x07d", 1, True, 0)])
    shown = console.export_text()
    assert "a[2Jb" in shown
    assert "cd" in shown
    assert "\x07" not in shown


def test_the_second_policy_is_checked_too(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        chat(policy, against=tmp_path / "nowhere", max_new_tokens=8)


@pytest.mark.slow
def test_two_policies_on_a_wide_terminal(policy: Path, chat_policy: Path) -> None:
    parent, child = pty.openpty()
    ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    environment = os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    environment.pop("COLUMNS", None)
    command = [sys.executable, "-m", "pipeline.cli", "chat", str(policy), "--vs", str(chat_policy)]
    command += ["--max-new-tokens", "8"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=child, stdout=child, stderr=child)
    os.close(child)
    try:
        seen = read_until(parent, "> ")
        os.write(parent, b"this film\r")
        seen += read_until(parent, " tokens, ") + read_until(parent, "> ")
        os.write(parent, b"/quit\r")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(parent)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen).replace("\r", "")
    assert re.search(r"\d+ tokens, .*\s{4,}.*\d+ tokens, ", plain)
