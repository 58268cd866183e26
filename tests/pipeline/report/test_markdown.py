from __future__ import annotations

import re

from pipeline.report.facts import Facts
from pipeline.report.markdown import escaped, render_markdown
from pipeline.report.parts import Cell, Code, Section, Table
from tests.pipeline.report.fixture import minimal


def test_cells_are_escaped() -> None:
    assert escaped("a|b\nc") == r"a\|b c"
    assert escaped("<b> & `x` *y* [z](u)") == r"&lt;b&gt; &amp; \`x\` \*y\* \[z\](u)"
    assert escaped("naive_bayes and _this_") == r"naive_bayes and \_this\_"


def test_a_fence_is_longer_than_any_in_the_text() -> None:
    text = render_markdown(Facts(minimal()), [Section("a", "A", [Code("recipe", "x: '````'\n", "yaml")])])
    assert "\n`````yaml\nx: '````'\n`````\n" in text


def test_a_table_has_its_caption_and_as_many_cells_in_every_row() -> None:
    part = Table("t", "Caption", ["", "b"], [[Cell("1", "[0, 2]"), Cell("x|y")]], notes=["note"])
    text = render_markdown(Facts(minimal()), [Section("a", "A", [part])])
    assert text.endswith("## A\n\n**Caption**\n\n|   | b |\n| --- | --- |\n| 1 \\[0, 2\\] | x\\|y |\n\nnote\n")


def test_it_holds_the_tables_of_the_page(markdown: str) -> None:
    assert markdown.startswith("# demo: methods compared\n\n## Summary\n\n- ppo gains most vader")
    assert "| ppo | 0.643 \\[0.615, 0.671\\] | 90.3% \\[87.2, 93.4\\] | 88.3% \\[84.3, 92.3\\] |" in markdown
    assert "no significant difference between simpo and sft" in markdown
    assert "| sft | \N{EN DASH} | 9.7% \N{BLACK DOWN-POINTING TRIANGLE} \\[6.6, 12.8\\] |" in markdown
    assert "model:\n  init_from: assets/demo-base\n" in markdown


def test_every_table_row_has_the_cells_of_its_head(markdown: str) -> None:
    cells = 0
    for line in markdown.split("\n"):
        if not line.startswith("|"):
            cells = 0
            continue
        found = len(re.findall(r"(?<!\\)\|", line))
        assert found == (cells or found), line
        cells = found
