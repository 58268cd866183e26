"""Plans the stages of a recipe and runs each as a subprocess: skip, resume, refuse or start.

Stages are named by module string and none is imported: planning costs neither torch nor trl.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from pipeline.artifacts import identity, open_artifact, read_manifest, recover_replaced, write_json
from pipeline.data import source_fingerprint
from pipeline.errors import UserError
from pipeline.load import RESOLVED, dump_recipe
from pipeline.recipe import DataSource, Recipe
from pipeline.stage import JOB

State = Literal["done", "resume", "start", "stale", "stale partial"]


@dataclass(frozen=True)
class Input:
    """An input of a stage: the key that overrides it, or the stage that makes it."""

    key: str
    made_by: str | None
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class StageSpec:
    """How a stage is started, what it reads and which recipe sections decide its result."""

    module: str
    inputs: Mapping[str, Input]
    sections: tuple[str, ...]
    data: tuple[str, ...]


POLICIES = ("model", "sft", "ppo")
STAGES: dict[str, StageSpec] = {
    "sft": StageSpec(
        "policy.sft",
        {"model": Input("sft.init_from", None, POLICIES)},
        ("model", "data", "sft"),
        ("sft",),
    ),
    "rm": StageSpec(
        "reward_model.train",
        {"policy": Input("rm.init_from", "sft", POLICIES)},
        ("model", "data", "rm", "rollout"),
        ("preferences", "prompts"),
    ),
    "ppo": StageSpec(
        "policy.ppo.stage",
        {
            "policy": Input("ppo.policy", "sft", POLICIES),
            "reward_model": Input("ppo.reward_model", "rm", ("rm",)),
        },
        ("model", "data", "ppo", "rollout", "eval"),
        ("prompts",),
    ),
    "generate": StageSpec(
        "rollout.generate",
        {"policy": Input("generate.policy", "ppo", POLICIES)},
        ("model", "data", "rollout", "eval"),
        ("prompts",),
    ),
}
ORDER = ("sft", "rm", "ppo")


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a plan: where it is written, what it reads and what would happen if it were run now."""

    name: str
    out: Path
    inputs: Mapping[str, str]
    state: State


def run_directory(recipe: Recipe) -> Path:
    """`output_dir/name`, relative to the working directory."""
    return Path(recipe.output_dir) / recipe.name


def input_paths(recipe: Recipe, name: str, overrides: Mapping[str, str]) -> dict[str, str]:
    """Where stage `name` reads each input from: an override, the recipe's key, or the stage that makes it."""
    dumped = recipe.model_dump()
    paths = {}
    for role, entry in STAGES[name].inputs.items():
        section, _, key = entry.key.partition(".")
        chosen = overrides.get(role) or dumped.get(section, {}).get(key)
        default = recipe.model.name_or_path if entry.made_by is None else str(run_directory(recipe) / entry.made_by)
        paths[role] = str(chosen or default)
    return paths


def plan(recipe: Recipe, stages: Sequence[str] = ORDER) -> list[PlannedStage]:
    """What `run_stages` would do, without doing it."""
    planned = []
    for name in stages:
        inputs = input_paths(recipe, name, {})
        out = run_directory(recipe) / name
        ready = all(Path(path).exists() for path in (*inputs.values(), *_data_files(recipe, name)))
        mark = fingerprint(recipe, name, inputs) if ready else None
        planned.append(PlannedStage(name, out, inputs, _state(out, mark)))
    return planned


def run_stages(recipe: Recipe, stages: Sequence[str], *, overwrite: bool, command: Sequence[str]) -> None:
    """Runs `stages` in order, each in a process of its own; a finished one with the same fingerprint is skipped.

    Errors:
        UserError: an input is missing, or a finished stage differs from what the recipe asks for.
        SystemExit: a stage failed; it has printed why, its exit code is passed on.
    """
    for name in stages:
        run_stage(recipe, name, overwrite=overwrite, command=command, inputs={})


def run_stage(
    recipe: Recipe, name: str, *, overwrite: bool, command: Sequence[str], inputs: Mapping[str, str]
) -> Path:
    """Runs one stage unless it is done; returns its directory."""
    console = Console(highlight=False)
    out = run_directory(recipe) / name
    paths = input_paths(recipe, name, inputs)
    prepare(recipe, [*paths.values(), *_data_files(recipe, name)], console)
    _make_directory(out.parent)
    with _only_one(out):
        recover_replaced(out)
        for role, path in paths.items():
            entry = STAGES[name].inputs[role]
            if not (out / "manifest.json").exists() or overwrite:
                open_artifact(path, kinds=entry.kinds, wanted_as=f"{name}: input {entry.key}")
        mark = fingerprint(recipe, name, paths)
        state = _state(out, mark)
        if state == "done" and not overwrite:
            console.print(f"{name}: done already, skipped ({out})", markup=False)
            return out
        if state.startswith("stale") and not overwrite:
            raise UserError(_why_stale(out, mark, name, state), mend="Use --overwrite to replace it, or another `name`.")
        partial = _prepare_partial(recipe, name, paths, mark, state == "resume", command)
        console.print(f"{name}: {'resumes' if state == 'resume' else 'starts'} in {partial}", markup=False)
        _run_process(STAGES[name].module, partial)
    return out


