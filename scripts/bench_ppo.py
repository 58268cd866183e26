"""PPO's cost per update, beside the last PPO of TRL (trl 1.12.0 `trl.experimental.ppo.PPOTrainer`).

    python -m scripts.bench_ppo --workload a [--pairs 5 --sharing full,lora --dtype bfloat16]
    python -m scripts.bench_ppo --workload qwen2.5-1.5b --device cuda --sharing full,lora

Both sides train the same random models on the same prompts with the same settings and threads. The models end their
answers by chance (P(EOS) = 1 / mean length) and the learning rate is so low that they go on doing so. The sides take
turns (A B A B ...), each turn a fresh process whose first updates are not counted (`--warm-up`), and a ratio is the
median over the rounds of the ratio within a round. Our side is the PPO stage as `tristage ppo` runs it; its held-out
evaluations are not counted. On CUDA our side runs alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.load import RESOLVED
from scripts.bench_ppo_models import WORKLOADS, Workload
from scripts.bench_ppo_report import PEER, PHASES, Rounds, Turn, Update, markdown, summarise

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".bench"
PEER_VERSION = "1.12.0"
PEER_PACKAGES = ("torch==2.13.0", f"trl=={PEER_VERSION}", "transformers==5.19.0", "peft", "psutil")
LEARNING_RATE = 1e-7
EPOCHS = 4
KL_COEF = 0.05
MISSING_EOS_PENALTY = 1.0
GEMM_SIZE = {"cpu": 4096, "cuda": 8192}
TAIL = 3000
SHARINGS = ("full", "lora", "lora-shared")


@dataclass(frozen=True)
class Bench:
    """A benchmark in progress.

    Attributes:
        scratch: models, runs and results; removed at the end.
        peer: TRL's python; None to run our side alone.
    """

    options: argparse.Namespace
    workload: Workload
    scratch: Path
    peer: Path | None

    @property
    def environment(self) -> dict[str, str]:
        """Of every child: no GPU unless it is asked for."""
        return child_environment(self.options.threads, gpu=self.options.device == "cuda")

    def run(self, words: Sequence[str | Path], **environment: str) -> str:
        """Runs a child to its end and returns what it printed."""
        return run_child(words, self.scratch, self.environment | environment)


def child_environment(threads: int, *, gpu: bool) -> dict[str, str]:
    """This process's, with the same threads for every child, no network, and no GPU unless `gpu`."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    fixed = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return os.environ | fixed | hidden | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}


def run_child(words: Sequence[str | Path], folder: Path, environment: Mapping[str, str]) -> str:
    """Runs a child in `folder` to its end and returns what it printed; a failure is a UserError with its last words."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env=dict(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        what = " ".join(str(word) for word in words[1:4])
        raise UserError(
            f"`{what}` ended with exit code {done.returncode}:\n{(done.stdout + done.stderr)[-TAIL:]}",
            mend="Mend what it names.",
        )
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns the exit code."""
    options = _parse(arguments)
    try:
        CACHE.mkdir(exist_ok=True)
        peer = None if options.no_peer or options.device == "cuda" else peer_python(options.peer_python)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="run-") as scratch:
            measure(Bench(options, WORKLOADS[options.workload], Path(scratch), peer))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def measure(bench: Bench) -> None:
    """All rounds; the report is written after each, so that an interrupted benchmark leaves what it has."""
    options, models = bench.options, [sys.executable, "-m", "scripts.bench_ppo_models"]
    prompts = (options.updates + 1) * bench.workload.batch
    bench.run([*models, "make", options.workload, bench.scratch, str(prompts), options.device])
    rounds = Rounds(bench.workload, [], [])
    settings: dict[str, Any] = {}
    for number in range(options.pairs):
        size = str(min(GEMM_SIZE[options.device], 16 * bench.workload.shape.hidden_size))
        rounds.gemms.append(json.loads(bench.run([*models, "gemm", options.dtype, options.device, size])))
        for side in [PEER] * (bench.peer is not None) + options.sharing:
            turn, settings[side] = trl_turn(bench, number) if side == PEER else our_turn(bench, number, side)
            rounds.turns.append(turn)
            cost = f"{turn.mean('cpu_seconds'):.2f} CPU-s, {turn.mean('wall_seconds'):.2f} s per update"
            sys.stderr.write(f"round {number + 1} of {options.pairs}, {side}: {cost}\n")
        write_report(bench, rounds, settings)
    print(markdown(rounds, title(bench, rounds)), end="")


