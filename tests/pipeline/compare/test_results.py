from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.compare.results import measures
from pipeline.compare.traces import curves, frontier, reward_models
from tests.pipeline.compare.build import gathered


def test_a_measure_is_the_mean_over_seeds_with_each_seeds_value() -> None:
    table = np.arange(24, dtype=float).reshape(2, 4, 3)
    found = measures(gathered({"sft": table, "dpo": table + 1}), ["gold"])
    assert found["dpo"]["gold"]["mean"] == pytest.approx(12.5)
    assert found["dpo"]["gold"]["per_seed"] == pytest.approx([6.5, 18.5])
    assert found["dpo"]["length"]["mean"] == pytest.approx(4.0)  # 3, 4 and 5 tokens
    assert found["dpo"]["entropy"] == {"mean": 2.0, "low": None, "high": None, "per_seed": [2.0, 2.0]}
    assert found["dpo"]["models_in_memory"]["mean"] == 2
    assert "score" not in found["sft"]
    assert "reward_accuracy" not in found["sft"]


def test_curves_are_thinned_but_keep_their_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = gathered({"sft": np.zeros((1, 2, 1))})
    out = made.of["sft"][0].arm.policy
    out.mkdir(parents=True)
    rows: list[dict[str, float]] = [{"step": n, "loss": float(n), "eval/kl": 9.0} for n in range(301)]
    rows += [{"step": n, "eval/gold": 0.5, "eval/kl": n / 100} for n in (0, 100)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [line] = curves(made, ["gold"])["sft"]["loss"]
    assert (line["steps"][0], line["steps"][-1], len(line["steps"])) == (0, 300, 60)
    assert line["values"] == [float(step) for step in line["steps"]]
    assert set(curves(made, ["gold"])["sft"]) == {"loss", "eval/gold", "eval/kl"}
    assert curves(made, ["gold"])["sft"]["eval/kl"] == [{"seed": 0, "steps": [0, 100], "values": [0.0, 1.0]}]


def test_the_frontier_ends_with_the_final_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = gathered({"sft": np.zeros((1, 2, 1))})
    report = made.of["sft"][0].figures["report"]
    assert isinstance(report, dict)
    report |= {"kl_per_sequence": {"mean": 1.5}, "score": None, "judges": {"gold": {"mean": 0.25}}}
    point = {"seed": 0, "step": 0, "final": True, "kl": 1.5, "score": None, "judges": {"gold": 0.25}}
    assert frontier(made, ["gold"]) == {"sft": [point]}


def test_every_reward_model_is_reported_once(tmp_path: Path) -> None:
    interval = {"accuracy": 0.7, "accuracy_low": 0.6, "accuracy_high": 0.8, "pairs": 50}
    bins = [{"low": 0.5, "high": 0.6, "pairs": 9, "predicted": 0.55, "observed": 0.6}]
    figures = {
        **interval,
        "calibration": {"ece": 0.1, "bins": bins},
        "buckets": {
            "by": "rating_gap",
            "at_least": [{"gap": 1.0, **interval}],
            "quantiles": [{"from": 0.1, "to": 2.0, **interval}],
        },
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(figures))
    arms = [
        each.arm for of in gathered({"sft": np.zeros((2, 1, 1)), "ppo": np.zeros((2, 1, 1))}).of.values() for each in of
    ]
    [found] = reward_models(arms, {0: str(tmp_path), 1: str(tmp_path)})
    assert found["bins"] == [{"predicted": 0.55, "observed": 0.6, "pairs": 9}]
    assert [bucket["title"] for bucket in found["buckets"]] == ["ratings at least 1 apart", "ratings 0.1 to 2 apart"]
    assert found["buckets"][0]["low"] == 0.6
