"""report.md: the sections of the page as GitHub-flavoured Markdown; figures as the numbers behind them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from pipeline.report.facts import Facts
from pipeline.report.parts import (
    Bullets,
    Code,
    Figure,
    Fold,
    Gallery,
    Heading,
    Part,
    Prose,
    SampleBrowser,
    Section,
    Table,
    Terms,
)

_SPECIAL = re.compile(r"[\\`*\[\]{}|~#]|(?<!\w)_|_(?!\w)")


def escaped(text: str) -> str:
    """Text that Markdown and HTML leave as it is, on one line."""
    return _SPECIAL.sub(lambda match: f"\\{match[0]}", _in_markup(text))


def _in_markup(text: str) -> str:
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def render_markdown(facts: Facts, built: Sequence[Section]) -> str:
    """The report as one Markdown document."""
    lines = [f"# {escaped(str(facts.results['name']))}: methods compared", ""]
    for section in built:
        lines += [f"## {escaped(section.title)}", ""]
        for part in section.parts:
            lines += _part(part)
    return "\n".join(lines).rstrip("\n") + "\n"


def _part(part: Part) -> list[str]:
    return list(_WRITERS[type(part)](part))


def _prose(part: Prose) -> Iterator[str]:
    yield from (escaped(part.text), "")


def _bullets(part: Bullets) -> Iterator[str]:
    yield from (f"- {escaped(item)}" for item in part.items)
    yield ""


def _terms(part: Terms) -> Iterator[str]:
    yield from (f"- **{escaped(name)}**: {escaped(text)}" for name, text in part.pairs)
    yield ""


def _heading(part: Heading) -> Iterator[str]:
    yield from (f"### {escaped(part.text)}", "")


def _table(part: Table) -> Iterator[str]:
    yield from (f"**{escaped(part.caption)}**", "")
    yield _row([escaped(title) or " " for title in part.header])
    yield _row(["---"] * len(part.header))
    for row in part.rows:
        yield _row([" ".join(filter(None, (escaped(cell.text), escaped(cell.note)))) for cell in row])
    yield ""
    yield from (line for note in part.notes for line in (escaped(note), ""))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _figure(part: Figure) -> Iterator[str]:
    yield from (escaped(part.caption), "")
    yield from _fold(Fold(part.table.caption, [part.table]))


def _gallery(part: Gallery) -> Iterator[str]:
    for figure in part.figures:
        yield from _figure(figure)


def _fold(part: Fold) -> Iterator[str]:
    yield from ("<details>", f"<summary>{_in_markup(part.summary)}</summary>", "")
    for inner in part.parts:
        yield from _part(inner)
    yield from ("</details>", "")


def _code(part: Code) -> Iterator[str]:
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", part.text))])
    yield from ("<details>", f"<summary>{_in_markup(part.summary)}</summary>", "")
    yield from (f"{fence}{part.language}", *part.text.rstrip("\n").split("\n"), fence, "", "</details>", "")


def _samples(part: SampleBrowser) -> Iterator[str]:
    yield from (f"{escaped(part.note)} The first {len(part.excerpt)} prompts, one answer each:", "")
    for table in part.excerpt:
        yield from _table(table)


_WRITERS: dict[type, Callable[..., Iterator[str]]] = {
    Prose: _prose,
    Bullets: _bullets,
    Terms: _terms,
    Heading: _heading,
    Table: _table,
    Figure: _figure,
    Gallery: _gallery,
    Fold: _fold,
    Code: _code,
    SampleBrowser: _samples,
}