def fingerprint(recipe: Recipe, name: str, inputs: Mapping[str, str]) -> dict[str, Any]:
    """What decides a stage's result: recipe sections, seed, inputs, data files and the code's version."""
    spec = STAGES[name]
    dumped = recipe.model_dump(mode="json")
    content = {
        "stage": name,
        "seed": recipe.seed,
        "sections": {section: dumped[section] for section in spec.sections},
        "inputs": {role: identity(path) for role, path in inputs.items()},
        "data": {key: source_fingerprint(source) for key, source in _sources(recipe, name).items()},
        "version": metadata.version("tristage"),
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {"sha256": digest, **content}


def prepare(recipe: Recipe, needed: Sequence[str], console: Console) -> None:
    """Runs the recipe's `prepare` commands whose product is needed and absent; products appear whole or not at all."""
    for entry in recipe.prepare:
        target = Path(entry.makes)
        if target.exists() or not any(_is_inside(Path(path), target) for path in needed):
            continue
        partial = target.with_name(target.name + ".partial")
        if partial.exists():
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        _make_directory(target.parent)
        words = [word.replace("{out}", str(partial)) for word in shlex.split(entry.command)]
        words[0] = sys.executable if words[0] in ("python", "python3") else words[0]
        console.print(f"prepare: {target} is made by `{entry.command}`", markup=False)
        if subprocess.run(words, check=False).returncode != 0 or not partial.exists():
            raise UserError(
                f"prepare: `{entry.command}` did not make {target}.", mend="Its own message is above; mend it and run again."
            )
        partial.rename(target)


def _state(out: Path, mark: Mapping[str, Any] | None) -> State:
    partial = out.with_name(out.name + ".partial")
    if (out / "manifest.json").exists():
        return "done" if mark is not None and read_manifest(out)["fingerprint"]["sha256"] == mark["sha256"] else "stale"
    if (partial / JOB).exists():
        job = json.loads((partial / JOB).read_text(encoding="utf-8"))
        return "resume" if mark is not None and job["fingerprint"]["sha256"] == mark["sha256"] else "stale partial"
    return "start"


def _why_stale(out: Path, mark: Mapping[str, Any], name: str, state: str) -> str:
    if state == "stale":
        before, what = read_manifest(out)["fingerprint"], f"{name}: {out} was made from something else"
    else:
        partial = out.with_name(out.name + ".partial")
        before = json.loads((partial / JOB).read_text(encoding="utf-8"))["fingerprint"]
        what = f"{name}: {partial} is an unfinished run of something else"
    return f"{what}; different now: {', '.join(_differences(before, mark))}."


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in {**before, **now}:
            if key != "sha256" or path:
                inner = key if path in ("", "sections") else f"{path}.{key}"
                found += _differences(before.get(key), now.get(key), inner)
        return found
    return [] if before == now else [f"{path} ({_brief(before)} -> {_brief(now)})"]


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:10]}..."


def _prepare_partial(
    recipe: Recipe, name: str, paths: Mapping[str, str], mark: Mapping[str, Any], resume: bool, command: Sequence[str]
) -> Path:
    """Creates or re-opens `<stage>.partial` with the resolved recipe and the job description."""
    partial = run_directory(recipe) / f"{name}.partial"
    spent = {"wall_seconds": 0.0, "cpu_seconds": 0.0}
    if resume:
        spent = json.loads((partial / JOB).read_text(encoding="utf-8"))["spent"]
    else:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    (partial / RESOLVED).write_text(dump_recipe(recipe), encoding="utf-8")
    spec = STAGES[name]
    job = {
        "stage": name,
        "fingerprint": mark,
        "inputs": {
            role: {
                "path": path,
                "kinds": list(spec.inputs[role].kinds),
                "wanted_as": f"{name}: input {spec.inputs[role].key}",
                "identity": identity(path),
            }
            for role, path in paths.items()
        },
        "spent": spent,
        "command": list(command),
    }
    write_json(partial / JOB, job)
    return partial


def _run_process(module: str, partial: Path) -> None:
    """Runs the stage as a child; Ctrl-C reaches it through the terminal, SIGTERM is passed on."""
    environment = os.environ | {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    child = subprocess.Popen([sys.executable, "-m", module, str(partial)], env=environment)
    previous = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        code = child.wait()
    except KeyboardInterrupt:
        code = child.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)
    if code < 0:
        raise UserError(
            f"the stage was ended by signal {signal.Signals(-code).name}; {partial} is kept.",
            mend="Run the same command again: it resumes.",
        )
    if code:
        sys.exit(code)


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Holds the stage's lock; the kernel lets go of it when this process ends, however it ends."""
    file = out.parent / f".{out.name}.lock"
    with file.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is running this stage in {out.parent}.", mend="Wait for it, or end it first."
            ) from error
        yield


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"{directory} exists and is not a directory.", mend="Set output_dir elsewhere.") from error


def _sources(recipe: Recipe, name: str) -> dict[str, str | DataSource]:
    """The data sources that stage `name` reads; prompts fall back to preferences, then to sft."""
    data = recipe.data
    fallback = {"sft": data.sft, "preferences": data.preferences, "prompts": data.prompts or data.preferences or data.sft}
    found = {}
    for key in STAGES[name].data:
        source = fallback[key]
        if source is None:
            raise UserError(f"{name}: data.{key} is not set.", mend=f"Set data.{key} in the recipe.")
        found[key] = source
    return found


def _data_files(recipe: Recipe, name: str) -> list[str]:
    sources = _sources(recipe, name).values()
    paths = [source if isinstance(source, str) else source.path for source in sources]
    judges = [str(v) for judge in recipe.eval.judges.values() for v in judge.kwargs.values()]
    prepared = [Path(entry.makes) for entry in recipe.prepare]
    local = [p for p in judges if any(_is_inside(Path(p), target) for target in prepared)]
    return [p for p in paths if Path(p).suffix or Path(p).exists() or any(_is_inside(Path(p), t) for t in prepared)] + local


def _is_inside(path: Path, directory: Path) -> bool:
    return path == directory or directory in path.parents
