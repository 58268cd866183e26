"""Writes report.html and report.md: everything inside, nothing fetched, equal bytes for equal input."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pipeline.artifacts import write_text
from pipeline.report.facts import Facts
from pipeline.report.markdown import render_markdown
from pipeline.report.parts import Drawing, Part, Section
from pipeline.report.sections import sections
from pipeline.report.svg import GLYPHS, PALETTE, named

HTML, MARKDOWN = "report.html", "report.md"


def write_report(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Writes report.html and report.md into the directory `out`, each whole or not at all.

    Args:
        results: the content of results.json.
        samples: the rows of samples.jsonl.
    Raises:
        UserError: results.json has another version.
    """
    facts = Facts(results)
    built = sections(facts, samples)
    write_text(out / HTML, render_page(facts, built))
    write_text(out / MARKDOWN, render_markdown(facts, built))


def render_page(facts: Facts, built: Sequence[Section]) -> str:
    """The page as one HTML document."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup, escape

    def drawn(drawing: Drawing, alternative: str) -> Markup:
        return Markup(named(drawing, str(escape(alternative))))

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(drawn=drawn, glyphs=GLYPHS, slots=facts.slots, kind=_kind, anchor=_anchor)
    script, style = _asset("page.js"), _palette() + _asset("page.css")
    return environment.from_string(_asset("template.html.j2")).render(
        title=f"{facts.results['name']}: methods compared",
        name=facts.results["name"],
        sections=built,
        methods=facts.methods,
        finished=_minute(facts.section("run").get("finished")),
        policy=_policy(script),
        script=Markup(script),
        style=Markup(style),
    )


def _asset(name: str) -> str:
    return (files("pipeline.report") / name).read_text(encoding="utf-8")


def _palette() -> str:
    """The methods' colours as variables, on light and dark paper."""
    lines = [f"--m{slot}: light-dark({light}, {dark});" for slot, (light, dark) in enumerate(PALETTE)]
    return ":root { " + " ".join(lines) + " }\n"


def _policy(script: str) -> str:
    """The page's content security policy: this script alone runs, and nothing is fetched from anywhere."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"


def _minute(time: object) -> str:
    """An ISO time without its seconds, or nothing."""
    return str(time)[:16].replace("T", " ") if time else ""


def _kind(part: Part) -> str:
    """The name of the macro that sets a part."""
    return type(part).__name__.lower()


def _anchor(name: str) -> str:
    """A name as the id of an element."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "part"
