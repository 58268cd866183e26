"""Plans the stages of a recipe and runs each as a subprocess: skip, resume, refuse or start."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from pipeline.artifacts import (
    JOB,
    MANIFEST,
    open_artifact,
    read_manifest,
    recover_replaced,
    refuse_missing_files,
    sync_tree,
    write_json,
    write_text,
)
from pipeline.errors import UserError, disk_message, is_disk_error
from pipeline.exits import EXIT_REQUEUE, interrupted_message, killed_message, print_error
from pipeline.launchers import Stages, by_hand
from pipeline.load import RESOLVED, dump_recipe
from pipeline.process import only_one, run_child
from pipeline.recipe import Recipe
from pipeline.stage import read_job
from pipeline.stages import (
    ORDER,
    STAGES,
    differences,
    fingerprint,
    input_paths,
    run_directory,
    stage_inputs,
    wanted_as,
    wanted_paths,
)

State = Literal["done", "resume", "start", "stale", "stale partial", "later", "refused"]
SHOWN_DIFFERENCES = 8


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a plan: where it is written, what it reads and what would happen if it were run now.

    Attributes:
        state: `later` is decided once the input that `note` names has been made.
        note: why it would be refused, or what it waits for.
    """

    name: str
    out: Path
    inputs: Mapping[str, str]
    state: State
    note: str = ""


def plan(recipe: Recipe, stages: Sequence[str] = ORDER) -> list[PlannedStage]:
    """What `run_stages` would do, without doing it: nothing is written and no model is read by a library."""
    return [plan_stage(recipe, name, {}) for name in stages]


def plan_stage(recipe: Recipe, name: str, inputs: Mapping[str, str]) -> PlannedStage:
    """What `run_stage` would do with `inputs` that are not where the recipe says."""
    out, inputs = run_directory(recipe) / name, input_paths(recipe, name, inputs)
    try:
        awaited = _awaited(recipe, name, inputs)
        if awaited:
            exists = (out / MANIFEST).exists() or (_partial(out) / JOB).exists()
            return PlannedStage(name, out, inputs, "later" if exists else "start", f"after {', '.join(awaited)}")
        _check_inputs(recipe, name, inputs, verify=False)
        mark = fingerprint(recipe, name, inputs)
        state = _state(out, mark, overwrite=False)
        note = _why_stale(out, mark, state) if state.startswith("stale") else ""
    except UserError as error:
        return PlannedStage(name, out, inputs, "refused", str(error))
    return PlannedStage(name, out, inputs, state, note)


def _awaited(recipe: Recipe, name: str, inputs: Mapping[str, str]) -> list[str]:
    """Inputs that are not there yet and that `prepare` or an earlier stage makes."""
    made = [Path(entry.makes) for entry in recipe.prepare]
    inputs_wanted = stage_inputs(recipe, name).values()
    made += [run_directory(recipe) / entry.made_by for entry in inputs_wanted if entry.made_by]
    wanted = wanted_paths(recipe, name, inputs)
    return [path for path in wanted if not os.path.exists(path) and any(_is_inside(path, target) for target in made)]


def run_stages(recipe: Recipe, stages: Sequence[str], *, overwrite: bool, command: Sequence[str]) -> None:
    """Runs `stages` in order, each in a process of its own; a finished one with the same fingerprint is skipped.

    Errors:
        UserError: an input is missing, or a finished stage differs from what the recipe asks for.
        SystemExit: a stage failed; it has printed why, its exit code is passed on.
    """
    for name in stages:
        run_stage(recipe, name, overwrite=overwrite, command=command, inputs={})


def run_process(recipe: Recipe, name: str, partial: Path, lock: int) -> None:
    """Runs the stage as a child and ends this process as the child ended, unless all is well."""
    start = Stages(recipe.launch).start(STAGES[name].module, partial)
    ended = run_child(start.words, lock=lock, environment=start.environment, is_ours=start.is_child)
    if ended.code == EXIT_REQUEUE:
        sys.exit(EXIT_REQUEUE)
    if ended.interrupted_by is not None:
        if ended.code <= 0:
            print_error(interrupted_message(name))
        sys.exit(128 + ended.interrupted_by)
    if ended.code < 0:
        print_error(killed_message(name, -ended.code, partial))
        sys.exit(128 - ended.code)
    if ended.code:
        sys.exit(ended.code)


