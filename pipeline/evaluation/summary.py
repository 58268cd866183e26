"""Two policies side by side: table, samples and verdict, for the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.measures import Estimate
from pipeline.evaluation.policy_eval import SCORE, PolicyReport, compare_reports

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

WIDE = 100
"""Terminal columns from which a mean and its interval stand on one line."""
NOTED_LENGTH_CHANGE = 0.25
NOTED_RATE_DROP = 0.1
NOTED_DISTINCT_DROP = 0.25
NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: each cell is a figure and, where there is one, its interval."""

    title: str
    before: tuple[str, str]
    after: tuple[str, str]
    difference: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Summary:
    """The comparison of two policies; prints itself on a rich console and as Markdown."""

    names: tuple[str, str]
    before: PolicyReport
    after: PolicyReport
    differences: Mapping[str, Estimate]
    samples: tuple[tuple[dict[str, Any], dict[str, Any]], ...]
    """(before, after) rows of the first sample of the shown prompts."""

    def rows(self) -> list[Row]:
        """The lines of the table."""
        return [*self._estimate_rows(), *self._kl_rows(), *self._plain_rows()]

    def verdict(self) -> str:
        """What changed, in one paragraph."""
        return " ".join(sentence for sentence in _sentences(self) if sentence)

    def markdown(self) -> str:
        """The summary as Markdown with headings."""
        before, after = self.names
        lines = [f"# {before} and {after} on {self._scope()}", "", self.verdict(), ""]
        lines += [f"| | {before} | {after} | {after} - {before} |", "|---|---|---|---|"]
        for row in self.rows():
            cells = (row.before, row.after, row.difference)
            lines.append(f"| {row.title} | " + " | ".join(_joined(cell) for cell in cells) + " |")
        lines += ["", _NOTE, ""]
        if self.samples:
            lines += ["## Samples", "", f"| prompt | {before} | {after} |", "|---|---|---|"]
            for first, second in self.samples:
                texts = (first["prompt"], _shown(first), _shown(second))
                lines.append("| " + " | ".join(_cell(text) for text in texts) + " |")
            lines.append("")
        return "\n".join(lines)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.padding import Padding
        from rich.text import Text

        yield Text(f"{self.names[0]} and {self.names[1]} on {self._scope()}", style="bold")
        yield self._table(stacked=options.max_width < WIDE)
        yield Text(_NOTE, style="dim")
        if self.samples:
            yield Padding(self._sample_table(), (1, 0, 0, 0))
        yield Padding(Text(self.verdict(), style="bold"), (1, 0, 0, 0))

    def _scope(self) -> str:
        report = self.after
        samples = f"{report.samples_per_prompt} sample{'s' * (report.samples_per_prompt != 1)}"
        return f"{report.prompts} held-out prompts x {samples}"

    def _table(self, *, stacked: bool) -> Table:
        from rich.table import Table

        before, after = self.names
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("", no_wrap=True)
        for title in (before, after, f"{after} - {before}"):
            table.add_column(title, justify="right", no_wrap=True)
        separator = "\n" if stacked else " "
        for row in self.rows():
            cells = (row.before, row.after, row.difference)
            table.add_row(row.title, *(separator.join(filter(None, cell)) for cell in cells))
        return table

    def _sample_table(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_lines=True, expand=True)
        for title in self.names:
            table.add_column(f"{title}: prompt and response", ratio=1, overflow="fold")
        for pair in self.samples:
            texts = [Text.assemble((row["prompt"], "dim"), "\n" * _breaks(row), (_shown(row), "bold")) for row in pair]
            table.add_row(*texts)
        return table

    def _estimate_rows(self) -> list[Row]:
        pairs: list[tuple[str, Estimate | None, Estimate | None, str]] = [
            (f"judge {name}", estimate, self.after.judges.get(name), name)
            for name, estimate in self.before.judges.items()
        ]
        if self.before.score or self.after.score:
            pairs.append(("reward score", self.before.score, self.after.score, SCORE))
        return [
            Row(
                title,
                _estimate_cell(before),
                _estimate_cell(after),
                _estimate_cell(self.differences.get(name), signed=True),
            )
            for title, before, after, name in pairs
        ]

    def _kl_rows(self) -> list[Row]:
        first, second = self.before.kl_per_sequence, self.after.kl_per_sequence
        if first is None and second is None:
            return []
        return [
            Row(
                "KL (nats/response)",
                _estimate_cell(first, digits=2),
                _estimate_cell(second, digits=2),
                (NOTHING, ""),
            ),
            Row(
                "KL (nats/token)",
                _number_cell(self.before.kl_per_token),
                _number_cell(self.after.kl_per_token),
                (NOTHING, ""),
            ),
        ]

    def _plain_rows(self) -> list[Row]:
        before, after = self.before, self.after
        rows = [
            _plain_row("length (tokens)", before.length.mean, after.length.mean, digits=1),
            _plain_row("ends with EOS", before.eos_rate, after.eos_rate),
            _plain_row("distinct-1", before.distinct_1, after.distinct_1),
            _plain_row("distinct-2", before.distinct_2, after.distinct_2),
            _plain_row("repetition", before.repetition, after.repetition),
        ]
        if before.empty_rate or after.empty_rate:
            rows.append(_plain_row("empty", before.empty_rate, after.empty_rate))
        return rows


