"""Figures and tables of `scripts.bench_ppo`: medians over the rounds, ratios within a round, FLOP/s."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from scripts.bench_ppo_models import Workload, update_flops

PEER = "trl"
PHASES = ("rollout", "experience", "update", "sync")
DATA_SHEET = {"H200": 989e12, "H100 80GB HBM3": 989e12}
"""Dense bfloat16 FLOP/s by part of the device's name (NVIDIA H100 SXM and H200 data sheets, without sparsity)."""


@dataclass(frozen=True)
class Update:
    """What one update cost.

    Attributes:
        response_length: mean number of response tokens, EOS included.
        phases: wall seconds by phase; empty for the peer.
        epochs: passes over the batch.
    """

    cpu_seconds: float
    wall_seconds: float
    response_length: float
    phases: Mapping[str, float]
    epochs: float


@dataclass(frozen=True)
class Turn:
    """One process of one side.

    Attributes:
        side: `trl`, or our `ppo.sharing`.
        updates: those that count, after the first.
        peak_gpu_memory_gib: of torch's allocator, the engine in the same process included; None on a CPU.
    """

    round: int
    side: str
    updates: Sequence[Update]
    peak_memory_gib: float
    peak_gpu_memory_gib: float | None

    def mean(self, name: str) -> float:
        """Mean over the updates of one of their numbers."""
        return statistics.fmean(vars(update)[name] for update in self.updates)

    def phase(self, name: str) -> float:
        """Mean wall seconds of a phase."""
        return statistics.fmean(update.phases[name] for update in self.updates)


class Spread(NamedTuple):
    """Median and range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of some numbers, at least one."""
        numbers = list(values)
        return cls(statistics.median(numbers), min(numbers), max(numbers))

    def show(self, form: str) -> str:
        """`median [low to high]`, each in the format `form`."""
        return f"{self.median:{form}} [{self.low:{form}} to {self.high:{form}}]"


@dataclass(frozen=True)
class Rounds:
    """All turns of a benchmark and what is needed to read them.

    Attributes:
        gemms: a large matrix product in every round: its `flops` per second and the `device`'s name.
    """

    workload: Workload
    turns: list[Turn]
    gemms: list[dict[str, Any]]

    @property
    def device(self) -> str:
        """Name of the device."""
        return self.gemms[0]["device"]

    def of(self, side: str) -> list[Turn]:
        """One side's turns in the order of the rounds."""
        return sorted((turn for turn in self.turns if turn.side == side), key=lambda turn: turn.round)

    @property
    def sides(self) -> list[str]:
        """In the order in which they took turns."""
        return list(dict.fromkeys(turn.side for turn in self.turns))

    def tokens(self, turn: Turn) -> float:
        """Prompt and response tokens of one update, padding left out."""
        return self.workload.batch * (self.workload.prompt_tokens + turn.mean("response_length"))


def ratios(rounds: Rounds, side: str) -> dict[str, Spread]:
    """Peer / ours of the same round in CPU and wall seconds, per update and per useful token; ours / peer in memory."""
    pairs = list(zip(rounds.of(PEER), rounds.of(side), strict=True))
    return {
        "cpu_seconds": Spread.of(a.mean("cpu_seconds") / b.mean("cpu_seconds") for a, b in pairs),
        "wall_seconds": Spread.of(a.mean("wall_seconds") / b.mean("wall_seconds") for a, b in pairs),
        "cpu_seconds_per_token": Spread.of(
            (a.mean("cpu_seconds") / rounds.tokens(a)) / (b.mean("cpu_seconds") / rounds.tokens(b)) for a, b in pairs
        ),
        "peak_memory": Spread.of(b.peak_memory_gib / a.peak_memory_gib for a, b in pairs),
    }


def update_rates(rounds: Rounds, side: str) -> dict[str, float | None]:
    """Median FLOP/s of our update phase.

    `achieved_flops` counts the vocabulary projection that is done again in the backward pass, `model_flops` does not;
    `gemm_share` and `mfu` are these over the measured matrix product, `data_sheet_mfu` over the device's data sheet.
    """

    def rate(turn: Turn, recompute: bool) -> float:
        done = (
            update_flops(rounds.workload, one.response_length, one.epochs, side, recompute=recompute)
            for one in turn.updates
        )
        return sum(done) / sum(one.phases["update"] for one in turn.updates)

    turns = rounds.of(side)
    achieved = statistics.median(rate(turn, True) for turn in turns)
    model = statistics.median(rate(turn, False) for turn in turns)
    gemm = statistics.median(gemm["flops"] for gemm in rounds.gemms)
    sheet = next((flops for name, flops in DATA_SHEET.items() if name in rounds.device), None)
    return {
        "achieved_flops": achieved,
        "gemm_flops": gemm,
        "gemm_share": achieved / gemm,
        "model_flops": model,
        "mfu": model / gemm,
        "data_sheet_mfu": None if sheet is None else model / sheet,
    }


