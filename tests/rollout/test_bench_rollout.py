from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.bench_rollout import BASELINE, Round, choose_stop_tokens, main, summarise, useful_length


def test_ratios_are_taken_within_rounds() -> None:
    rounds = [
        Round("ours", 100, 1.0, 2.0),  # 100 and 50 tokens/s
        Round(BASELINE, 50, 1.0, 1.0),  # 50 and 50
        Round("ours", 90, 3.0, 3.0),  # 30 and 30: the machine was busy
        Round(BASELINE, 20, 2.0, 4.0),  # 10 and 5
        Round("ours", 110, 1.0, 1.0),  # 110 and 110
        Round(BASELINE, 55, 1.0, 0.5),  # 55 and 110
    ]
    ours, baseline = summarise(rounds, prompts=10)
    assert ours.tokens_per_cpu_second == 100
    assert ours.tokens_per_wall_second == 50
    assert ours.cpu_ratio == 2  # of 2, 3, 2
    assert ours.wall_ratio == 1  # of 1, 6, 1
    assert ours.tokens_per_answer == 10  # (10 + 9 + 11) / 3
    assert (baseline.cpu_ratio, baseline.wall_ratio) == (1, 1)


def test_only_tokens_up_to_the_stop_token_are_useful() -> None:
    assert useful_length([5, 9, 5, 7], {9, 7}) == 2
    assert useful_length([5, 5], {9}) == 2
    answers = [[index % 7 for index in range(start, start + 70)] for start in range(7)]
    stop = set(choose_stop_tokens(answers, 7))
    assert len(stop) == 1  # each answer meets each token within 7 of its 70
    assert choose_stop_tokens([[1] * 10], 1) == (0,)


@pytest.mark.vllm
def test_benchmark_reports_every_contender(tied_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--prompts", "12", "--prompt-tokens", "8", "--max-new-tokens", "10", "--repeats", "2"]
    report = tmp_path / "bench.json"
    assert main([str(tied_dir), *sizes, "--kv-cache-gib", "0.05", "--json", str(report)]) == 0
    written = json.loads(report.read_text())
    names = [speed["contender"] for speed in written["speeds"]]
    assert names[0].startswith("vllm ")
    assert names[1:] == ["transformers engine", BASELINE]
    assert [one["contender"] for one in written["rounds"]] == names * 2
    assert all(12 <= one["useful_tokens"] <= 120 for one in written["rounds"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)


def test_directory_without_a_model_is_an_error_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