_NOTE = (
    "Brackets: 95% bootstrap intervals over prompts; differences are paired by prompt. KL is to "
    "the reference (k1). distinct-n: different n-grams / n-grams over all responses; repetition: "
    "share of repeated 3-grams within a response."
)


def summarise(
    before: PolicyReport,
    after: PolicyReport,
    *,
    names: tuple[str, str] = ("SFT", "PPO"),
    shown: int = 6,
    seed: int = 0,
) -> Summary:
    """Compare two reports of the same prompts; `shown` of them appear with their first samples.

    Raises ValueError when the reports are not of the same prompts.
    """
    differences = {
        name: Estimate(*(math.nan if value[end] is None else value[end] for end in Estimate._fields))
        for name, value in compare_reports(before, after, seed).items()
    }
    firsts = before.rows[:: before.samples_per_prompt], after.rows[:: after.samples_per_prompt]
    samples = tuple(zip(*firsts, strict=False))[:shown]
    return Summary(names, before, after, differences, samples)


def _sentences(summary: Summary) -> Iterator[str]:
    before, after = summary.names
    judged = {name: value for name, value in summary.differences.items() if name != SCORE}
    if judged:
        yield _judge_sentence(after, judged)
    else:
        yield "No gold judge is set (eval.judges), so nothing but the reward itself speaks here."
    score = summary.differences.get(SCORE)
    if score is not None:
        yield f"The reward score {_moved(score)} {_interval(score)}."
        raised = any(_clear(value) > 0 for value in judged.values())
        if judged and _clear(score) > 0 and not raised:
            yield (
                "It rose while no gold judge did: the policy may have learnt the reward model's "
                "mistakes; read the samples."
            )
    yield _kl_sentence(summary, before)
    yield from _warnings(summary)


def _judge_sentence(name: str, differences: Mapping[str, Estimate]) -> str:
    verbs = {1: "raised", -1: "lowered", 0: "left"}
    clauses = []
    for direction, verb in verbs.items():
        chosen = {k: v for k, v in differences.items() if _clear(v) == direction}
        if not chosen:
            continue
        form = "{} by {}" if direction > 0 else "{} ({})"
        parts = [form.format(judge, _interval(value)) for judge, value in chosen.items()]
        clause = f"{verb} {_listed(parts)}"
        clauses.append(f"{clause} without a clear change" if direction == 0 else clause)
    if any(math.isnan(value.low) for value in differences.values()):
        return f"{name} {_listed(clauses)}; one prompt gives no interval."
    clear = sum(_clear(value) != 0 for value in differences.values())
    return f"{name} {_listed(clauses)}; {_clearness(clear, len(differences))}."