def phase_rates(rounds: Rounds, side: str) -> dict[str, dict[str, float | None]]:
    """Median seconds, share and tokens per second of our phases.

    Tokens are those sampled in the rollout, prompt and response tokens in the experience, and these times the epochs
    in the update; the weights' sync has none.
    """
    found = {}
    turns = rounds.of(side)
    for phase in PHASES:
        seconds = [turn.phase(phase) for turn in turns]
        work = {
            "rollout": [rounds.workload.batch * turn.mean("response_length") for turn in turns],
            "experience": [rounds.tokens(turn) for turn in turns],
            "update": [rounds.tokens(turn) * turn.mean("epochs") for turn in turns],
        }.get(phase)
        shares = [s / turn.mean("wall_seconds") for s, turn in zip(seconds, turns, strict=True)]
        rates = None if work is None else [w / s for w, s in zip(work, seconds, strict=True)]
        found[phase] = {
            "seconds": statistics.median(seconds),
            "share": statistics.median(shares),
            "tokens_per_second": None if rates is None else statistics.median(rates),
        }
    return found


def summarise(rounds: Rounds) -> dict[str, dict[str, object]]:
    """All figures by side, for the JSON file."""
    summary: dict[str, dict[str, object]] = {}
    for side in rounds.sides:
        turns = rounds.of(side)
        figures: dict[str, object] = {
            name: Spread.of(turn.mean(name) for turn in turns)._asdict()
            for name in ("cpu_seconds", "wall_seconds", "response_length")
        }
        figures["peak_memory_gib"] = Spread.of(turn.peak_memory_gib for turn in turns)._asdict()
        gpu = [turn.peak_gpu_memory_gib for turn in turns if turn.peak_gpu_memory_gib is not None]
        if gpu:
            figures["peak_gpu_memory_gib"] = Spread.of(gpu)._asdict()
        rate = Spread.of(rounds.tokens(turn) / turn.mean("cpu_seconds") for turn in turns)
        figures["tokens_per_cpu_second"] = rate._asdict()
        if side != PEER:
            figures["phases"] = phase_rates(rounds, side)
            figures["update_phase"] = update_rates(rounds, side)
            if PEER in rounds.sides:
                figures["against_trl"] = {key: value._asdict() for key, value in ratios(rounds, side).items()}
        summary[side] = figures
    return summary


def markdown(rounds: Rounds, title: str) -> str:
    """The figures as tables."""
    lines = [f"# {title}", "", *_costs(rounds)]
    ours = [side for side in rounds.sides if side != PEER]
    if PEER in rounds.sides:
        lines += ["", *_ratio_table(rounds, ours)]
    for side in ours:
        lines += ["", *_phase_table(rounds, side), "", *_flops_lines(rounds, side)]
    return "\n".join(lines) + "\n"


def _costs(rounds: Rounds) -> list[str]:
    heads = ["median [range] per update", "CPU seconds", "wall seconds", "peak memory GiB", "peak GPU memory GiB"]
    lines = _table_head([*heads, "useful tokens per CPU-second", "response tokens"])
    for side in rounds.sides:
        turns = rounds.of(side)
        gpu = [turn.peak_gpu_memory_gib for turn in turns if turn.peak_gpu_memory_gib is not None]
        cells = [
            _name(side),
            Spread.of(turn.mean("cpu_seconds") for turn in turns).show(".2f"),
            Spread.of(turn.mean("wall_seconds") for turn in turns).show(".2f"),
            Spread.of(turn.peak_memory_gib for turn in turns).show(".2f"),
            Spread.of(gpu).show(".2f") if gpu else "-",
            Spread.of(rounds.tokens(turn) / turn.mean("cpu_seconds") for turn in turns).show(".0f"),
            Spread.of(turn.mean("response_length") for turn in turns).show(".1f"),
        ]
        lines.append(_row(cells))
    return lines


def _ratio_table(rounds: Rounds, ours: Sequence[str]) -> list[str]:
    heads = ["within a round", "TRL / ours: CPU seconds", "wall seconds", "CPU seconds per useful token"]
    lines = _table_head([*heads, "ours / TRL: peak memory"])
    for side in ours:
        found = ratios(rounds, side)
        times = [found[key].show(".2f") for key in ("cpu_seconds", "wall_seconds", "cpu_seconds_per_token")]
        lines.append(_row([_name(side), *times, found["peak_memory"].show(".0%")]))
    return lines


def _phase_table(rounds: Rounds, side: str) -> list[str]:
    lines = _table_head([f"phases of {_name(side)}", "wall seconds", "share", "tokens per second"])
    for phase, figures in phase_rates(rounds, side).items():
        rate = figures["tokens_per_second"]
        cells = [f"{figures['seconds']:.3f}", f"{figures['share']:.1%}", "-" if rate is None else f"{rate:.0f}"]
        lines.append(_row([phase, *cells]))
    return lines


def _flops_lines(rounds: Rounds, side: str) -> list[str]:
    rates = update_rates(rounds, side)
    sheet = rates["data_sheet_mfu"]
    of_sheet = "" if sheet is None else f", {sheet:.1%} of the data sheet's figure"
    return [
        f"Update phase of {_name(side)}: {_giga(rates['achieved_flops'])} GFLOP/s, {rates['gemm_share']:.1%} of the "
        f"{_giga(rates['gemm_flops'])} GFLOP/s of a large matrix product. Without the vocabulary projection that is "
        f"done again in the backward pass: {_giga(rates['model_flops'])} GFLOP/s, MFU {rates['mfu']:.1%}{of_sheet}.",
    ]


def _giga(flops: float | None) -> str:
    return f"{(flops or 0.0) / 1e9:.1f}"


def _name(side: str) -> str:
    return "TRL" if side == PEER else f"tristage, sharing {side}"


def _table_head(heads: Sequence[str]) -> list[str]:
    return [_row(heads), _row(["---", *["---:"] * (len(heads) - 1)])]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