def our_turn(bench: Bench, number: int, sharing: str) -> tuple[Turn, dict[str, Any]]:
    """One run of the PPO stage as `tristage ppo` starts it: its turn, and the settings it ran with."""
    recipe = bench.scratch / f"{sharing}.yaml"
    recipe.write_text(yaml.safe_dump(our_recipe(bench, number, sharing)))
    changes = [f"--{change}" for change in bench.options.set]
    bench.run([sys.executable, "-m", "pipeline.cli", "ppo", recipe, "--overwrite", *changes])
    out = bench.scratch / "runs" / sharing / "ppo"
    manifest = json.loads((out / "manifest.json").read_text())
    resolved = yaml.safe_load((out / RESOLVED).read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    minibatches = resolved["ppo"]["num_minibatches"]
    updates = [our_update(row, row["policy/steps"] / minibatches) for row in rows if "time/cpu_seconds" in row]
    settings = {
        "model": {"dtype": resolved["model"]["dtype"]},
        "ppo": {key: value for key, value in resolved["ppo"].items() if key not in ("policy", "reward_model")},
        "rollout": resolved["rollout"],
        "engine": manifest["engine"],
        "packages": manifest["packages"],
        "code": manifest["code"],
        "device": manifest["device"],
    }
    memory = manifest["peak_memory_gib"], manifest.get("peak_gpu_memory_gib")
    return Turn(number, sharing, updates[bench.options.warm_up :], *memory), settings


def our_update(row: Mapping[str, float], epochs: float) -> Update:
    """One row of metrics.jsonl."""
    phases = {phase: row[f"time/{phase}"] for phase in PHASES}
    return Update(row["time/cpu_seconds"], sum(phases.values()), row["response/length"], phases, epochs)


def our_recipe(bench: Bench, number: int, sharing: str) -> dict[str, Any]:
    """The recipe of one turn; what it does not name is at the product's defaults."""
    options, workload = bench.options, bench.workload
    return {
        "name": sharing,
        "seed": number,
        "model": {"name_or_path": str(bench.scratch / "policy"), "dtype": options.dtype},
        "data": {
            "prompts": str(bench.scratch / "prompts.jsonl"),
            "max_prompt_tokens": workload.prompt_tokens,
            "max_response_tokens": workload.response_tokens,
        },
        "ppo": {
            "policy": str(bench.scratch / "policy"),
            "reward_model": str(bench.scratch / ("rm" if sharing == "full" else "rm_adapter")),
            "updates": options.updates,
            "rollout_batch_size": workload.batch,
            "num_ppo_epochs": EPOCHS,
            "num_minibatches": 1,
            "max_tokens_per_micro_batch": workload.micro_batch_tokens,
            "learning_rate": LEARNING_RATE,
            "critic_learning_rate": LEARNING_RATE,
            "lr_schedule": "constant",
            "kl_coef": KL_COEF,
            "missing_eos_penalty": MISSING_EOS_PENALTY,
            "eval_every": options.updates + 1,
            "save_every": options.updates + 1,
            **sharing_keys(sharing),
        },
        "rollout": {"engine": options.engine},
        "eval": {"prompts": 2, "samples_per_prompt": 1, "shown_samples": 1},
        "tracking": {"progress": False},
    }


def sharing_keys(sharing: str) -> dict[str, str]:
    """Recipe keys of one way to share the base; `lora-shared` also makes the critic a head on the policy's trunk."""
    mode, _, critic = sharing.partition("-")
    return {"sharing": mode} | ({"critic": critic} if critic else {})


def trl_turn(bench: Bench, number: int) -> tuple[Turn, dict[str, Any]]:
    """One run of TRL's PPOTrainer: its turn, and the settings it ran with."""
    job, result = bench.scratch / "trl.json", bench.scratch / "trl.result.json"
    config = trl_config(bench, number)
    job.write_text(
        json.dumps(
            {
                "models": str(bench.scratch),
                "scratch": str(bench.scratch / "trl"),
                "result": str(result),
                "threads": bench.options.threads,
                "config": config,
            }
        )
    )
    bench.run([bench.peer or "", ROOT / "scripts" / "bench_ppo_trl.py", job], PYTHONPATH="")
    found = json.loads(result.read_text())
    updates = [Update(**update, phases={}, epochs=EPOCHS) for update in found["updates"]]
    settings = {"config": config, "packages": found["packages"], "threads": found["threads"]}
    return Turn(number, PEER, updates[bench.options.warm_up :], found["peak_memory_gib"], None), settings


def trl_config(bench: Bench, number: int) -> dict[str, Any]:
    """Its PPOConfig: one micro-batch, no gradient checkpointing, which is its fastest, and the same algorithm."""
    workload = bench.workload
    return {
        "seed": number,
        "use_cpu": True,
        "bf16": bench.options.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "per_device_train_batch_size": workload.batch,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": 1,
        "num_ppo_epochs": EPOCHS,
        "total_episodes": workload.batch * bench.options.updates,
        "response_length": workload.response_tokens,
        "local_rollout_forward_batch_size": workload.batch,
        "stop_token": "eos",
        "missing_eos_penalty": MISSING_EOS_PENALTY,
        "kl_coef": KL_COEF,
        "temperature": 1.0,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "num_sample_generations": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def peer_python(chosen: Path | None) -> Path:
    """TRL's python: the one given, or that of `.bench/trl-venv`, which is made beside and renamed when complete.

    Errors:
        UserError: it cannot be made, or holds another trl.
    """
    home = CACHE / "trl-venv"
    python = Path(os.path.abspath(chosen)) if chosen else home / "bin" / "python"
    if chosen is None and not home.exists():
        partial = home.with_name("trl-venv.partial")
        shutil.rmtree(partial, ignore_errors=True)
        sys.stderr.write(f"installing {' '.join(PEER_PACKAGES)} in {home}\n")
        venv.create(partial, with_pip=True, symlinks=True)
        words = [str(partial / "bin" / "python"), "-m", "pip", "install", "--quiet", *PEER_PACKAGES]
        if subprocess.run(words, check=False).returncode:
            raise UserError(
                f"{' '.join(words[1:])} failed.", mend="Check the network, or give --peer-python or --no-peer."
            )
        partial.rename(home)
    ask = "import importlib.metadata as m; print(m.version('trl'))"
    try:
        version = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False).stdout.strip()
    except OSError as error:
        raise UserError(f"{python} cannot be run: {error}.", mend="Correct --peer-python.") from error
    if version != PEER_VERSION:
        found = f"holds trl {version}" if version else "holds no trl"
        raise UserError(f"{python} {found}, wanted {PEER_VERSION}.", mend=f"Correct --peer-python, or remove {home}.")
    return python


def title(bench: Bench, rounds: Rounds) -> str:
    """What was measured, in one line."""
    workload, options = bench.workload, bench.options
    return (
        f"PPO, workload {options.workload}: {workload.shape.parameters / 1e6:.1f}M parameters, vocabulary "
        f"{workload.shape.vocab_size}, {workload.batch} prompts x {workload.prompt_tokens} tokens, responses up to "
        f"{workload.response_tokens}, {EPOCHS} epochs, {options.dtype}, {rounds.device}, {options.threads} threads, "
        f"{len(rounds.gemms)} rounds"
    )


def write_report(bench: Bench, rounds: Rounds, settings: Mapping[str, Any]) -> None:
    """`bench_ppo_<workload>_<device>.json` and `.md` in `--out`."""
    options = bench.options
    asked = {key: value for key, value in vars(options).items() if key not in ("out", "peer_python")}
    report = {
        "asked": asked,
        "workload": asdict(bench.workload),
        "settings": settings,
        "gemm": rounds.gemms,
        "rounds": [asdict(turn) for turn in rounds.turns],
        "summary": summarise(rounds),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"bench_ppo_{options.workload}_{options.device}"
    (options.out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.out / f"{name}.md").write_text(markdown(rounds, title(bench, rounds)))


def _sharings(text: str) -> list[str]:
    chosen = text.split(",")
    if not set(chosen) <= set(SHARINGS):
        raise argparse.ArgumentTypeError(f"a comma-separated list of {', '.join(SHARINGS)}")
    return chosen


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="a")
    parser.add_argument("--device", choices=GEMM_SIZE, default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, bfloat16 on CUDA")
    parser.add_argument("--pairs", type=int, default=5, help="rounds")
    parser.add_argument("--updates", type=int, default=2, help="per turn")
    parser.add_argument("--warm-up", type=int, default=1, help="first updates of a turn that are not counted")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--sharing", type=_sharings, default=["full"], help="of our side: full, lora, lora-shared")
    parser.add_argument("--engine", choices=("auto", "vllm", "transformers"), default="auto", help="rollout.engine")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe key of our side")
    parser.add_argument("--peer-python", type=Path, help="python of an environment with TRL")
    parser.add_argument("--no-peer", action="store_true", help="our side alone")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="where the report goes")
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or {"cpu": "float32", "cuda": "bfloat16"}[options.device]
    if options.pairs < 1 or not 0 <= options.warm_up < options.updates:
        parser.error("--pairs must be at least 1, and --updates more than --warm-up")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
