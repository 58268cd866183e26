"""The report of a comparison: one self-contained page and the same as Markdown, from results.json alone."""

from __future__ import annotations
