"""What signals do to a stage, and what a rank says when it lost the others."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from pipeline.process import deaf_to_requests
from pipeline.stage_main import REQUEUE, Signals, _lost_the_others, _lost_words

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GLOO = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] "


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(REQUEUE, raising=False)
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruptions_stop_at_once_and_the_second_is_ignored(number: signal.Signals) -> None:
    signals = Signals(saves=True)
    with pytest.raises(KeyboardInterrupt):
        send(number)
    send(number)
    assert (signals.stop, signals.save) == ([number], [])


def test_a_request_to_save_is_noted() -> None:
    signals = Signals(saves=True)
    send(signal.SIGUSR1)
    send(signal.SIGUSR1)
    assert (signals.stop, signals.save) == ([], [signal.SIGUSR1] * 2)


def test_sigterm_asks_for_the_state_where_someone_starts_stages_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUEUE, "1")
    signals = Signals(saves=True)
    send(signal.SIGTERM)
    assert (signals.stop, signals.save) == ([], [signal.SIGTERM])
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_a_stage_that_keeps_no_state_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUEUE, "1")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signals = Signals(saves=False)
        with pytest.raises(KeyboardInterrupt):
            send(number)
        assert (signals.stop, signals.save) == ([number], [])


def test_a_request_that_was_held_back_is_heard() -> None:
    """As one that came while the process imported its libraries."""
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    with deaf_to_requests():
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)  # other threads of the tests hear
        assert Signals(saves=True).save == [signal.SIGUSR1]


def test_a_background_job_goes_on_ignoring_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals = Signals(saves=True)
    send(signal.SIGINT)
    assert signals.stop == []


def test_who_ends_by_itself_ignores_everything() -> None:
    signals = Signals(saves=True)
    signals.ignore()
    for number in NUMBERS:
        send(number)
    assert (signals.stop, signals.save) == ([], [])


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(GLOO + "Connection closed by peer [10.77.0.2]:2048"), True),
        (RuntimeError(GLOO + "Timed out waiting 8000ms for recv operation to complete"), True),
        (RuntimeError("NCCL communicator was aborted on rank 0."), True),
        (dist.DistNetworkError("The client socket has timed out after 20000ms"), True),
        (dist.DistStoreError("Timed out after 21 seconds waiting for clients. 1/2 clients joined."), True),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
        (ValueError("gloo is no word of this user's data"), False),
    ],
)
def test_errors_of_lost_connections_are_known(error: BaseException, lost: bool) -> None:
    assert _lost_the_others(error) == lost


def test_words_for_a_time_out_and_for_a_lost_rank() -> None:
    late = _lost_words(RuntimeError(GLOO + "Timed out waiting 8000ms for recv"), 3, None, Path("r/ppo.partial"))
    assert late == (
        "rank 3 waited for the others longer than launch.timeout_seconds allows: one of them hangs or cannot be "
        "reached (RuntimeError: Timed out waiting 8000ms for recv). The logs of the ranks lie in r/ppo.partial and "
        "r/ppo.partial/logs. Run the same command again: it resumes from the last complete checkpoint."
    )
    closed = RuntimeError(GLOO + "Connection closed by peer [10.77.0.2]:2048. This is typically caused by a bug.")
    assert _lost_words(closed, 0, None, Path("r")).startswith(
        "rank 0 lost the others: one of them was killed, perhaps for want of memory, or its machine is gone "
        "(RuntimeError: Connection closed by peer [10.77.0.2]:2048). The logs"
    )
