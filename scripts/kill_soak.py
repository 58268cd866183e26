"""kill -9 at random moments of a whole pipeline, each followed by the same command: the end is as if nothing had been.

    python -m scripts.kill_soak [--kills 20] [--seed 0] [--processes 2] [--stages sft,rm,ppo,dpo] [--directory D]

A tiny workplace runs undisturbed, a second one with kills. Then weights, metrics and samples of all stages must be
equal bit for bit, and nothing may be left over. Exit code 1 where something is not so.
"""

from __future__ import annotations

import argparse
import random
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from scripts.kill_moments import MOMENTS, Attempt, Kill, family, reached, strike
from tests.workplace import RECIPE, Workplace, make_workplace

STAGES = ("sft", "rm", "ppo", "dpo")
DPO = """\
dpo:
  trainer:
    learning_rate: 1.0e-3
    max_steps: 12
    save_steps: 3
    eval_steps: 4
    logging_steps: 1
    per_device_train_batch_size: 4
"""
PATIENCE_SECONDS = 400
ROUNDS = 8
CLOCK = ("time/", "ranks/", "runtime", "per_second")
"""Parts of the names of metrics that depend on the clock."""
RESUMED = re.compile(r"resumed after update \d+|resuming from (checkpoint-\d+)|done already")
LEFTOVERS = ("*.partial", "*.tmp", "failures", "requeue.json", "state", ".*.removed", ".*.replaced")


@dataclass
class Soak:
    """The workplace that is killed in, and what has been seen of it.

    Attributes:
        place: what the pipeline runs in.
        words: what follows the stage and the recipe on the command line.
        dealt: kills in their order.
        problems: what is not as it should be.
        pids: of all processes that were seen.
    """

    place: Workplace
    words: Sequence[str]
    console: Console
    dealt: list[Attempt] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    pids: set[int] = field(default_factory=set)
    _killed: Attempt | None = None

    def run(self, stage: str, kills: Sequence[Kill]) -> list[Kill]:
        """Runs the stage to its end with the kills, as far as their moments come; returns those that did not."""
        left = list(kills)
        while True:
            attempt = Attempt(left[0], self.place) if left else None
            process = self.place.start(stage, "recipe.yaml", *self.words)
            started: list[psutil.Process] = []
            if attempt is not None and reached(attempt, process):
                started = family(process)
                self.pids |= {one.pid for one in started}
                strike(attempt, process)
                left.pop(0)
            out, err = process.communicate(timeout=PATIENCE_SECONDS)
            self._note_resumption(out)
            if attempt is not None and started:
                self._after(attempt, started)
                continue
            if process.returncode != 0:
                self.problems.append(f"{stage}: exit code {process.returncode}: {err[-500:]}")
            return left

    def _note_resumption(self, out: str) -> None:
        """What a start says of where it goes on belongs to the kill before it."""
        if self._killed is not None:
            found = RESUMED.search(out)
            self._killed.resumed = "the beginning" if found is None else found[1] or found[0]
            self._killed = None

    def _after(self, attempt: Attempt, started: Sequence[psutil.Process]) -> None:
        """Notes the kill, and what outlived it."""
        self.dealt.append(attempt)
        self._killed = attempt
        kill = attempt.kill
        self.console.print(
            f"{len(self.dealt)}: {kill.stage}, {kill.moment}: {attempt.what} after {attempt.after:.1f} s"
        )
        _, alive = psutil.wait_procs(started, timeout=60)
        for one in alive:
            if one.status() != psutil.STATUS_ZOMBIE:
                self.problems.append(f"{kill.stage}: {attempt.what} was killed and process {one.pid} went on")
                one.kill()

    def forget(self, stages: Sequence[str]) -> None:
        """Removes the stages, to run them once more."""
        for stage in stages:
            shutil.rmtree(self.place.run / stage, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table of the kills and what is wrong; returns the exit code."""
    options = _options(arguments)
    console = Console(highlight=False)
    with _Directory(options.directory) as directory:
        words = ["--tracking.progress", "false", "--launch.processes", str(options.processes)]
        wanted = options.stages.split(",")
        chain = [name for name in STAGES if name in {*wanted, "sft", *(["rm"] if "ppo" in wanted else [])}]
        before = _shared_memory()
        soak, reference, stages = _begin(directory, chain, wanted, words, console)
        kills = plan(options.kills, [stage for stage in stages if stage in wanted], options.seed, options.processes)
        for _ in range(ROUNDS):
            kills = [kill for stage in stages for kill in soak.run(stage, [k for k in kills if k.stage == stage])]
            soak.problems += [text for stage in stages for text in differences(soak.place, reference, stage)]
            if not kills or soak.problems:
                break
            soak.forget(stages[min(stages.index(kill.stage) for kill in kills) :])
        if kills and not soak.problems:
            soak.problems.append(f"{len(kills)} kills could not be dealt")
        soak.problems += left_over(soak, before)
        _report(soak, console)
    return 1 if soak.problems else 0


def plan(count: int, stages: Sequence[str], seed: int, processes: int) -> list[Kill]:
    """`count` kills, spread over the stages and over a stage's moments, in the order in which they come."""
    draw = random.Random(seed)
    targets = ["group", "command", *(["rank"] if processes > 1 else [])]
    waiting: dict[str, list[str]] = {stage: [] for stage in stages}
    kills = []
    for index in range(count):
        stage = stages[index % len(stages)]
        if not waiting[stage]:
            waiting[stage] = draw.sample(MOMENTS, len(MOMENTS))
        target = draw.choice(targets)
        kills.append(Kill(stage, waiting[stage].pop(), target, draw.random(), draw.random(), draw.randrange(processes)))
    return sorted(kills, key=lambda kill: (stages.index(kill.stage), MOMENTS.index(kill.moment)))


def differences(place: Workplace, expected: Workplace, stage: str) -> list[str]:
    """What differs between a finished stage and the undisturbed one."""
    if not (place.run / stage / "manifest.json").exists():
        return [f"{stage} is not complete"]
    found = []
    ours, theirs = (where.manifest(stage)["files"] for where in (place, expected))
    if ours.keys() != theirs.keys():
        found.append(f"{stage}: files {sorted(ours.keys() ^ theirs.keys())} are on one side only")
    same = [name for name in theirs if name.endswith(".safetensors") or name.startswith("evaluation/")]
    found += [f"{stage}: {name} differs" for name in same if ours.get(name) != theirs[name]]
    for file in ("metrics.jsonl", "samples.jsonl"):
        if _without_time(place.rows(stage, file)) != _without_time(expected.rows(stage, file)):
            found.append(f"{stage}: {file} differs")
    return found


def left_over(soak: Soak, shared_before: set[str]) -> list[str]:
    """Files, processes and shared memory that nobody will take away."""
    run = soak.place.run
    found = [f"{path.relative_to(run)} is left over" for pattern in LEFTOVERS for path in run.rglob(pattern)]
    for process in psutil.process_iter():
        try:
            if process.cwd().startswith(str(soak.place.path)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"process {process.pid} is left over: {process.cmdline()}")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    segments = _shared_memory() - shared_before
    return found + [f"/dev/shm/{name} is left over" for name in segments if set(_numbers(name)) & soak.pids]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kill_soak", description="Kills a tiny pipeline at random moments.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1, help="ranks of every stage")
    parser.add_argument("--stages", default=",".join(STAGES), help="stages that are killed (default: %(default)s)")
    parser.add_argument("--directory", type=Path, help="where to work, kept; otherwise a temporary one")
    return parser.parse_args(arguments)