def _clearness(clear: int, total: int) -> str:
    if clear == 0:
        return "the interval includes zero" if total == 1 else "every interval includes zero"
    if clear == total:
        words = {1: "the interval is", 2: "both intervals are"}
        return f"{words.get(total, f'all {total} intervals are')} clear of zero"
    return f"{clear} of {total} intervals {'is' if clear == 1 else 'are'} clear of zero"


def _kl_sentence(summary: Summary, before_name: str) -> str:
    kl = summary.after.kl_per_sequence
    if kl is None:
        return ""
    lengths = f"{summary.before.length.mean:.1f} to {summary.after.length.mean:.1f} tokens"
    return f"It stands {kl.mean:.2f} nats per response from {before_name}, and the mean length went from {lengths}."


def _warnings(summary: Summary) -> Iterator[str]:
    before, after = summary.before, summary.after
    change = after.length.mean / before.length.mean - 1 if before.length.mean else 0.0
    if abs(change) > NOTED_LENGTH_CHANGE:
        word = "longer" if change > 0 else "shorter"
        yield f"Note: responses are {abs(change):.0%} {word}; a judge may reward that alone."
    if before.eos_rate - after.eos_rate > NOTED_RATE_DROP:
        rates = f"{before.eos_rate:.0%} to {after.eos_rate:.0%}"
        yield f"Note: fewer responses end by themselves ({rates})."
    if after.distinct_2 < (1 - NOTED_DISTINCT_DROP) * before.distinct_2:
        yield (
            f"Note: diversity fell (distinct-2 {before.distinct_2:.3f} to {after.distinct_2:.3f}): "
            "responses resemble each other more."
        )
    if after.empty_rate - before.empty_rate > NOTED_RATE_DROP:
        yield f"Note: {after.empty_rate:.0%} of the responses are empty."


def _clear(difference: Estimate) -> int:
    """Return 1 or -1 when the interval lies above or below zero, else 0."""
    return (difference.low > 0) - (difference.high < 0)


def _moved(difference: Estimate) -> str:
    words = {1: "rose by", -1: "fell:", 0: "shows no clear change:"}
    return words[_clear(difference)]


def _interval(value: Estimate) -> str:
    """Return `+0.21 [0.17, 0.25]`, or the mean alone where there is no interval."""
    return _joined(_estimate_cell(value, signed=True))


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _estimate_cell(value: Estimate | None, *, signed: bool = False, digits: int = 3) -> tuple[str, str]:
    if value is None:
        return NOTHING, ""
    mean = _figure(value.mean, digits, "+" if signed else "")
    if not math.isfinite(value.low):
        return mean, ""
    return mean, f"[{_figure(value.low, digits)}, {_figure(value.high, digits)}]"


def _figure(value: float, digits: int, sign: str = "") -> str:
    """Return the number with `digits` decimals, never as -0."""
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def _number_cell(value: float | None) -> tuple[str, str]:
    return (NOTHING if value is None else f"{value:.3f}"), ""


def _plain_row(title: str, before: float, after: float, digits: int = 3) -> Row:
    difference = _figure(after - before, digits, "+")
    return Row(title, (_figure(before, digits), ""), (_figure(after, digits), ""), (difference, ""))


def _joined(cell: tuple[str, str]) -> str:
    return " ".join(filter(None, cell))


def _shown(row: Mapping[str, Any]) -> str:
    text = row["response"].strip("\n") or "(empty)"
    return text if row["finished"] else f"{text} ..."


def _breaks(row: Mapping[str, Any]) -> int:
    """Return 0 when the response continues the prompt's line, else 1."""
    return 0 if row["response"][:1] in (" ", "") else 1


def _cell(text: str) -> str:
    """Return text that stands in one Markdown table cell."""
    for character, replacement in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("\n", "<br>")):
        text = text.replace(character, replacement)
    return text