def show_start(recipe: Recipe, name: str, partial: Path, lock: int) -> None:
    """Says how a person starts the stage's processes in its prepared directory."""
    words = shlex.join(by_hand(recipe.launch, STAGES[name].module, partial))
    each = f"on each of {recipe.launch.machines} machines, NUMBER from 0" if recipe.launch.machines > 1 else "start it"
    Console(highlight=False).print(f"{name}: prepared; {each}: {words}", markup=False, soft_wrap=True)


def run_stage(
    recipe: Recipe,
    name: str,
    *,
    overwrite: bool,
    command: Sequence[str],
    inputs: Mapping[str, str],
    start: Callable[[Recipe, str, Path, int], None] = run_process,
) -> Path:
    """Runs one stage unless it is done; returns its directory.

    Args:
        start: what is done with the prepared directory, under its lock: `run_process` or `show_start`.

    Errors:
        UserError: an input is missing or damaged, the disk refuses, or what is there was made from something else.
        SystemExit: the stage failed; it has printed why, its exit code is passed on (128 + n after signal n).
    """
    out = run_directory(recipe) / name
    try:
        return _run_stage(recipe, name, overwrite, command, input_paths(recipe, name, inputs), start)
    except OSError as error:
        if not is_disk_error(error):
            raise
        raise UserError(disk_message(error, out.parent)) from error


def _run_stage(
    recipe: Recipe,
    name: str,
    overwrite: bool,
    command: Sequence[str],
    paths: Mapping[str, str],
    start: Callable[[Recipe, str, Path, int], None],
) -> Path:
    console = Console(highlight=False)
    out = run_directory(recipe) / name
    prepare(recipe, wanted_paths(recipe, name, paths), console)
    _make_directory(out.parent)
    refusal = f"another process is running the stage {name} in {out.parent}."
    with only_one(out.parent / f".{name}.lock", refusal) as lock:
        recover_replaced(out)
        _check_inputs(recipe, name, paths, verify=False)
        mark = fingerprint(recipe, name, paths)
        state = _state(out, mark, overwrite=overwrite)
        if state == "done":
            refuse_missing_files(out)
            console.print(f"{name}: done already, skipped ({out})", markup=False, soft_wrap=True)
            return out
        if state.startswith("stale"):
            raise UserError(
                f"{name}: {_why_stale(out, mark, state)}", mend="Use --overwrite to replace it, or another `name`."
            )
        _check_inputs(recipe, name, paths, verify=True)
        job = {
            "stage": name,
            "fingerprint": mark,
            "inputs": {
                role: {
                    "path": path,
                    "kinds": list(stage_inputs(recipe, name)[role].kinds),
                    "wanted_as": wanted_as(recipe, name, role, path),
                    "identity": mark["inputs"][role],
                }
                for role, path in paths.items()
            },
            "overwrite": overwrite,
            "command": list(command),
        }
        _prepare_partial(recipe, _partial(out), job, resume=state == "resume")
        verb = "resumes" if state == "resume" else "starts"
        console.print(f"{name}: {verb} in {_partial(out)}", markup=False, soft_wrap=True)
        start(recipe, name, _partial(out), lock)
    return out


def prepare(recipe: Recipe, needed: Sequence[str], console: Console) -> None:
    """Runs the recipe's `prepare` commands whose product is needed and absent; products appear whole or not at all.

    Errors:
        UserError: the command cannot be started, fails or makes nothing.
    """
    for entry in recipe.prepare:
        target = Path(entry.makes)
        if not any(_is_inside(path, target) for path in needed):
            continue
        if target.exists():
            _say_if_outdated(target, entry.command, console)
            continue
        _make_directory(target.parent)
        with only_one(target.parent / f".{target.name}.lock") as lock:
            if not target.exists():
                console.print(f"prepare: {target} is made by `{entry.command}`", markup=False, soft_wrap=True)
                _make(target, entry.command, lock)


def _make(target: Path, command: str, lock: int) -> None:
    partial = _partial(target)
    if partial.exists():
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    try:
        words = [word.replace("{out}", str(partial)) for word in shlex.split(command)]
        words[0] = sys.executable if words[0] in ("python", "python3") else words[0]
        ended = run_child(words, lock=lock)
    except (ValueError, FileNotFoundError, PermissionError) as error:
        raise UserError(
            f"prepare: `{command}` cannot be run: {error}.", mend="Mend `prepare` in the recipe."
        ) from error
    if ended.interrupted_by is not None:
        sys.exit(128 + ended.interrupted_by)
    if ended.code != 0 or not partial.exists():
        raise UserError(
            f"prepare: `{command}` did not make {target} (exit code {ended.code}).",
            mend="Its own message is above; mend it and run again.",
        )
    sync_tree(partial)
    write_text(_made_by(target), _maker_sha256(command))
    partial.rename(target)


