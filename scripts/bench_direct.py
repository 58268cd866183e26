"""Cost of an optimiser step of our direct methods, beside TRL's trainers of the same methods (trl 1.16).

    python -m scripts.bench_direct --workload prompt-heavy [--methods dpo,simpo,ipo,kto,orpo --pairs 5 --threads 1]

Both sides run in the project's environment and train the same random Llama on the same token ids, in the same batches,
in float32 with AdamW. The sides take turns (A B A B ...), each turn a fresh process of one epoch whose first step is
not counted, and a ratio is the median over the rounds of the ratio within a round. TRL computes a reference in every
step by default, or all of them first (`precompute_ref_log_probs`); ours are computed first and kept. What that pass
costs is measured apart, and also spread over the steps of the one epoch. KTO learns from one answer per prompt, and
reads another one for its estimate of the KL. Both sides keep the order of the rows; lengths are not grouped.
"""

from __future__ import annotations

import argparse
import json
import mmap
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from scripts.bench_ppo import CACHE, ROOT, child_environment, run_child
from scripts.bench_ppo_models import FIRST_WORD, WORKLOADS
from scripts.bench_ppo_report import Spread

SHAPES = {"tiny": WORKLOADS["tiny"].shape, "small": WORKLOADS["a"].shape, "135m": WORKLOADS["b"].shape}
LENGTHS = {"prompt-heavy": (128, 32), "balanced": (32, 64)}
"""Mean tokens of a prompt and of each of its two answers, EOS included."""
PROMPT_SPREAD, ANSWER_SPREAD = 0.25, 0.5
"""Lengths are uniform within this share of the mean on either side."""
METHODS = ("dpo", "simpo", "ipo", "kto", "orpo")
REFERENCED = ("dpo", "ipo", "kto")
PEER, PRECOMPUTED, OURS, LIVE = "trl", "trl-precomputed", "ours", "ours-live"
TITLES = {
    PEER: "TRL",
    PRECOMPUTED: "TRL, precompute_ref_log_probs",
    OURS: "tristage",
    LIVE: "tristage, reference in every step",
}
WARM_UP = 1
"""Steps of a turn that are not counted."""
COSTS = {
    "cpu_seconds": "CPU seconds per step",
    "reference_seconds": "reference's pass, CPU seconds",
    "epoch_cpu_seconds": "per step with that pass, in one epoch",
    "wall_seconds": "wall seconds per step",
    "peak_memory_gib": "peak memory GiB",
    "own_memory_gib": "of it above the libraries",
    "last_loss": "loss of the last step",
}
"""Figures of a turn."""
PUBLISHED = "SimPO's paper (Meng et al. 2024, arXiv:2405.14734)"


@dataclass(frozen=True)
class Turn:
    """One process: one side of one method.

    Attributes:
        steps: `cpu_seconds`, `wall_seconds` and `loss` of every optimiser step of one epoch.
        reference_seconds: CPU seconds of the reference's pass before the first step; 0 where there is none.
        start_memory_gib: peak before model and data: the interpreter and its libraries.
    """

    round: int
    method: str
    side: str
    steps: Sequence[Mapping[str, float]]
    reference_seconds: float
    start_memory_gib: float
    peak_memory_gib: float

    @property
    def cpu_seconds(self) -> float:
        """Per counted step."""
        return statistics.fmean(step["cpu_seconds"] for step in self.steps[WARM_UP:])

    @property
    def wall_seconds(self) -> float:
        """Per counted step."""
        return statistics.fmean(step["wall_seconds"] for step in self.steps[WARM_UP:])

    @property
    def epoch_cpu_seconds(self) -> float:
        """CPU seconds per step, the reference's pass spread over the steps of one epoch."""
        return self.cpu_seconds + self.reference_seconds / len(self.steps)

    @property
    def own_memory_gib(self) -> float:
        """Peak above the libraries; at least a page, the least that is counted."""
        return max(self.peak_memory_gib - self.start_memory_gib, mmap.PAGESIZE / 2**30)

    @property
    def last_loss(self) -> float:
        """Loss of the last step, which is the same for all sides that did the same."""
        return self.steps[-1]["loss"]


@dataclass
class Rounds:
    """All turns so far, and the settings and packages that they ran with."""

    turns: list[Turn] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def of(self, method: str, side: str) -> list[Turn]:
        """The turns of one side of a method in the order of the rounds."""
        found = [turn for turn in self.turns if (turn.method, turn.side) == (method, side)]
        return sorted(found, key=lambda turn: turn.round)

    @property
    def sides(self) -> list[tuple[str, str]]:
        """(method, side) in the order in which they took turns."""
        return list(dict.fromkeys((turn.method, turn.side) for turn in self.turns))

    def ratio(self, over: tuple[str, str], under: tuple[str, str], figure: str) -> Spread:
        """Of one figure of two (method, side), within each round."""
        pairs = zip(self.of(*over), self.of(*under), strict=True)
        return Spread.of(getattr(a, figure) / getattr(b, figure) for a, b in pairs)


