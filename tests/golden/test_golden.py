"""The project against the golden file of an independent float64 implementation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, jaxtyped

from tests.golden import adapter
from tests.golden.adapter import ADAPTERS, UNBOUND
from tests.golden.check import TOLERANCE, Case, bound, case_errors, main, read_cases, relative_error

VECTORS = Path(__file__).with_name("vectors.json")
CASES = read_cases(VECTORS)


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in CASES if bound(case)])
def test_agrees_with_the_golden_file(case: Case) -> None:
    errors = case_errors(case)
    assert set(errors) >= set(case["expected"]) | {f"grad.{name}" for name in case.get("grad", {})}
    assert {key: error for key, error in errors.items() if error > TOLERANCE} == {}


def test_every_adapter_has_a_case() -> None:
    assert set(ADAPTERS) <= {case["fn"] for case in CASES if bound(case)}
    assert set(UNBOUND) <= {case["name"] for case in CASES}


def test_the_comparison_sees_a_wrong_number_a_wrong_shape_nan_and_another_text() -> None:
    assert relative_error([1.0, 2.0], [1.0, 2.5]) == pytest.approx(0.2)
    assert relative_error([0.0, 0.001], [0.0, 0.0]) == pytest.approx(0.1)
    assert relative_error([50.0, 1.0], [100.0, 1.0]) == pytest.approx(0.5)
    assert relative_error([1.0], [1.0, 1.0]) == float("inf")
    assert relative_error([float("nan")], [1.0]) == float("inf")
    assert relative_error("a", "a") == 0
    assert relative_error("a", "b") == float("inf")


def test_the_command_exits_1_on_a_wrong_number_and_lists_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        {"name": "a", "fn": "wilson", "inputs": {"k": 1, "n": 2}, "params": {},
         "expected": {"interval": [0.0, 1.0]}},
        {"name": "b", "fn": "no_such", "inputs": {}, "params": {}, "expected": {}},
    ]  # fmt: skip
    path = tmp_path / "cases.json"
    path.write_text(json.dumps({"cases": cases}))
    assert main([str(path)]) == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed
    assert "no_such" in printed
    path.write_text(json.dumps({"cases": cases[1:]}))
    assert main([str(path)]) == 0


ANNOTATED = [
    "logprobs_from_hidden", "logprobs_from_logits", "masked_mean", "masked_reduce", "masked_whiten",
    "gae", "kl_estimate", "policy_loss", "token_rewards", "value_loss",
    "bradley_terry_loss", "pairs_of_ranks", "plackett_luce_loss", "ranking_loss",
]  # fmt: skip


def test_the_annotated_shapes_hold_on_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
    for name in ANNOTATED:
        monkeypatch.setattr(adapter, name, jaxtyped(typechecker=checker)(getattr(adapter, name)))
    for case in CASES:
        if bound(case):
            case_errors(case)
    with pytest.raises(TypeCheckError, match="mask"):
        adapter.masked_mean(torch.zeros(2, 3), torch.ones(2, 1, dtype=torch.bool))
