"""`tristage launch`: one job per stage, each after the one before it."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.artifacts import write_json, write_text
from pipeline.errors import UserError
from pipeline.launch import jobset
from pipeline.launch.launcher import FOLDER, JOBS, Launcher, StageJob
from pipeline.launch.slurm import Slurm, is_available, options_of, render
from pipeline.launchers import refuse_missing_file
from pipeline.process import only_one
from pipeline.recipe import Recipe
from pipeline.runner import PlannedStage, plan
from pipeline.stages import STAGES, run_directory, stage_inputs

FOLDERS = {"slurm": FOLDER, "jobset": "kubernetes"}
"""Launchers, and where below the run directory they write."""


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        file: the recipe's path as it was given.
        overrides: `--section.key value` as given; the jobs get them too.
        stages: in order.
        dry_run: only write the scripts and print what would be submitted.
    """

    file: str
    overrides: Sequence[str]
    stages: Sequence[str]
    launcher: str = "slurm"
    dry_run: bool = False


def launch(recipe: Recipe, request: Request) -> None:
    """Writes the jobs of the stages that are not done and, unless it is a dry run, submits them as a chain.

    Errors:
        UserError: a stage would be refused, the chain runs already, or Slurm is absent or refuses.
    """
    console = Console(highlight=False)
    _check_request(recipe, request)
    slurm_options = recipe.launch.slurm
    if recipe.launch.processes > 1 and slurm_options.gpus is None and "gpu" not in " ".join(slurm_options.options):
        console.print("no GPU is asked for (launch.slurm.gpus)", markup=False)
    folder = run_directory(recipe) / FOLDERS[request.launcher]
    submits = not request.dry_run and request.launcher == "slurm"
    slurm = Slurm() if submits else None
    if slurm:
        refuse_while_running(slurm, folder)
    jobs = _jobs(recipe, request, console)
    if not jobs:
        console.print(f"{recipe.name}: nothing to launch.", markup=False)
        return
    folder.mkdir(parents=True, exist_ok=True)
    if request.launcher == "jobset":
        file = folder / "jobset.yaml"
        write_text(file, jobset.render(recipe, jobs))
        console.print(f"wrote {file}; nothing was submitted. Submit it with:", markup=False, soft_wrap=True)
        console.print(f"kubectl apply -f {shlex.quote(str(file))}", markup=False, soft_wrap=True)
        return
    for job in jobs:
        write_text(job.script, render(recipe, job))
    if slurm:
        _submit(recipe, request, slurm, jobs, console)
    else:
        _print_commands(jobs, console)


def refuse_while_running(launcher: Launcher, folder: Path) -> None:
    """Refuses where jobs of an earlier launch wait or run; two chains would write the same directories."""
    noted = read_jobs(folder)
    known = launcher.states([entry["job"] for entry in noted.values()])
    alive = []
    for stage, entry in noted.items():
        state = known.get(entry["job"])
        if state and state.alive and state.name == entry["name"]:
            alive.append(f"{stage} (job {state.job}, {state.state})")
    if alive:
        numbers = " ".join(noted[text.partition(" ")[0]]["job"] for text in alive)
        raise UserError(
            f"this run is launched already: {', '.join(alive)}.",
            mend=f"Wait for it, or end it with `scancel {numbers}`.",
        )


