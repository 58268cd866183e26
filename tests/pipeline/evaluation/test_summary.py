"""The comparison as a table, as Markdown and in words."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from pipeline.evaluation.measures import Estimate, LengthStats, bootstrap_interval
from pipeline.evaluation.policy_eval import PolicyReport
from pipeline.evaluation.summary import Summary, summarise


def _report(
    judges: dict[str, list[float]], score: list[float] | None = None, response: str = " fine", **changed: Any
) -> PolicyReport:
    per_prompt = judges | ({} if score is None else {"score": score})
    intervals = {name: bootstrap_interval([[v] for v in values], 0) for name, values in per_prompt.items()}
    count = len(next(iter(per_prompt.values()), [0.0]))
    values: dict[str, Any] = {
        "prompts": count,
        "samples_per_prompt": 1,
        "prompts_sha256": "same",
        "judges": {name: intervals[name] for name in judges},
        "score": intervals.get("score"),
        "kl_per_sequence": Estimate(0.0, 0.0, 0.0),
        "kl_per_token": 0.0,
        "length": LengthStats(10.0, 10.0, 12.0, 8, 12),
        "eos_rate": 1.0,
        "empty_rate": 0.0,
        "distinct_1": 0.5,
        "distinct_2": 0.8,
        "repetition": 0.0,
        "per_prompt": per_prompt,
        "rows": [{"prompt": f"prompt {i}", "response": response, "finished": True, "tokens": 3} for i in range(count)],
    }
    return PolicyReport(**{**values, **changed})


BASE = {"vader": [0.0, 0.1, 0.2, 0.1], "bayes": [0.5, 0.4, 0.6, 0.5]}
UP = {"vader": [0.2, 0.3, 0.4, 0.3], "bayes": [0.7, 0.6, 0.8, 0.7]}
MIXED = {"vader": [0.2, 0.3, 0.4, 0.3], "bayes": [0.3, 0.2, 0.4, 0.3]}
NOISE = {"vader": [0.1, 0.0, 0.3, 0.0], "bayes": [0.4, 0.5, 0.5, 0.6]}


def _verdict(after: PolicyReport, before: PolicyReport | None = None) -> str:
    return summarise(before or _report(BASE), after).verdict()


def test_verdict_when_both_judges_rise() -> None:
    assert _verdict(_report(UP)).startswith(
        "PPO raised vader by +0.200 [0.200, 0.200] and bayes by +0.200 [0.200, 0.200]; "
        "both intervals are clear of zero."
    )


def test_verdict_when_judges_disagree() -> None:
    assert _verdict(_report(MIXED)).startswith(
        "PPO raised vader by +0.200 [0.200, 0.200] and lowered bayes (-0.200 [-0.200, -0.200]); "
        "both intervals are clear of zero."
    )


def test_verdict_when_nothing_is_clear() -> None:
    verdict = _verdict(_report(NOISE))
    assert verdict.startswith("PPO left vader (+0.000 [-0.100, 0.100]) and bayes (+0.000 [")
    assert "without a clear change; every interval includes zero." in verdict


def test_verdict_counts_the_clear_ones() -> None:
    verdict = _verdict(_report({"vader": UP["vader"], "bayes": NOISE["bayes"]}))
    assert "1 of 2 intervals is clear of zero." in verdict


def test_verdict_warns_of_a_score_that_no_judge_confirms() -> None:
    before = _report(BASE, score=[0.0, 0.0, 0.1, 0.1])
    verdict = _verdict(_report(NOISE, score=[1.0, 1.0, 1.1, 1.1]), before)
    assert "The reward score rose by +1.000 [1.000, 1.000]." in verdict
    assert "no gold judge did" in verdict
    assert "no gold judge did" not in _verdict(_report(UP, score=[1.0, 1.0, 1.1, 1.1]), before)


def test_verdict_without_judges_and_with_one_prompt() -> None:
    assert "No gold judge is set" in summarise(_report({}), _report({})).verdict()
    assert "one prompt gives no interval" in summarise(_report({"v": [0.0]}), _report({"v": [1.0]})).verdict()


@pytest.mark.parametrize(
    ("changed", "warning"),
    [
        ({"length": LengthStats(6.0, 6.0, 7.0, 5, 7)}, "responses are 40% shorter"),
        ({"length": LengthStats(14.0, 6.0, 7.0, 5, 7)}, "responses are 40% longer"),
        ({"eos_rate": 0.5}, "fewer responses end by themselves (100% to 50%)"),
        ({"distinct_2": 0.3}, "diversity fell (distinct-2 0.800 to 0.300)"),
        ({"empty_rate": 0.3}, "30% of the responses are empty"),
    ],
)
def test_verdict_notes_what_looks_like_a_hack(changed: dict[str, Any], warning: str) -> None:
    assert warning in _verdict(_report(UP, **changed))
    assert "Note:" not in _verdict(_report(UP))


def test_kl_and_length_are_told() -> None:
    verdict = _verdict(_report(UP, kl_per_sequence=Estimate(6.25, 6.0, 6.5)))
    assert "It stands 6.25 nats per response from SFT, and the mean length went from 10.0 to 10.0 tokens." in verdict


def _lines(summary: Summary, width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(summary)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_table_fits_and_holds_every_figure(width: int) -> None:
    before = _report(BASE, score=[0.0, 0.0, 0.1, 0.1])
    after = _report(UP, score=[1.0, 1.0, 1.1, 1.1], kl_per_sequence=Estimate(6.25, 6.0, 6.5), kl_per_token=0.625)
    lines = _lines(summarise(before, after), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for figure in (
        "judge vader",
        "+0.200",
        "reward score",
        "1.050",
        "6.25",
        "[6.00, 6.50]",
        "0.625",
        "distinct-2",
    ):
        assert figure in text
    vader = next(line for line in lines if "judge vader" in line)
    assert ("[" in vader) is (width == 120)


def test_samples_stand_side_by_side() -> None:
    before, after = _report(BASE, response=" dull and long"), _report(UP, response=" splendid")
    summary = summarise(before, after, shown=2)
    pattern = r"prompt 0 dull and long +prompt 0 splendid"
    assert any(re.search(pattern, line) for line in _lines(summary, 80))
    assert len(summary.samples) == 2


def test_shown_samples_are_each_prompts_first() -> None:
    rows = [
        {"prompt": f"p{i}", "response": f" sample {j}", "finished": True, "tokens": 1}
        for i in range(2)
        for j in range(3)
    ]
    before = _report({"v": [0.0, 1.0]}, samples_per_prompt=3, rows=rows)
    summary = summarise(before, before)
    assert [pair[0]["prompt"] for pair in summary.samples] == ["p0", "p1"]
    assert {pair[0]["response"] for pair in summary.samples} == {" sample 0"}


def test_markdown_is_one_table_row_per_line() -> None:
    after = _report(UP, response=" a | b\nc <br>")
    text = summarise(_report(BASE), after, names=("SFT", "DPO"), shown=1).markdown()
    assert text.startswith("# SFT and DPO on 4 held-out prompts x 1 sample\n")
    assert "| judge vader | 0.100 [" in text
    assert "| prompt 0 |  fine |  a \\| b<br>c &lt;br> |" in text
    rows = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (4, 5) for line in rows)


def test_an_unfinished_response_shows_that_it_goes_on() -> None:
    report = _report({"v": [0.0]})
    cut = {"prompt": "p", "response": " and then", "finished": False, "tokens": 5}
    empty = {"prompt": "p", "response": "", "finished": True, "tokens": 1}
    before = _report({"v": [0.0]}, rows=[cut])
    text = summarise(before, _report({"v": [1.0]}, rows=[empty])).markdown()
    assert "|  and then ... | (empty) |" in text
    assert "..." not in summarise(report, report).markdown()
