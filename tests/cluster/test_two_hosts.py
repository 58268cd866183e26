"""Two hosts that share a file system, each with a rank of PPO; one of them, or the network between them, fails.

A host is a network namespace with one end of a cable (veth). `tristage ppo RECIPE --prepare --launch.machines 2`
prepares the stage's directory once and says how ranks are started by hand; after a failure the same commands go on.
Each host needs GLOO_SOCKET_IFNAME where its name does not resolve to the address that the others reach it by.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.workplace import Workplace, command_environment, make_workplace

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
TIME_OUT = 20
PATIENCE_SECONDS = 300.0
PREPARE = ("ppo", "recipe.yaml", "--prepare", "--launch.machines", "2", "--launch.timeout_seconds", str(TIME_OUT))
PORT = "29500"


@dataclass(frozen=True)
class Host:
    """A namespace, its address, and the interface that has it."""

    namespace: str
    interface: str
    address: str

    def start(self, place: Workplace, words: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """Starts a command on this host, in the workplace."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *words],
            cwd=place.path,
            env=command_environment() | {"GLOO_SOCKET_IFNAME": self.interface} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def processes(self) -> list[psutil.Process]:
        """All that runs on this host."""
        found = []
        for pid in ip("netns", "pids", self.namespace).split():
            try:
                found.append(psutil.Process(int(pid)))
            except psutil.NoSuchProcess:
                continue
        return found

    def end(self) -> None:
        """Every process of this host is killed, as by a power cut."""
        processes = self.processes()
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=60)

    def link(self, state: str) -> None:
        """Plugs the cable in (`up`) or out (`down`)."""
        ip("-n", self.namespace, "link", "set", self.interface, state)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


def why_not() -> str:
    """Why this machine cannot have hosts of its own; "" where it can."""
    if shutil.which("ip") is None:
        return "there is no `ip` (package iproute2)"
    name = f"tristage{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"`ip netns add` is not possible: {made.stderr.strip()}"
    ip("netns", "delete", name)
    return ""


