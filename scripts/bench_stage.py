"""The ppo stage as `tristage ppo` runs it: phases, memory, and a resume in the middle, beside the estimate.

    python -m scripts.bench_stage --quick                                # Qwen2.5 0.5B, about 3 minutes on an H100
    python -m scripts.bench_stage --shapes 0.5b,1.5b --minutes 9.5
    python -m scripts.bench_stage --shapes tiny --device cpu --kill

Random models of public shapes, random prompts and a random reward model; nothing comes from a network. The command is
told by SIGUSR1 to save in the middle of an update (or killed, with --kill), started again, and must go on from the
saved state. Then it runs once undisturbed: on a CPU the updates after the resume must be equal bit for bit, on CUDA
the largest difference is reported. Updates that come first in a process are not timed. The report is written after
every step, so that a benchmark which runs out of time leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.artifacts import json_safe
from pipeline.errors import UserError
from pipeline.load import RESOLVED, load_recipe
from pipeline.recipe import Recipe
from pipeline.tracking import read_metrics
from scripts.bench_ppo import CACHE, GEMM_SIZE, ROOT, child_environment, run_child
from scripts.bench_ppo_models import Shape
from scripts.bench_stage_models import POLICY, PROMPTS, REWARD, SHAPES, SHORTEST, Job
from scripts.bench_stage_report import card_of, compare, expected, figures, markdown, memory_of, plan_of, warm
from scripts.bench_stage_run import Attempt, Disturbance, Site, interrupted, undisturbed
from scripts.estimate_check import bench_shape

MODELS = [sys.executable, "-m", "scripts.bench_stage_models"]
QUICK = {"shapes": "0.5b", "updates": 4}
USABLE = 0.9
"""Share of a GPU that the settings may fill by the estimate."""
SETTINGS: tuple[dict[str, Any], ...] = (
    {"max_tokens_per_micro_batch": 16384, "gradient_checkpointing": False, "gpu_memory_utilization": 0.3},
    {"max_tokens_per_micro_batch": 8192, "gradient_checkpointing": False, "gpu_memory_utilization": 0.2},
    {"max_tokens_per_micro_batch": 8192, "gradient_checkpointing": True, "gpu_memory_utilization": 0.2},
    {"max_tokens_per_micro_batch": 4096, "gradient_checkpointing": True, "gpu_memory_utilization": 0.1},
)
"""Tried in turn: the first one whose estimate fits the GPU is taken, or the last."""
STATE_BYTES = 12
"""Of a trained weight in a saved state: itself and Adam's two moments."""
KEPT_KEYS = ("time/", "rollout/", "response/")


@dataclass(frozen=True)
class Bench:
    """A benchmark in progress.

    Attributes:
        scratch: models and runs; removed at the end.
        machine: what `bench_stage_models.machine` found; its `flops`, where measured.
        deadline: by `time.monotonic`.
    """

    options: argparse.Namespace
    scratch: Path
    machine: Mapping[str, Any]
    environment: Mapping[str, str]
    deadline: float

    @property
    def middle(self) -> int:
        """The update that is disturbed, or whose state is the last before the kill."""
        return math.ceil(self.options.updates / 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns the exit code: 1 where a shape failed or a resume differs."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(words)
    deadline = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    environment = child_environment(options.threads, gpu=options.device == "auto")
    try:
        machine = json.loads(run_child([*MODELS, "machine"], ROOT, environment))
        options.dtype = options.dtype or {"cpu": "float32", "cuda": "bfloat16"}[machine["kind"]]
        options.out = options.out or ROOT / "benchmarks" / f"bench_stage_{_slug(machine)}.json"
        options.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.scratch, prefix="stage-") as scratch:
            bench = Bench(options, Path(scratch), machine, environment, deadline)
            return measure(bench, words)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2