class _Directory:
    """The directory given, or a temporary one that is removed."""

    def __init__(self, given: Path | None) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="kill_soak") if given is None else None
        self._path = Path(self._temporary.name) if self._temporary is not None else Path(given or "").absolute()

    def __enter__(self) -> Path:
        return self._path

    def __exit__(self, *error: object) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()


def _begin(
    directory: Path, chain: Sequence[str], wanted: Sequence[str], words: Sequence[str], console: Console
) -> tuple[Soak, Workplace, list[str]]:
    """The workplace to kill in, one in which the chain has run undisturbed, and the stages from the first kill on."""
    ahead = list(takewhile(lambda stage: stage not in wanted, chain))
    reference = make_workplace(directory / "reference")
    (reference.path / "recipe.yaml").write_text(RECIPE + DPO)
    _run(reference, ahead, words, console)
    killed = Workplace(Path(shutil.copytree(reference.path, directory / "killed")))
    _run(reference, chain[len(ahead) :], words, console)
    return Soak(killed, words, console), reference, list(chain[len(ahead) :])


def _run(place: Workplace, stages: Sequence[str], words: Sequence[str], console: Console) -> None:
    for stage in stages:
        console.print(f"undisturbed: {stage}")
        done = place.tristage(stage, "recipe.yaml", *words)
        if done.returncode != 0:
            sys.exit(f"the undisturbed {stage} failed: {done.stderr[-2000:]}")


def _without_time(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not any(part in k for part in CLOCK)} for row in rows]


def _shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _numbers(name: str) -> Iterator[int]:
    return (int(number) for number in re.findall(r"\d+", name))


def _report(soak: Soak, console: Console) -> None:
    table = Table(title=f"{len(soak.dealt)} kills")
    for column in ("", "stage", "moment", "after s", "killed", "resumed from"):
        table.add_column(column)
    for number, attempt in enumerate(soak.dealt, 1):
        kill = attempt.kill
        row = (str(number), kill.stage, kill.moment, f"{attempt.after:.1f}", attempt.what, attempt.resumed)
        table.add_row(*row)
    console.print(table)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    console.print(f"{usage.ru_utime + usage.ru_stime:.0f} CPU seconds and more; orphans are not counted")
    for problem in soak.problems:
        console.print(f"WRONG: {problem}", markup=False)
    if not soak.problems:
        console.print("all stages are complete and equal to the undisturbed ones; nothing is left over")


if __name__ == "__main__":
    sys.exit(main())