@dataclass(frozen=True)
class Bench:
    """A benchmark in progress; `scratch` holds model, data and one folder per turn, and is removed at the end."""

    options: argparse.Namespace
    scratch: Path
    rounds: Rounds

    def child(self, *words: str | Path) -> None:
        """Runs `scripts.bench_direct_turn` to its end."""
        silent = {"TRL_EXPERIMENTAL_SILENCE": "1", "TQDM_DISABLE": "1"}
        environment = child_environment(self.options.threads, gpu=False) | silent
        run_child([sys.executable, "-m", "scripts.bench_direct_turn", *words], self.scratch, environment)

    def take_turn(self, number: int, method: str, side: str) -> Turn:
        """One process of one side, in round `number`."""
        folder = self.scratch / f"{number}-{method}-{side}"
        folder.mkdir()
        job = {
            "method": method,
            "side": side,
            "model": str(self.scratch / "model"),
            "data": str(self.scratch / "data.json"),
            "scratch": str(folder),
            "batch": self.options.batch,
            "threads": self.options.threads,
        }
        (folder / "job.json").write_text(json.dumps(job))
        self.child(folder / "job.json")
        found = json.loads((folder / "turn.json").read_text())
        self.rounds.settings["packages"] = found.pop("packages")
        self.rounds.settings[f"{method} {side}"] = found.pop("settings")
        return Turn(number, method, side, **found)


