"""Results of lm-evaluation-harness: its keys, its "N/A", its filters, and files that are none of its."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.report.external import read_lm_eval

RESULTS = {
    "results": {
        "arc_easy": {
            "name": "arc_easy",
            "alias": "arc_easy",
            "sample_len": 2376,
            "acc,none": 0.5,
            "acc_stderr,none": 0.01,
            "acc_norm,none": 0.25,
            "acc_norm_stderr,none": "N/A",
        },
        "gsm8k": {
            "alias": " - gsm8k",
            "exact_match,strict-match": 0.125,
            "exact_match_stderr,strict-match": 0.02,
            "exact_match,flexible-extract": 1,
        },
        "a_group": {"alias": "a_group"},
    },
    "config": {"model": "hf"},
    "versions": {"arc_easy": 1.0},
}


def write(file: Path, content: object) -> str:
    file.write_text(json.dumps(content))
    return str(file)


def test_metrics_are_read_with_their_errors_and_filters(tmp_path: Path) -> None:
    found = read_lm_eval({"ppo": write(tmp_path / "r.json", RESULTS)}, ["sft", "ppo"])
    assert found == {
        "ppo": {
            "arc_easy": {"acc": {"value": 0.5, "stderr": 0.01}, "acc_norm": {"value": 0.25, "stderr": None}},
            "gsm8k": {
                "exact_match (strict-match)": {"value": 0.125, "stderr": 0.02},
                "exact_match (flexible-extract)": {"value": 1.0, "stderr": None},
            },
        }
    }


def test_keys_without_a_filter_are_read(tmp_path: Path) -> None:
    """As lm-eval wrote them before 0.4."""
    file = write(tmp_path / "r.json", {"results": {"boolq": {"acc": 0.75, "acc_stderr": 0.5}}})
    assert read_lm_eval({"dpo": file}) == {"dpo": {"boolq": {"acc": {"value": 0.75, "stderr": 0.5}}}}


def test_a_method_that_is_not_compared_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "r.json", RESULTS)
    with pytest.raises(UserError, match=r"pppo is not compared\. Compared are sft, ppo"):
        read_lm_eval({"pppo": file}, ["sft", "ppo"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not a JSON document"),
        ("[1]", "has no `results` by task"),
        ('{"results": [1]}', "has no `results` by task"),
        ('{"results": {"arc": 0.5}}', "has no `results` by task"),
        ('{"results": {"arc": {"alias": "arc", "acc,none": "N/A"}}}', "no task has a metric"),
        ('{"results": {}}', "no task has a metric"),
    ],
)
def test_a_file_that_is_none_of_lm_evals_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=rf"--lm-eval ppo=.*r\.json: .*{said}"):
        read_lm_eval({"ppo": tmp_path / "r.json"})


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_lm_eval({"ppo": tmp_path / "no.json"})
