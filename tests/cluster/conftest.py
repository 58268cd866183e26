"""One Slurm cluster of two nodes for all tests of this folder, and a chain of stages that nothing disturbed."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pipeline.launch.launcher import JobState
from pipeline.launch.slurm import parse_job
from pipeline.launch.submit import read_jobs
from scripts.slurm_cluster import Cluster, running, why_not
from tests.workplace import Workplace, make_workplace

PATIENCE_SECONDS = 240.0
PARTITION = ("--launch.slurm.partition", "low")
ON_TWO_MACHINES = ("--launch.machines", "2", *PARTITION)
ON_ONE_MACHINE = ("--launch.processes", "2", *PARTITION)
SLOW_JUDGE = """\
import os, time

METRICS = "runs/tiny/ppo.partial/metrics.jsonl"

def characters(prompts, responses):
    rows = open(METRICS).read() if os.path.exists(METRICS) else ""
    while os.path.exists("hold") and '"step": 2,' in rows:
        open("held", "w").close()
        time.sleep(0.1)
    return [float(len(response)) for response in responses]
"""
"""Judges as the workplace's own does; in the middle of PPO it waits while there is a file `hold`."""


@dataclass(frozen=True)
class Site:
    """A workplace whose `tristage` submits to a cluster."""

    place: Workplace
    cluster: Cluster

    @property
    def folder(self) -> Path:
        """Job scripts and logs."""
        return self.place.run / "slurm"

    def tristage(self, *words: str) -> str:
        """Output of a command that succeeds."""
        done = self.place.tristage(*words, **self.cluster.environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def refused(self, *words: str) -> str:
        """What a command says that is refused."""
        done = self.place.tristage(*words, **self.cluster.environment)
        assert done.returncode == 2, done.stdout
        return done.stderr

    def launch(self, *words: str) -> dict[str, str]:
        """Launches the recipe; returns the jobs by stage."""
        out = self.tristage("launch", "recipe.yaml", *words)
        jobs = dict(re.findall(r"^(\w+): job (\d+)", out, re.MULTILINE))
        noted = {stage: entry["job"] for stage, entry in read_jobs(self.folder).items() if stage in jobs}
        assert noted == jobs
        return jobs

    def status(self) -> str:
        """What `tristage status` prints."""
        return self.tristage("status", "runs/tiny")

    def state(self, job: str) -> JobState:
        """What Slurm says of a job."""
        return parse_job(job, self.cluster.run("scontrol", "--oneliner", "show", "job", job))

    def log(self, stage: str, job: str) -> str:
        """What a stage's job has printed."""
        file = self.folder / f"{stage}-{job}.log"
        return file.read_text() if file.exists() else ""

    def wait(self, condition: Callable[[], object], stage: str, job: str) -> None:
        """Waits until the condition holds; shows the log of the stage where it never does."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            state = self.state(job)
            assert time.monotonic() < end, f"{state}: {self.log(stage, job)[-3000:]}"
            time.sleep(0.1)

    def wait_for_end(self, stage: str, job: str) -> JobState:
        """Waits until the job is over."""
        self.wait(lambda: not self.state(job).alive, stage, job)
        return self.state(job)

    def wait_for_requeue(self, stage: str, job: str) -> None:
        """Waits until the job waits to be started again, then has it started: Slurm lets two minutes pass."""
        self.wait(lambda: self.state(job).reason == "BeginTime", stage, job)
        assert self.state(job).state == "PENDING"
        self.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def processes(self) -> list[psutil.Process]:
        """Processes of stages that work in this directory."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.place.path) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of two CPUs."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with running(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="session")
def chain(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Site, dict[str, str]]:
    """All three stages, run as jobs of two tasks on two machines. Only to be read."""
    site = Site(make_workplace(tmp_path_factory.mktemp("chain") / "work"), cluster)
    jobs = site.launch(*ON_TWO_MACHINES)
    site.wait_for_end("ppo", jobs["ppo"])
    return site, jobs


@pytest.fixture
def copied(chain: tuple[Site, dict[str, str]], tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Makes a copy of the chain's workplace without the named stages; what it leaves running is cancelled."""
    made: list[Site] = []

    def copy(*without: str) -> Site:
        done, jobs = chain
        assert done.state(jobs["ppo"]).state == "COMPLETED" or (done.place.run / "ppo").exists()
        target = tmp_path / "work"
        shutil.copytree(done.place.path, target)
        for name in (*without, "slurm"):
            shutil.rmtree(target / "runs" / "tiny" / name)
        (target / "length_judge.py").write_text(SLOW_JUDGE)
        made.append(Site(Workplace(target), done.cluster))
        return made[-1]

    yield copy
    for site in made:
        numbers = [entry["job"] for entry in read_jobs(site.folder).values()]
        if numbers:
            site.cluster.run("scancel", *numbers)