def sides_of(method: str) -> list[str]:
    """Who takes turns, in order; SimPO's saving was published against a DPO with its reference in every step."""
    precomputed = [PRECOMPUTED] if method in REFERENCED else []
    return [PEER, *precomputed, OURS, *([LIVE] if method == "dpo" else [])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; returns the exit code."""
    options = _parse(arguments)
    try:
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="direct-") as scratch:
            measure(Bench(options, Path(scratch), Rounds()))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def measure(bench: Bench) -> None:
    """All rounds; the report is written after each, so that an interrupted benchmark leaves what it has."""
    options, rounds = bench.options, bench.rounds
    shape = SHAPES[options.shape]
    rows = token_rows(shape.vocab_size, *LENGTHS[options.workload], options.batch * options.steps)
    (bench.scratch / "data.json").write_text(json.dumps(rows))
    (bench.scratch / "shape.json").write_text(json.dumps(asdict(shape)))
    bench.child("make", bench.scratch / "model", bench.scratch / "shape.json")
    for number in range(options.pairs):
        for method in options.methods:
            for side in sides_of(method):
                turn = bench.take_turn(number, method, side)
                rounds.turns.append(turn)
                cost = f"{turn.cpu_seconds:.3f} CPU-s per step, {turn.peak_memory_gib:.2f} GiB"
                sys.stderr.write(f"round {number + 1} of {options.pairs}, {method}, {side}: {cost}\n")
        write_report(options, rounds)
    print(markdown(rounds, title(options, rounds)), end="")


def token_rows(vocabulary: int, prompt: int, answer: int, count: int) -> list[list[list[int]]]:
    """`count` rows of random [prompt, chosen, rejected] around those mean lengths; answers leave room for an EOS."""
    draw = random.Random(0)

    def ids(mean: int, spread: float, end: int) -> list[int]:
        length = draw.randint(round(mean * (1 - spread)), round(mean * (1 + spread))) - end
        return [draw.randrange(FIRST_WORD, vocabulary) for _ in range(length)]

    return [
        [ids(prompt, PROMPT_SPREAD, 0), ids(answer, ANSWER_SPREAD, 1), ids(answer, ANSWER_SPREAD, 1)]
        for _ in range(count)
    ]


def against_trl(rounds: Rounds, method: str, peer: str) -> dict[str, Spread]:
    """TRL / ours in CPU seconds per step, without and with the reference's pass; ours / TRL in memory."""
    ours, theirs = (method, OURS), (method, peer)
    return {
        "cpu_seconds": rounds.ratio(theirs, ours, "cpu_seconds"),
        "epoch_cpu_seconds": rounds.ratio(theirs, ours, "epoch_cpu_seconds"),
        "peak_memory": rounds.ratio(ours, theirs, "peak_memory_gib"),
        "own_memory": rounds.ratio(ours, theirs, "own_memory_gib"),
    }


def simpo_against_dpo(rounds: Rounds) -> dict[str, dict[str, Spread]]:
    """Our SimPO / our DPO in CPU seconds per step and in memory, by what is counted of DPO's reference."""
    simpo, cached, live = ("simpo", OURS), ("dpo", OURS), ("dpo", LIVE)
    if not {simpo, cached, live} <= set(rounds.sides):
        return {}
    kinds = {
        "reference cached, its pass left out": (cached, "cpu_seconds"),
        "reference cached, its pass in one epoch": (cached, "epoch_cpu_seconds"),
        "reference in every step": (live, "cpu_seconds"),
    }
    return {
        kind: {
            "cpu_seconds": rounds.ratio(simpo, dpo, figure),
            "peak_memory": rounds.ratio(simpo, dpo, "peak_memory_gib"),
            "own_memory": rounds.ratio(simpo, dpo, "own_memory_gib"),
        }
        for kind, (dpo, figure) in kinds.items()
    }


def peers(rounds: Rounds) -> list[tuple[str, str]]:
    """(method, side) of TRL's turns."""
    return [(method, side) for method, side in rounds.sides if side in (PEER, PRECOMPUTED)]


def summarise(rounds: Rounds) -> dict[str, Any]:
    """All figures, for the JSON file; a Spread is written as [median, low, high]."""
    costs = {
        f"{method} {side}": {name: Spread.of(getattr(t, name) for t in rounds.of(method, side)) for name in COSTS}
        for method, side in rounds.sides
    }
    beside = {f"{method} {peer}": against_trl(rounds, method, peer) for method, peer in peers(rounds)}
    return {"costs": costs, "against_trl": beside, "simpo_against_dpo": simpo_against_dpo(rounds)}


def markdown(rounds: Rounds, heading: str) -> str:
    """The figures as tables."""
    lines = [f"# {heading}", "", *_table(["median [range] over the rounds", *COSTS.values()], _cost_rows(rounds))]
    heads = ["within a round", "TRL / ours: CPU seconds per step", "with the reference's pass, in one epoch"]
    heads += ["ours / TRL: peak memory", "above the libraries"]
    rows = []
    for method, peer in peers(rounds):
        found = against_trl(rounds, method, peer)
        times = [found[name].show(".2f") for name in ("cpu_seconds", "epoch_cpu_seconds")]
        memory = [found[name].show(".0%") for name in ("peak_memory", "own_memory")]
        rows.append([f"{method}, beside {TITLES[peer]}", *times, *memory])
    lines += ["", *_table(heads, rows)]
    rows = [
        [f"DPO, {kind}", *(spread.show(".0%") for spread in found.values())]
        for kind, found in simpo_against_dpo(rounds).items()
    ]
    if rows:
        heads = ["our SimPO, of our DPO", "CPU seconds per step", "peak memory", "above the libraries"]
        lines += ["", *_table(heads, [*rows, [PUBLISHED, "about 80%", "about 90%", "-"]])]
    return "\n".join(lines) + "\n"


def _cost_rows(rounds: Rounds) -> list[list[str]]:
    return [
        [
            f"{method}, {TITLES[side]}",
            *(Spread.of(getattr(turn, name) for turn in rounds.of(method, side)).show(".3f") for name in COSTS),
        ]
        for method, side in rounds.sides
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---", *["---:"] * (len(heads) - 1)], *rows)]


def title(options: argparse.Namespace, rounds: Rounds) -> str:
    """What was measured, in one line."""
    shape, (prompt, answer) = SHAPES[options.shape], LENGTHS[options.workload]
    return (
        f"Direct methods, workload {options.workload}: {shape.parameters / 1e6:.1f}M parameters, vocabulary "
        f"{shape.vocab_size}, prompts of about {prompt} and answers of about {answer} tokens, {options.batch} rows per "
        f"step, {options.steps - WARM_UP} counted steps, float32, {options.threads} threads, "
        f"{len({turn.round for turn in rounds.turns})} rounds"
    )


def write_report(options: argparse.Namespace, rounds: Rounds) -> None:
    """`bench_direct_<workload>_<shape>.json` and `.md` in `--out`."""
    report = {
        "asked": {key: value for key, value in vars(options).items() if key != "out"},
        "settings": rounds.settings,
        "rounds": [asdict(turn) for turn in rounds.turns],
        "summary": summarise(rounds),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"bench_direct_{options.workload}_{options.shape}"
    (options.out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.out / f"{name}.md").write_text(markdown(rounds, title(options, rounds)))


def _methods(text: str) -> list[str]:
    chosen = list(dict.fromkeys(text.split(",")))
    if not set(chosen) <= set(METHODS):
        raise argparse.ArgumentTypeError(f"a comma-separated list of {', '.join(METHODS)}")
    return chosen


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", choices=LENGTHS, default="prompt-heavy")
    parser.add_argument("--methods", type=_methods, default=list(METHODS), help=f"of {','.join(METHODS)}")
    parser.add_argument("--pairs", type=int, default=5, help="rounds")
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps per turn; the first is not counted")
    parser.add_argument("--batch", type=int, default=16, help="rows per step: pairs, or labelled answers; even")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="where the report goes")
    options = parser.parse_args(arguments)
    if options.pairs < 1 or options.steps <= WARM_UP:
        parser.error(f"--pairs must be at least 1 and --steps at least {WARM_UP + 1}")
    if options.batch < 2 or options.batch % 2:
        parser.error("--batch must be even, so that KTO has as many good as bad answers")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