def read_jobs(folder: Path) -> dict[str, dict[str, Any]]:
    """The jobs of a run by stage, as `launch` noted them; empty where nothing was launched.

    An entry holds `job`, `name`, `after` (the stage before it in its chain, or null), `log` and `submitted`.
    """
    file = folder / JOBS
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))["jobs"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is corrupted: {error}.", mend="Remove it; `squeue --me` names the jobs.") from error


def _check_request(recipe: Recipe, request: Request) -> None:
    unknown = [name for name in request.stages if name not in STAGES]
    if unknown:
        raise UserError(f"--stages: unknown stage '{unknown[0]}'.", mend=f"Stages are {', '.join(STAGES)}.")
    if request.launcher not in FOLDERS:
        raise UserError(f"--launcher: unknown launcher '{request.launcher}'.", mend=f"Known: {', '.join(FOLDERS)}.")
    refuse_missing_file(recipe.launch)
    gpus, processes = recipe.launch.slurm.gpus, recipe.launch.processes
    if gpus is not None and gpus < processes:
        raise UserError(
            f"launch.processes is {processes}, but launch.slurm.gpus asks for {gpus} per machine.",
            mend="Every process wants a GPU of its own: set both to the same number.",
        )


def _jobs(recipe: Recipe, request: Request, console: Console) -> list[StageJob]:
    """The jobs of the stages that are not done.

    Errors:
        UserError: a stage would be refused when it starts, as far as can be told now.
    """
    planned = plan(recipe, list(dict.fromkeys(request.stages)))
    refused = [stage for stage in planned if stage.state in ("stale", "stale partial", "refused")]
    if refused:
        texts = [f"{stage.name}: {stage.note}" for stage in refused]
        stale = any(stage.state != "refused" for stage in refused)
        mend = "Move the directory away, or use another `name`." if stale else ""
        raise UserError("\n".join(["nothing was launched.", *texts]), mend=mend)
    directory = Path.cwd()
    jobs = []
    for stage in planned:
        if stage.state == "done":
            console.print(f"{stage.name}: done already, skipped ({stage.out})", markup=False, soft_wrap=True)
            continue
        _refuse_orphan(recipe, stage, [job.stage for job in jobs])
        script = directory / stage.out.parent / FOLDER / f"{stage.name}.sbatch"
        words = [stage.name, request.file, *request.overrides]
        jobs.append(StageJob(stage.name, f"{recipe.name}-{stage.name}", words, directory, script))
    return jobs


def _refuse_orphan(recipe: Recipe, stage: PlannedStage, before: Sequence[str]) -> None:
    """Refuses a stage whose input nobody has made and no job before it makes."""
    for role, entry in stage_inputs(recipe, stage.name).items():
        path = stage.inputs[role]
        if entry.made_by is None or entry.made_by in before or os.path.exists(path):
            continue
        if os.path.abspath(path) == os.path.abspath(run_directory(recipe) / entry.made_by):
            raise UserError(
                f"{stage.name} reads {path}, which does not exist.",
                mend=f"Put {entry.made_by} before it in --stages, or set {entry.key}.",
            )


def _submit(recipe: Recipe, request: Request, slurm: Slurm, jobs: Sequence[StageJob], console: Console) -> None:
    folder = run_directory(recipe) / FOLDER
    with only_one(folder / ".lock", f"another `tristage launch` is at work in {folder}."):
        refuse_while_running(slurm, folder)
        slurm.check(jobs)
        numbers = slurm.submit(jobs, lambda submitted: _note(folder, request, jobs, submitted))
    previous = ""
    for stage, number in numbers.items():
        waits = f" after {previous}" if previous else ""
        log = folder / f"{stage}-{number}.log"
        console.print(f"{stage}: job {number}{waits}, log {log}", markup=False, soft_wrap=True)
        previous = stage
    run = shlex.quote(str(folder.parent))
    console.print(f"watch:  squeue --me --jobs={','.join(numbers.values())}", markup=False, soft_wrap=True)
    console.print(f"        tristage status {run}", markup=False, soft_wrap=True)
    console.print(f"cancel: scancel {' '.join(numbers.values())}", markup=False, soft_wrap=True)


def _note(folder: Path, request: Request, launched: Sequence[StageJob], numbers: Mapping[str, str]) -> None:
    """Adds the submitted jobs to jobs.json; stages that were not launched again keep their entries."""
    submitted = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    jobs = read_jobs(folder)
    previous = None
    for job in launched:
        number = numbers[job.stage]
        jobs.pop(job.stage, None)
        jobs[job.stage] = {
            "job": number,
            "name": job.name,
            "after": previous,
            "log": f"{job.stage}-{number}.log",
            "submitted": submitted,
        }
        previous = job.stage
    command = shlex.join(["tristage", "launch", request.file, *request.overrides])
    write_json(folder / JOBS, {"launcher": request.launcher, "command": command, "jobs": jobs})


def _print_commands(jobs: Sequence[StageJob], console: Console) -> None:
    """The commands that would be run, fit to be pasted into a shell."""
    for job in jobs:
        console.print(f"wrote {os.path.relpath(job.script)}", markup=False, soft_wrap=True)
    note = "" if is_available() else " (there is no sbatch on this machine)"
    console.print(f"nothing was submitted{note}. These commands would be run:", markup=False, soft_wrap=True)
    previous: tuple[str, ...] = ()
    for job in jobs:
        words = ["sbatch", "--parsable", *options_of(job, *previous), shlex.quote(os.path.relpath(job.script))]
        console.print(f"{job.stage}=$({' '.join(words)})", markup=False, soft_wrap=True)
        previous = (f"${job.stage}",)