def _say_if_outdated(target: Path, command: str, console: Console) -> None:
    made_by = _made_by(target)
    if made_by.is_file() and made_by.read_text() != _maker_sha256(command):
        console.print(
            f"prepare: {target} was made by another command or an earlier version of its script. It is used as it is; "
            "remove it to have it made anew.",
            markup=False,
            soft_wrap=True,
        )


def _made_by(target: Path) -> Path:
    """Where `_maker_sha256` of the command that made `target` is kept."""
    return target.with_name(f".{target.name}.made_by")


def _maker_sha256(command: str) -> str:
    """Hash of a `prepare` command and of the files that it names, as paths or as `-m package.module`."""
    digest = hashlib.sha256(command.encode())
    for word in shlex.split(command):
        for file in (Path(word), Path(*word.split(".")).with_suffix(".py")):
            if file.is_file():
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _state(out: Path, mark: Mapping[str, Any], *, overwrite: bool) -> State:
    """What would happen to `out` now.

    With `overwrite` everything is made anew, but for an unfinished run that was itself started with `overwrite`.
    """
    partial = _partial(out)
    if (partial / MANIFEST).exists():
        return "resume"
    if overwrite:
        return "resume" if _is_own_restart(partial, mark) else "start"
    if (out / MANIFEST).exists():
        if read_manifest(out)["fingerprint"]["sha256"] == mark["sha256"]:
            return "done"
        return "resume" if _is_own_restart(partial, mark) else "stale"
    if out.exists():
        raise UserError(
            f"{out} exists, but is no finished stage: it has no {MANIFEST}.",
            mend="Move it away, or use --overwrite to replace it.",
        )
    if (partial / JOB).exists():
        return "resume" if read_job(partial)["fingerprint"]["sha256"] == mark["sha256"] else "stale partial"
    return "start"


def _is_own_restart(partial: Path, mark: Mapping[str, Any]) -> bool:
    """Whether an unfinished run of exactly this was started with --overwrite; a damaged job is not."""
    if not (partial / JOB).exists():
        return False
    try:
        job = read_job(partial)
    except UserError:
        return False
    return bool(job["overwrite"]) and job["fingerprint"]["sha256"] == mark["sha256"]


def _why_stale(out: Path, mark: Mapping[str, Any], state: str) -> str:
    if state == "stale":
        before, what = read_manifest(out)["fingerprint"], f"{out} was made from something else"
    else:
        before, what = read_job(_partial(out))["fingerprint"], f"{_partial(out)} is an unfinished run of something else"
    found = differences(before, mark)
    more = f" and {len(found) - SHOWN_DIFFERENCES} more" if len(found) > SHOWN_DIFFERENCES else ""
    return f"{what}; different now: {', '.join(found[:SHOWN_DIFFERENCES])}{more}."


def _prepare_partial(recipe: Recipe, partial: Path, job: Mapping[str, Any], *, resume: bool) -> None:
    """Creates or re-opens `<stage>.partial` with the resolved recipe and, last, the job description."""
    spent: Mapping[str, float] = {"wall_seconds": 0.0, "cpu_seconds": 0.0}
    if resume:
        spent = read_job(partial)["spent"]
    else:
        (partial / JOB).unlink(missing_ok=True)  # a kill from here on leaves nothing that could be resumed
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    write_text(partial / RESOLVED, dump_recipe(recipe))
    write_json(partial / JOB, {**job, "spent": spent})


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"{directory} exists and is not a directory.", mend="Set output_dir elsewhere.") from error


def _check_inputs(recipe: Recipe, name: str, paths: Mapping[str, str], *, verify: bool) -> None:
    for role, path in paths.items():
        kinds = stage_inputs(recipe, name)[role].kinds
        open_artifact(path, kinds=kinds, wanted_as=wanted_as(recipe, name, role, path), verify=verify)


def _is_inside(path: str, directory: Path) -> bool:
    inner, outer = Path(os.path.abspath(path)), Path(os.path.abspath(directory))
    return inner == outer or outer in inner.parents


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")
