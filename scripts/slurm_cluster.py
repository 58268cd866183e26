"""A real Slurm on this one machine: a controller and a few nodes on the loopback address, without systemd.

    python -m scripts.slurm_cluster start DIR [--nodes 2] [--cpus 2] [--gpus 0]
    export SLURM_CONF=DIR/slurm.conf
    sinfo; sbatch ...
    python -m scripts.slurm_cluster stop DIR

It is for trying out `tristage launch` and for its tests. Two partitions share the nodes: jobs of `high` pre-empt those
of `low`, which are told so by SIGTERM, have 10 seconds and are requeued. Wants root and Debian's packages:
`apt-get install --no-install-recommends slurmctld slurmd slurm-client`. Everything lies in DIR; `stop` ends
the processes of `DIR/pids.json` and no others. Jobs may take every CPU: this is no place for other people's work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol")
INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client"
CONF, PIDS = "slurm.conf", "pids.json"
PATIENCE_SECONDS = 60.0
STOP_SECONDS = 20.0
CONFIGURATION = """\
ClusterName=tristage
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait={kill_wait}
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs.

    Attributes:
        directory: configuration, logs, state and the pids of its processes.
    """

    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        """What its commands need beside the environment that there is."""
        return {"SLURM_CONF": str(self.directory / CONF)}

    def run(self, *words: str) -> str:
        """Output of a Slurm command; fails where it fails."""
        return _run(self.directory, words)


def why_not() -> str:
    """Why no cluster can be started here; "" where one can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} on this machine: {INSTALL}"
    return "" if os.geteuid() == 0 else "the daemons of Slurm want root"


def start(directory: Path, *, nodes: int = 2, cpus: int = 2, gpus: int = 0, kill_wait: int = 10) -> Cluster:
    """Starts a cluster and returns when all its nodes are idle.

    Args:
        directory: is made; must not hold a running cluster.
        cpus: of each node, whatever the machine has.
        gpus: of each node, made of device files that nothing can compute on.
        kill_wait: seconds between the SIGTERM and the SIGKILL of a job that is cancelled.
    """
    reason = why_not()
    if reason:
        raise SystemExit(reason)
    directory = directory.resolve()
    if (directory / PIDS).exists():
        raise SystemExit(f"{directory} holds a cluster already: stop it first")
    (directory / "state").mkdir(parents=True, exist_ok=True)
    names = [f"n{index + 1}" for index in range(nodes)]
    for name in names:
        (directory / "spool" / name).mkdir(parents=True, exist_ok=True)
    host = socket.gethostname().partition(".")[0]
    controller_port, *ports = _free_ports(nodes + 1)
    gres = f" Gres=gpu:{gpus}" if gpus else ""
    lines = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4000{gres}"
        for name, port in zip(names, ports, strict=True)
    ]
    text = CONFIGURATION.format(
        host=host,
        controller_port=controller_port,
        directory=directory,
        kill_wait=kill_wait,
        nodes="\n".join(lines),
    )
    (directory / CONF).write_text(text)
    (directory / "gres.conf").write_text(_gpus(directory, gpus))
    commands = [["slurmctld", "-D", "-i"], *(["slurmd", "-D", "-N", name] for name in names)]
    pids = []
    for command in commands:
        pids.append(_start(directory, command))
        (directory / PIDS).write_text(json.dumps(pids))
    try:
        _wait_until_idle(directory, nodes)
    except BaseException:
        stop(directory)
        raise
    return Cluster(directory)


def stop(directory: Path) -> None:
    """Cancels what runs and ends the processes of the cluster in `directory`."""
    file = directory.resolve() / PIDS
    pids: list[int] = json.loads(file.read_text())
    subprocess.run(
        ["scancel", "--user=root"], env=_environment(directory), capture_output=True, timeout=30, check=False
    )
    _wait_until_no_job(directory)
    alive = [pid for pid in reversed(pids) if _is_ours(pid, directory)]
    for pid in alive:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while any(_is_ours(pid, directory) for pid in alive):
        if time.monotonic() > deadline:
            for pid in alive:
                if _is_ours(pid, directory):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    file.unlink()


@contextmanager
def running(directory: Path, *, nodes: int = 2, cpus: int = 2, kill_wait: int = 10) -> Iterator[Cluster]:
    """A cluster for as long as the block lasts."""
    cluster = start(directory, nodes=nodes, cpus=cpus, kill_wait=kill_wait)
    try:
        yield cluster
    finally:
        stop(directory)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=0)
    options = parser.parse_args()
    if options.action == "stop":
        if not (options.directory / PIDS).exists():
            raise SystemExit(f"{options.directory} holds no running cluster")
        stop(options.directory)
        return
    cluster = start(options.directory, nodes=options.nodes, cpus=options.cpus, gpus=options.gpus)
    print(f"export SLURM_CONF={cluster.directory / CONF}")


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [int(item.getsockname()[1]) for item in sockets]
    finally:
        for item in sockets:
            item.close()


def _gpus(directory: Path, count: int) -> str:
    """gres.conf; Slurm wants character devices, and /dev/null under other names will do."""
    for index in range(count):
        file = directory / f"gpu{index}"
        if not file.exists():
            os.mknod(file, 0o20666, os.makedev(1, 3))
    return f"Name=gpu File={directory}/gpu[0-{count - 1}]\n" if count else ""


def _environment(directory: Path) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("SLURM")} | {
        "SLURM_CONF": str(directory.resolve() / CONF)
    }


def _run(directory: Path, words: tuple[str, ...]) -> str:
    done = subprocess.run(words, env=_environment(directory), capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
    return done.stdout


def _start(directory: Path, command: list[str]) -> int:
    """Starts a daemon in a session of its own, so that the terminal's signals do not reach it."""
    with (directory / f"{'-'.join(command)}.out".replace("--", "-")).open("w") as out:
        process = subprocess.Popen(
            command,
            env=_environment(directory),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=directory,
        )
    return process.pid


def _is_ours(pid: int, directory: Path) -> bool:
    """Whether `pid` lives and is a daemon of this directory's cluster; a number may have gone to another process."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # where it is this process's child
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"SLURM_CONF={directory.resolve() / CONF}".encode() in environment


def _wait_until_idle(directory: Path, nodes: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    said = ""
    while time.monotonic() < deadline:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--partition=low", "--format=%T"],
            env=_environment(directory),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        said = done.stdout + done.stderr
        if done.stdout.split() == ["idle"] * nodes:
            return
        time.sleep(0.1)
    raise RuntimeError(f"the nodes did not become idle: {said} See the logs in {directory}.")


def _wait_until_no_job(directory: Path) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        done = subprocess.run(
            ["squeue", "--noheader"],
            env=_environment(directory),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        if done.returncode or not done.stdout.strip():
            return
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