@contextmanager
def namespace(name: str) -> Iterator[str]:
    """A network namespace; whatever runs in it ends with it."""
    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        Host(name, "", "").end()
        ip("netns", "delete", name)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable between them, which goes when a namespace that holds an end of it does."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    number = os.getpid()
    first, second = (Host(f"tri{number}{end}", f"v{number}{end}", f"10.77.0.{n}") for n, end in ((1, "a"), (2, "b")))
    with ExitStack() as stack:
        for host in (first, second):
            stack.enter_context(namespace(host.namespace))
        ip("link", "add", first.interface, "type", "veth", "peer", "name", second.interface)
        for host in (first, second):
            ip("link", "set", host.interface, "netns", host.namespace)
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.interface)
            host.link("up")
        yield first, second


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workplace, str]:
    """A workplace with sft, rm and a directory of PPO prepared for two machines, and the words that start a rank."""
    place = make_workplace(tmp_path_factory.mktemp("hosts") / "work")
    done = place.tristage("run", "recipe.yaml", "--stages", "sft,rm")
    assert done.returncode == 0, done.stderr[-3000:]
    done = place.tristage(*PREPARE)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(r"^ppo: prepared; on each of 2 machines, NUMBER from 0: (.*)$", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    return place, found[1]


@pytest.fixture
def copied(prepared: tuple[Workplace, str], tmp_path: Path) -> Workplace:
    """A copy of the prepared workplace."""
    return Workplace(Path(shutil.copytree(prepared[0].path, tmp_path / "work")))


@pytest.fixture(scope="module")
def undisturbed(prepared: tuple[Workplace, str], tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """PPO on one machine's two ranks that nothing befell. Only to be read."""
    place = Workplace(Path(shutil.copytree(prepared[0].path, tmp_path_factory.mktemp("undisturbed") / "work")))
    done = place.tristage("ppo", "recipe.yaml", "--launch.processes", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    return place


def start_pair(place: Workplace, hosts: tuple[Host, Host]) -> list[subprocess.Popen[str]]:
    """A rank on each host, by environment variables alone."""
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": PORT}
    shared["MASTER_ADDR"] = hosts[0].address
    words = [sys.executable, "-m", "policy.ppo.stage", "runs/tiny/ppo.partial"]
    return [host.start(place, words, **shared, RANK=str(rank)) for rank, host in enumerate(hosts)]


def wait_until(condition: Callable[[], object], processes: Sequence[subprocess.Popen[str]]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < end
        time.sleep(0.01)


def said(err: str) -> str:
    """The one line of stderr beside torch's warnings, that addresses have no names here."""
    lines = [line for line in err.splitlines() if not line.startswith("[W")]
    assert len(lines) == 1, err
    return lines[0]


def logged(place: Workplace, step: int) -> bool:
    return any(row["step"] == step and "objective/kl" in row for row in place.rows("ppo.partial"))


def finish(place: Workplace, hosts: tuple[Host, Host]) -> str:
    """The pair once more, to the end; what the first rank says."""
    pair = start_pair(place, hosts)
    outputs = [process.communicate(timeout=PATIENCE_SECONDS) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    return outputs[0][0]


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def assert_same(place: Workplace, expected: Workplace) -> None:
    """Metrics and weights bit for bit, and nothing unfinished is left."""
    assert without_time(place.rows("ppo")) == without_time(expected.rows("ppo"))
    for file in ("model.safetensors", "critic/model.safetensors", "summary.md"):
        assert place.manifest("ppo")["files"][file] == expected.manifest("ppo")["files"][file]
    assert {path.name for path in place.run.iterdir() if not path.name.startswith(".")} == {"sft", "rm", "ppo"}


def test_the_words_that_prepare_prints_start_a_pair(
    copied: Workplace, prepared: tuple[Workplace, str], hosts: tuple[Host, Host], undisturbed: Workplace
) -> None:
    """With torchrun on either host. Two machines of one rank do what one machine of two does."""
    pair = []
    for number, host in enumerate(hosts):
        filled = prepared[1].replace("NUMBER", str(number)).replace("ADDRESS", hosts[0].address)
        assert filled.startswith("torchrun ")
        words = [sys.executable, "-m", "torch.distributed.run", *filled.split()[1:]]
        pair.append(host.start(copied, words))
    outputs = [process.communicate(timeout=PATIENCE_SECONDS) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert_same(copied, undisturbed)


def test_a_host_that_is_killed_ends_the_other_and_the_pair_resumes(
    copied: Workplace, hosts: tuple[Host, Host], undisturbed: Workplace
) -> None:
    for lost, updates in ((1, 3), (0, 5)):
        pair = start_pair(copied, hosts)
        wait_until(lambda n=updates: logged(copied, n), pair)
        hosts[lost].end()
        start = time.monotonic()
        _, err = pair[1 - lost].communicate(timeout=PATIENCE_SECONDS)
        assert time.monotonic() - start < TIME_OUT + 15
        assert pair[1 - lost].returncode == 1
        assert said(err).startswith(f"error: rank {1 - lost} lost the others: one of them was killed, perhaps for want")
        assert said(err).endswith("Run the same command again: it resumes from the last complete checkpoint.")
        assert hosts[1 - lost].processes() == []
    assert "resumed after update 4 of 7" in finish(copied, hosts)
    assert_same(copied, undisturbed)


def test_a_link_that_is_down_for_longer_than_the_time_out_ends_both(
    copied: Workplace, hosts: tuple[Host, Host], undisturbed: Workplace
) -> None:
    pair = start_pair(copied, hosts)
    wait_until(lambda: logged(copied, 3), pair)
    hosts[1].link("down")
    start = time.monotonic()
    errors = [process.communicate(timeout=PATIENCE_SECONDS)[1] for process in pair]
    assert TIME_OUT - 1 < time.monotonic() - start < 2 * TIME_OUT + 30
    assert [process.returncode for process in pair] == [1, 1]
    waited = rf"rank [01] waited for the others longer than launch\.timeout_seconds \({TIME_OUT}\) allows"
    for rank, err in enumerate(errors):
        assert re.match(rf"error: (rank {rank} ends because rank {1 - rank} failed: )?{waited}", said(err))
    hosts[1].link("up")
    assert "resumed after update 2 of 7" in finish(copied, hosts)
    assert_same(copied, undisturbed)
