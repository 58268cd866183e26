"""The benchmark of the direct methods: its arithmetic by hand, equal work on both sides, a real round on `tiny`."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.bench_direct import (
    LIVE,
    METHODS,
    OURS,
    PEER,
    PRECOMPUTED,
    ROOT,
    Rounds,
    Turn,
    against_trl,
    main,
    markdown,
    sides_of,
    simpo_against_dpo,
    token_rows,
)
from scripts.bench_direct_turn import Job, Tokens, make, our_rows, take_turn
from scripts.bench_ppo_models import FIRST_WORD, WORKLOADS
from scripts.bench_ppo_report import Spread


def _turn(number: int, method: str, side: str, cpu: float, peak: float, reference: float = 0.0) -> Turn:
    """An expensive first step and two around the given mean; 1 GiB of libraries."""
    costs = [(99.0, 5.0), (cpu - 0.5, 0.5), (cpu + 0.5, 0.25)]
    steps = [{"cpu_seconds": cost, "wall_seconds": 2 * cost, "loss": loss} for cost, loss in costs]
    return Turn(number, method, side, steps, reference, 1.0, peak)


ROUNDS = Rounds(
    [
        _turn(0, "dpo", PEER, 6.0, 4.0),
        _turn(0, "dpo", OURS, 2.0, 2.0, reference=3.0),
        _turn(0, "dpo", LIVE, 4.0, 4.0),
        _turn(0, "simpo", OURS, 2.0, 2.0),
        _turn(2, "dpo", PEER, 9.0, 6.0),
        _turn(2, "dpo", OURS, 4.0, 3.0, reference=6.0),
        _turn(2, "dpo", LIVE, 5.0, 2.0),
        _turn(2, "simpo", OURS, 4.0, 1.5),
        _turn(1, "simpo", OURS, 1.0, 2.0),
        _turn(1, "dpo", LIVE, 2.0, 2.5),
        _turn(1, "dpo", OURS, 2.0, 3.0, reference=18.0),
        _turn(1, "dpo", PEER, 8.0, 4.0),
    ]
)
"""Rounds out of order, so that a ratio across rounds shows. Our DPO with its pass over 3 steps: 3, 8 and 6."""


def test_ratios_are_taken_within_a_round() -> None:
    """CPU 6/2, 8/2, 9/4; with the pass 6/3, 8/8, 9/6; memory 2/4, 3/4, 3/6; above the libraries 1/3, 2/3, 2/5."""
    found = against_trl(ROUNDS, "dpo", PEER)
    assert found["cpu_seconds"] == Spread(3.0, 2.25, 4.0)
    assert found["epoch_cpu_seconds"] == Spread(1.5, 1.0, 2.0)
    assert found["peak_memory"] == Spread(0.5, 0.5, 0.75)
    assert found["own_memory"] == pytest.approx(Spread(0.4, 1 / 3, 2 / 3))


def test_a_turn_that_needs_nothing_above_the_libraries_has_a_ratio() -> None:
    turns = Rounds([_turn(0, "dpo", side, 6.0, 1.0) for side in (PEER, OURS)])
    assert against_trl(turns, "dpo", PEER)["own_memory"] == Spread(1.0, 1.0, 1.0)


def test_simpo_beside_dpo() -> None:
    """SimPO 2, 1, 4 over DPO 2, 2, 4; with its pass 3, 8, 6; in every step 4, 2, 5. Memory 2, 2, 1.5."""
    left_out, in_one_epoch, live = simpo_against_dpo(ROUNDS).values()
    assert left_out["cpu_seconds"] == Spread(1.0, 0.5, 1.0)
    assert in_one_epoch["cpu_seconds"] == pytest.approx(Spread(2 / 3, 1 / 8, 2 / 3))
    assert live["cpu_seconds"] == Spread(0.5, 0.5, 0.8)
    assert left_out["peak_memory"] == in_one_epoch["peak_memory"] == pytest.approx(Spread(2 / 3, 0.5, 1.0))
    assert live["peak_memory"] == Spread(0.75, 0.5, 0.8)
    assert live["own_memory"] == pytest.approx(Spread(0.5, 1 / 3, 2 / 3))


def test_the_report_shows_costs_ratios_and_the_saving() -> None:
    lines = markdown(ROUNDS, "heading").splitlines()
    assert lines[0] == "# heading"
    cost = ["2.000 [2.000 to 4.000]", "6.000 [3.000 to 18.000]", "6.000 [3.000 to 8.000]", "4.000 [4.000 to 8.000]"]
    cost += ["3.000 [2.000 to 3.000]", "2.000 [1.000 to 2.000]", "0.250 [0.250 to 0.250]"]
    assert f"| dpo, tristage | {' | '.join(cost)} |" in lines
    beside = ["3.00 [2.25 to 4.00]", "1.50 [1.00 to 2.00]", "50% [50% to 75%]", "40% [33% to 67%]"]
    assert f"| dpo, beside TRL | {' | '.join(beside)} |" in lines
    saving = ["50% [50% to 80%]", "75% [50% to 80%]", "50% [33% to 67%]"]
    assert f"| DPO, reference in every step | {' | '.join(saving)} |" in lines
    assert lines[-1].endswith("| about 80% | about 90% | - |")
    alone = Rounds([turn for turn in ROUNDS.turns if turn.method == "dpo"])
    assert "SimPO" not in markdown(alone, "heading")


def test_rows_are_drawn_around_the_wanted_lengths() -> None:
    """Prompts of 128 +- 32, answers of 32 +- 16 less their EOS: means 128 and 31, standard errors 0.6 and 0.3."""
    rows = token_rows(512, 128, 32, 1000)
    assert rows == token_rows(512, 128, 32, 1000)
    for place, low, high, mean in ((0, 96, 160, 128), (1, 15, 47, 31), (2, 15, 47, 31)):
        lengths = [len(row[place]) for row in rows]
        assert (min(lengths), max(lengths)) == (low, high)
        assert statistics.fmean(lengths) == pytest.approx(mean, abs=2)
    ids = {token for row in rows[:200] for part in row for token in part}
    assert (min(ids), max(ids)) == (FIRST_WORD, 511)


def test_ktos_mismatched_answers_are_those_that_trl_takes() -> None:
    """Good and bad answers in turns, each also read by the next prompt of the batch, the last by the first."""
    tokens = [Tokens([row], [10 + row], [20 + row]) for row in range(8)]
    rows = our_rows(Job("kto", OURS, "", "", "", batch=4, threads=1), tokens)
    others = [row.other for row in rows if row.other is not None]
    assert [row.desirable for row in rows] == [True, False] * 4
    assert [list(row.group.answer_ids[0]) for row in rows] == [[10], [21], [12], [23], [14], [25], [16], [27]]
    assert [list(other.answer_ids[0]) for other in others] == [[23], [10], [21], [12], [27], [14], [25], [16]]
    assert [list(other.prompt_ids) for other in others] == [[row] for row in range(8)]


@pytest.mark.parity
@pytest.mark.parametrize("method", METHODS)
def test_all_sides_do_the_same_work(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of three steps agree: same rows in each batch, same loss, same optimiser."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    make(tmp_path / "model", WORKLOADS["tiny"].shape)
    (tmp_path / "data.json").write_text(json.dumps(token_rows(512, 12, 8, 12)))
    losses = {}
    for side in sides_of(method):
        (tmp_path / side).mkdir()
        paths = [str(tmp_path / name) for name in ("model", "data.json", side)]
        found = take_turn(Job(method, side, *paths, batch=4, threads=torch.get_num_threads()))
        losses[side] = [step["loss"] for step in found["steps"]]
        assert (found["reference_seconds"] > 0) == (
            side == PRECOMPUTED or (side == OURS and method in ("dpo", "ipo", "kto"))
        )
        assert found["peak_memory_gib"] >= found["start_memory_gib"] > 0
    for side in sides_of(method)[1:]:
        assert losses[side] == pytest.approx(losses[PEER], rel=1e-5)
    assert len(set(losses[PEER])) == 3


def test_the_benchmark_itself_imports_no_torch() -> None:
    """The peak memory of a child begins at its parent's."""
    program = "import sys, scripts.bench_direct; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("words", [["--methods", "dpo,ppo"], ["--batch", "3"], ["--steps", "1"], ["--pairs", "0"]])
def test_senseless_options_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)


@pytest.mark.slow
@pytest.mark.parity
def test_a_tiny_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--shape", "tiny", "--workload", "balanced", "--methods", "simpo", "--pairs", "1", "--steps", "3"]
    assert main([*words, "--batch", "2", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "bench_direct_balanced_tiny.json").read_text()
    assert str(ROOT) not in text
    assert os.uname().nodename not in text
    report = json.loads(text)
    assert [turn["side"] for turn in report["rounds"]] == [PEER, OURS]
    for turn in report["rounds"]:
        assert len(turn["steps"]) == 3
        assert all(step["cpu_seconds"] > 0 for step in turn["steps"])
        assert turn["steps"][-1]["loss"] == pytest.approx(report["rounds"][0]["steps"][-1]["loss"], rel=1e-5)
    assert report["settings"]["packages"]["trl"].startswith("1.16")
    assert report["settings"]["simpo trl"]["simpo_gamma"] == 0.5
    assert report["settings"]["simpo ours"]["threads"] == 1
    found = (tmp_path / "bench_direct_balanced_tiny.md").read_text()
    assert found.startswith("# Direct methods, workload balanced: 0.1M parameters")
    assert found == capsys.readouterr().out
