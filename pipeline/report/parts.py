"""What a report is made of, before it is written as a page or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Args:
        text: what stands there, in words where a number is missing.
        note: a second, quieter line: an interval, a per-seed list.
        tone: how it is set: "" (text), "number", "missing", "words", or a class of the win-rate matrix.
        method: the method whose colour and marker stand before the text.
        bar: mean, low and high as shares 0..1 of the column, drawn as dot and whisker; low and high may be None.
    """

    text: str
    note: str = ""
    tone: str = ""
    method: str | None = None
    bar: tuple[float, float | None, float | None] | None = None


@dataclass(frozen=True)
class Table:
    """A table with caption and column heads; the first cell of a row is the row's head."""

    name: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    stacks: bool = False
    """Whether rows become cards on a narrow screen; other tables scroll in their own frame."""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Prose:
    """A paragraph."""

    text: str
    quiet: bool = False


@dataclass(frozen=True)
class Bullets:
    """Short sentences, one a line; `large` ones open the page."""

    items: Sequence[str]
    large: bool = False


@dataclass(frozen=True)
class Terms:
    """Names and what they mean, or settings and their values."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Heading:
    """A heading below the section's."""

    text: str


@dataclass(frozen=True)
class Drawing:
    """One rendering of a figure: SVG markup, for screens of a width ("wide", "narrow", or "any")."""

    markup: str
    screen: str


@dataclass(frozen=True)
class Figure:
    """A picture, its caption, what it shows in words, and the numbers behind it."""

    name: str
    caption: str
    alternative: str
    drawings: Sequence[Drawing]
    table: Table
    legend: Sequence[str] = ()
    """Methods whose marker and colour stand above the picture."""

    @property
    def without_legend(self) -> Figure:
        """The same figure under a legend that it shares."""
        return replace(self, legend=())


@dataclass(frozen=True)
class Gallery:
    """Small figures side by side under one legend."""

    figures: Sequence[Figure]
    legend: Sequence[str] = ()


@dataclass(frozen=True)
class Code:
    """Text set as it is, folded away."""

    summary: str
    text: str
    language: str = ""


@dataclass(frozen=True)
class SampleBrowser:
    """Answers of the methods side by side: packed for the page, a few rows as they are for Markdown."""

    packed: str
    note: str
    methods: Sequence[str]
    seeds: Sequence[int]
    samples: int
    excerpt: Sequence[Table]


@dataclass(frozen=True)
class Fold:
    """Parts that are shown on demand."""

    summary: str
    parts: Sequence[Part]


Part: TypeAlias = Table | Prose | Bullets | Terms | Heading | Figure | Gallery | Code | SampleBrowser | Fold
"""Anything that a section holds."""


@dataclass(frozen=True)
class Section:
    """A section with its anchor, its title and its parts."""

    anchor: str
    title: str
    parts: Sequence[Part] = field(default_factory=tuple)