def measure(bench: Bench, words: Sequence[str]) -> int:
    """All shapes, the report after each step; one that fails says why in it."""
    asked = {key: value for key, value in vars(bench.options).items() if key not in ("out", "scratch")}
    report = {
        "command": shlex.join(["python", "-m", "scripts.bench_stage", *without_paths(words)]),
        "asked": asked,
        "machine": dict(bench.machine),
        "shapes": {},
    }
    fine = True
    for name in bench.options.shapes:
        case = Case(bench, name, bench.scratch / name)
        report["shapes"][name] = case.found
        case.folder.mkdir()
        try:
            for step in (case.interrupt, case.run_through):
                step()
                write_report(bench.options.out, report)
        except UserError as error:
            case.found["failed"] = str(error).replace(str(case.folder), ".")
            write_report(bench.options.out, report)
        shutil.rmtree(case.folder)
        fine = fine and case.is_fine
    print(markdown(report), end="")
    return 0 if fine else 1


class Case:
    """One shape.

    Attributes:
        folder: models and runs.
        found: what the report says of it.
    """

    def __init__(self, bench: Bench, name: str, folder: Path) -> None:
        self.bench, self.name, self.folder = bench, name, folder
        self.shape = SHAPES[name]
        self.found: dict[str, Any] = {"parameters": bench_shape(self.shape).parameters, "notes": []}
        asks = bench.machine["kind"] == "cuda" and shutil.which("nvidia-smi") is not None
        self._site = Site(folder, bench.environment, bench.deadline, asks_card=asks)
        self._resumed: list[dict[str, Any]] = []
        self._attempts: list[Attempt] = []

    @property
    def is_fine(self) -> bool:
        """Whether nothing failed and the resume did what it must: the same numbers, on a CPU bit for bit."""
        comparison = self.found.get("comparison")
        if "failed" in self.found or comparison is None:
            return "failed" not in self.found
        return comparison["identical"] or (self.bench.machine["kind"] == "cuda" and not comparison["missing"])

    @property
    def _cold(self) -> set[int]:
        """Updates of the disturbed run that came first in their process."""
        return {1, self.found["resumed"]["update"] + 1}

    def interrupt(self) -> None:
        """Makes the models, and runs the stage with a disturbance and a resume."""
        bench, found = self.bench, self.found
        if time.monotonic() > bench.deadline:
            raise UserError("the time given by --minutes is over.", mend="Give more, or fewer --shapes.")
        _tell(f"{self.name}: models are made")
        make_models(bench, self.name, self.folder)
        recipe, settings = write_recipe(bench, self.name, self.folder, "interrupted")
        _tell(f"{self.name}: a run that is disturbed in the middle")
        disturbance = Disturbance(
            self.folder / "runs" / "interrupted" / "ppo.partial", bench.middle, bench.options.kill
        )
        self._attempts, saved, resumed, start = interrupted(self._site, _words(bench, "interrupted"), disturbance)
        manifest, self._resumed, resolved = self._read("interrupted", self._attempts)
        found |= {
            "settings": settings,
            "recipe": {key: resolved[key] for key in ("ppo", "rollout", "data")},
            "engine": manifest["engine"],
            "disturbed_by": "Killed in the middle of an update" if bench.options.kill else "Told by SIGUSR1 to save",
            "saved": asdict(saved),
            "resumed": asdict(resumed),
            "start_seconds": start,
            "flops": _peak(bench, self.shape),
        }
        self._add_figures(recipe, warm(self._resumed, self._cold), manifest)
        found["memory"]["peak"]["resumed"] = found["memory"]["peak"]["process"]

    def run_through(self) -> None:
        """Runs the stage without a disturbance, where time is left, and compares."""
        bench, found = self.bench, self.found
        if time.monotonic() + sum(attempt.seconds for attempt in self._attempts) > bench.deadline:
            found["notes"].append("No time was left for an undisturbed run.")
            return
        recipe, _ = write_recipe(bench, self.name, self.folder, "undisturbed")
        _tell(f"{self.name}: an undisturbed run")
        attempt = undisturbed(self._site, _words(bench, "undisturbed"))
        self._attempts.append(attempt)
        manifest, rows, _ = self._read("undisturbed", [attempt])
        after = found["resumed"]["update"]
        comparison = compare(self._resumed, rows, after)
        found["comparison"] = {**asdict(comparison), "identical": comparison.identical}
        peak = found["memory"]["peak"]["resumed"]
        self._add_figures(recipe, [*warm(self._resumed, self._cold), *warm(rows, {1})], manifest)
        found["memory"]["peak"]["resumed"] = peak

    def _read(
        self, run: str, attempts: Sequence[Attempt]
    ) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
        """Manifest, rows and resolved recipe of a complete run, which is then removed; notes what is raw in them."""
        out = self.folder / "runs" / run / "ppo"
        manifest, rows = json.loads((out / "manifest.json").read_text()), read_metrics(out)
        resolved = yaml.safe_load((out / RESOLVED).read_text())
        shutil.rmtree(out.parent)
        raw = {"attempts": [asdict(attempt) for attempt in attempts], "updates": _kept(rows)}
        self.found.setdefault("runs", {})[run] = raw
        return manifest, rows, resolved

    def _add_figures(self, recipe: Recipe, rows: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> None:
        """Medians over `rows`, or over all updates where none was warm; memory by `manifest`, and the estimate."""
        found, machine = self.found, {**self.bench.machine, "flops": self.found["flops"]}
        cards = [attempt.card_gib for attempt in self._attempts if attempt.card_gib is not None]
        found["figures"] = {**figures(rows or warm(self._resumed, ())), "warm": bool(rows)}
        found["memory"] = memory_of(manifest, max(cards, default=None))
        plan = plan_of(self.shape, recipe, machine, found["figures"]["response_tokens"]["median"])
        found["estimate"] = expected(plan, found["engine"]["name"], known=card_of(machine) is not None)


def make_models(bench: Bench, name: str, folder: Path) -> None:
    """Writes models and prompts.

    Errors:
        UserError: the disk has too little room for them, a saved state and the result.
    """
    options = bench.options
    trained = 2 * SHAPES[name].parameters
    bytes_each = {"float32": 4, "bfloat16": 2}[options.dtype]
    wanted = trained * (STATE_BYTES + 2 * bytes_each) + SHAPES[name].parameters * 4
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise UserError(
            f"{wanted / 2**30:.0f} GiB are wanted for models, a state and a result, and {free / 2**30:.0f} are free.",
            mend="Name another disk with --scratch, such as /dev/shm where there is enough memory.",
        )
    job = Job(
        shape=name,
        batch=options.batch,
        prompt=options.prompt,
        response=options.response,
        prompts=(options.updates + 1) * options.batch,
        dtype=options.dtype,
        device=bench.machine["kind"],
        reward=options.reward,
    )
    run_child([*MODELS, "make", json.dumps(asdict(job))], folder, bench.environment)


def write_recipe(bench: Bench, name: str, folder: Path, run: str) -> tuple[Recipe, dict[str, Any]]:
    """Writes `<run>.yaml` with the first settings whose estimate fits; returns it, --set included, and them."""
    file, engine = folder / f"{run}.yaml", "transformers" if _has_no_vllm(bench) else "vllm"

    def written(settings: Mapping[str, Any]) -> Recipe:
        file.write_text(yaml.safe_dump(recipe_of(bench, run, settings)))
        return load_recipe(file, [f"--{change}" for change in bench.options.set])

    for settings in SETTINGS:
        recipe = written(settings)
        plan = plan_of(SHAPES[name], recipe, bench.machine, bench.options.response / 2)
        if expected(plan, engine, known=False)["peak"] <= USABLE * plan.gpu.memory_gib:
            return recipe, dict(settings)
    return written(SETTINGS[-1]), dict(SETTINGS[-1])


def recipe_of(bench: Bench, run: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of one run; what it does not name is at the product's defaults."""
    options = bench.options
    if options.reward == "model":
        reward: dict[str, Any] = {"reward_model": REWARD}
    else:
        reward = {"rewards": {"words": {"function": "bench_reward:words"}}, "critic": "policy"}
    accelerate = None if options.accelerate is None else str(Path(options.accelerate).resolve())
    return {
        "name": run,
        "model": {"name_or_path": POLICY, "dtype": options.dtype},
        "data": {
            "prompts": PROMPTS,
            "max_prompt_tokens": options.prompt,
            "max_response_tokens": options.response,
        },
        "ppo": {
            "policy": POLICY,
            **reward,
            "updates": options.updates,
            "rollout_batch_size": options.batch,
            "max_tokens_per_micro_batch": settings["max_tokens_per_micro_batch"],
            "gradient_checkpointing": settings["gradient_checkpointing"],
            "eval_every": options.updates,
            "save_every": bench.middle if options.kill and run == "interrupted" else options.updates,
            "keep_states": 1,
        },
        "rollout": {"engine": options.engine, "gpu_memory_utilization": settings["gpu_memory_utilization"]},
        "eval": {"prompts": 2, "samples_per_prompt": 1, "shown_samples": 1},
        "launch": {"processes": options.processes, "accelerate": accelerate},
        "tracking": {"progress": False},
    }


def write_report(out: Path, report: Mapping[str, Any]) -> None:
    """The JSON, and its tables beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(json_safe(report), indent=2, allow_nan=False) + "\n")
    out.with_suffix(".md").write_text(markdown(report))


def _peak(bench: Bench, shape: Shape) -> float | None:
    """FLOP/s of a large matrix product on this CPU; on a GPU the data sheet's are taken."""
    if bench.machine["kind"] != "cpu":
        return None
    size = str(min(GEMM_SIZE["cpu"], 16 * shape.hidden_size))
    words = [sys.executable, "-m", "scripts.bench_ppo_models", "gemm", bench.options.dtype, "cpu", size]
    return json.loads(run_child(words, bench.scratch, bench.environment))["flops"]


def _words(bench: Bench, run: str) -> list[str]:
    return ["ppo", f"{run}.yaml", *(f"--{change}" for change in bench.options.set)]


def _kept(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The updates' rows, without what nobody reads in a report."""
    kept = [{key: value for key, value in row.items() if key == "step" or key.startswith(KEPT_KEYS)} for row in rows]
    return [row for row in kept if "time/update" in row]


def _has_no_vllm(bench: Bench) -> bool:
    return bench.options.engine == "transformers" or bench.machine["engines"]["vllm"] is None


def _slug(machine: Mapping[str, Any]) -> str:
    return "cpu" if machine["kind"] == "cpu" else re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")


def without_paths(words: Sequence[str]) -> list[str]:
    """The command line but for where it writes."""
    shown: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in ("--out", "--scratch"):
            next(rest)
        elif not word.startswith(("--out=", "--scratch=")):
            shown.append(word)
    return shown


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _shapes(text: str) -> list[str]:
    chosen = text.split(",")
    if not set(chosen) <= SHAPES.keys():
        raise argparse.ArgumentTypeError(f"a comma-separated list of {', '.join(SHAPES)}")
    return chosen


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="0.5b with 4 updates, unless --shapes or --updates say otherwise")
    add("--shapes", type=_shapes, default="0.5b,1.5b", help=f"of {', '.join(SHAPES)}")
    add("--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU where there is one")
    add("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, bfloat16 on CUDA")
    add("--updates", type=int, default=6, help="of each run; at least 2")
    add("--processes", type=int, default=1, help="launch.processes")
    add("--accelerate", help="launch.accelerate, such as configs/accelerate/fsdp2.yaml")
    add("--engine", choices=("auto", "vllm", "transformers"), default="auto", help="rollout.engine")
    add("--batch", type=int, default=64, help="prompts of an update")
    add("--prompt", type=int, default=256, help="tokens of a prompt")
    add("--response", type=int, default=128, help="longest response")
    add("--reward", choices=("model", "function"), default="model", help="what scores")
    add("--kill", action="store_true", help="kill the run in place of telling it to save")
    add("--minutes", type=float, help="time for everything; what does not fit is left out")
    add("--threads", type=int, default=None, help="of each process; default: the machine's, shared among them")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe key")
    add("--scratch", type=Path, default=CACHE, help="directory for models and states; default: .bench")
    add("--out", type=Path, help="default: benchmarks/bench_stage_<device>.json; tables go beside it, as .md")
    if "--quick" in arguments:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    if min(options.batch, options.response, options.processes, options.updates - 1) < 1 or options.prompt < SHORTEST:
        words = "--batch, --response and --processes must be at least 1, --updates 2"
        parser.error(f"{words}, and --prompt {SHORTEST}")
    options.threads = options.threads or max(1, (os.cpu_count() or 1) // options.processes)
    return options


if __name__ == "__main__":
    raise SystemExit(main())
