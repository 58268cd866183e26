from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.report.page import HTML, MARKDOWN, write_report
from tests.pipeline.report.fixture import HEADLINE, LEVELS, minimal, results, samples
from tests.pipeline.report.read_html import Element, read, table

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
SECTIONS = [
    "summary",
    "frontier",
    "win-rates",
    "cost",
    "measures",
    "curves",
    "reward-model",
    "samples",
    "advice",
    "external",
    "recipe-and-hashes",
]


def write(found: dict[str, Any], rows: list[dict[str, Any]], out: Path) -> tuple[Element, str, str]:
    """The page parsed, the page as text, and the Markdown."""
    write_report(found, rows, out)
    page = (out / HTML).read_text(encoding="utf-8")
    return read(page), page, (out / MARKDOWN).read_text(encoding="utf-8")


def test_every_section_is_there_in_order_and_in_the_navigation(page: str) -> None:
    found = read(page)
    assert [s.attributes["id"] for s in found.all("main")[0].children] == SECTIONS
    assert [a.attributes["href"] for a in found.all("nav")[0].all("a")] == [f"#{name}" for name in SECTIONS]


def test_ids_are_unique_and_references_lead_somewhere(page: str) -> None:
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert used
    assert set(used) <= set(ids)


def test_the_headline_table_says_what_results_json_says(page: str) -> None:
    head, *rows = table(read(page), "Each method on the same held-out prompts, mean of 3 seeds")
    assert head == [
        "method",
        "vader",
        "win rate against sft",
        "length-controlled",
        "KL, nats",
        "length, tokens",
        "CPU time",
        "verdict",
    ]
    assert [row[0] for row in rows] == ["sft", "ppo", "dpo", "kto", "simpo"]
    # by hand from LEVELS: 1 / (1 + exp(-4 * (0.643 - 0.085))) = 0.90309; 512 s + 76 s of the reward model
    assert rows[1][1:] == [
        "0.643 [0.615, 0.671]",
        "90.3% [87.2, 93.4]",
        "88.3% [84.3, 92.3]",
        "9.40 [9.10, 9.70]",
        "8.30 [7.90, 8.70]",
        "9.80 min",
        "ppo wins against sft",
    ]
    assert rows[0][2:4] == ["baseline", "baseline"]
    assert rows[4][-1] == "no significant difference between simpo and sft"


def test_every_headline_number_is_one_of_results_json(page: str) -> None:
    found = results()
    head, *rows = table(read(page), "Each method on the same held-out prompts")
    for row in rows:
        method, measures = row[0], found["measures"][row[0]]
        for column, name in (("vader", HEADLINE), ("KL, nats", "kl_per_sequence"), ("length, tokens", "length")):
            shown = [
                float(text.replace("\N{MINUS SIGN}", "-"))
                for text in re.findall(r"[\N{MINUS SIGN}\d.]+", row[head.index(column)])
            ]
            assert shown == pytest.approx([measures[name][key] for key in ("mean", "low", "high")], abs=0.006), method


def test_the_reward_model_is_marked_and_never_the_headline(page: str, markdown: str) -> None:
    found = read(page)
    assert "reward score (trained on)" in found.all("section", id="measures")[0].text
    assert "trained on: never the headline" in found.all("section", id="summary")[0].text
    headline = table(found, "Each method on the same held-out prompts")
    assert not any("score" in title for title in headline[0])
    assert "reward score (trained on)" in markdown
    assert table(found, "The judges")[3] == [
        "assistant",
        "llm",
        "independent",
        "a model asked in both orders model: m-7b",
    ]


def test_the_matrix_marks_significance_by_a_sign(page: str) -> None:
    head, *rows = table(read(page), "vader: share of contests")
    cells = {(row[0], column): row[place] for row in rows for place, column in enumerate(head) if place}
    assert cells["ppo", "sft"] == "90.3% \N{BLACK UP-POINTING TRIANGLE} [87.2, 93.4]"
    assert cells["sft", "ppo"] == "9.7% \N{BLACK DOWN-POINTING TRIANGLE} [6.6, 12.8]"
    assert cells["simpo", "sft"] == "54.9% \N{ALMOST EQUAL TO} [51.8, 58.0]"


def test_equal_input_gives_equal_bytes(written: Path, tmp_path: Path) -> None:
    found = results()
    write_report(found, samples(found), tmp_path)
    for name in (HTML, MARKDOWN):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()


def test_texts_of_models_and_names_are_escaped_everywhere(tmp_path: Path) -> None:
    found = results(["sft", "dpo"], seeds=1)
    rows = samples(found, prompts=2, per_prompt=1)
    rows[0]["prompt"] = EVIL
    rows[0]["answers"]["dpo"][0]["response"] = EVIL
    found["name"] = EVIL
    found["reading"] = [EVIL]
    found["recipe"]["note"] = EVIL
    found["win_rates"][HEADLINE]["dpo"]["sft"]["says"] = EVIL
    found["curves"]["dpo"][EVIL] = found["curves"]["dpo"]["loss"]
    page, text, markdown = write(found, rows, tmp_path)
    assert len(page.all("script")) == 2
    assert [script.attributes.get("type") for script in page.all("script")] == ["application/octet-stream", None]
    assert not page.all("img")
    assert "alert(1)</script>" not in text
    assert page.all("h1")[0].text == EVIL
    outside = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    assert "<script" not in outside
    assert "<img" not in outside


def test_the_policy_names_the_script_and_forbids_the_network(page: str) -> None:
    import base64
    import hashlib

    policy = next(m for m in read(page).all("meta") if m.attributes.get("http-equiv") == "Content-Security-Policy")
    script = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert policy.attributes["content"].startswith(f"default-src 'none'; script-src 'sha256-{digest}';")
    assert not re.findall(r'(?:src|href)="(?!#|data:)', page)


def test_nothing_but_two_methods_and_one_seed(tmp_path: Path) -> None:
    page, text, markdown = write(minimal(), [], tmp_path)
    assert [s.attributes["id"] for s in page.all("main")[0].children] == [
        name for name in SECTIONS if name not in ("reward-model", "advice", "external")
    ]
    words = page.all("main")[0].text
    for said in (
        "No independent judge took part",
        "no verdict: no independent judge",
        "there is no frontier to draw",
        "there are no win rates",
        "No cost was recorded.",
        "No method logged a curve.",
        "No answers were kept.",
        "no interval",
        "not measured",
        "0 alone: intervals are over prompts",
        "none took part in this comparison",
    ):
        assert said in words, said
    for seen in ("nan", "None", "NaN", "null", "undefined"):
        assert not re.search(rf"\b{seen}\b", words), seen
        assert not re.search(rf"\b{seen}\b", markdown), seen
    assert "<svg" in text


def test_one_seed_has_no_seed_by_seed_table(tmp_path: Path) -> None:
    found = results(seeds=1)
    page, _, _ = write(found, samples(found, prompts=2), tmp_path)
    assert not [d for d in page.all("details") if d.text.startswith("Seed by seed")]
    assert "Each line is the one seed" in page.all("section", id="frontier")[0].text


def test_without_a_reward_model_no_section_speaks_of_one(tmp_path: Path) -> None:
    found = results(["sft", "dpo"])
    found["reward_model"] = []
    found["judges"] = found["judges"][:3]
    for method in found["methods"]:
        del found["measures"][method]["score"]
        for point in found["frontier"][method]:
            point["score"] = None
    page, _, _ = write(found, samples(found, prompts=2), tmp_path)
    assert not page.all("section", id="reward-model")
    assert not page.all("figure", id="figure-frontier-score")
    assert page.all("figure", id="figure-frontier-vader")


def test_intervals_that_do_not_exist_are_said_in_words(tmp_path: Path) -> None:
    found = results(["sft", "dpo", "kto"], seeds=1)
    found["measures"]["dpo"][HEADLINE] |= {"low": None, "high": float("nan")}
    found["win_rates"][HEADLINE]["dpo"]["sft"] |= {"low": None, "high": None, "p": None, "p_holm": None}
    found["win_rates"][HEADLINE]["dpo"]["sft"]["length_controlled"] = None
    page, _, _ = write(found, samples(found, prompts=2), tmp_path)
    _, _, dpo, _ = table(page, "Each method on the same held-out prompts")
    assert dpo[1:4] == ["0.374 no interval", "76.1% no interval", "not measured"]
    assert table(page, "vader: share of contests")[2][1] == "76.1% no interval"


def test_a_pairwise_headline_has_no_mean_but_win_rates(tmp_path: Path) -> None:
    found = results(["sft", "dpo"])
    found["headline_judge"] = "assistant"
    page, _, _ = write(found, samples(found, prompts=2), tmp_path)
    head, _, dpo = table(page, "Each method on the same held-out prompts")
    assert head[1] == "win rate against sft"
    assert dpo[-1] == "dpo wins against sft"
    assert "vader against CPU time" in page.all("section", id="cost")[0].text


def test_a_ranking_that_does_not_exist_is_said(tmp_path: Path) -> None:
    found = results(["sft", "dpo"])
    found["ranking"]["assistant"] = []
    page, _, _ = write(found, samples(found, prompts=2), tmp_path)
    assert "assistant has not compared every method" in page.all("section", id="win-rates")[0].text


def test_ten_methods_have_ten_colours_and_markers(tmp_path: Path) -> None:
    found = results(list(LEVELS))
    page, text, _ = write(found, samples(found, prompts=2, per_prompt=1), tmp_path)
    legend = page.all("figure", id="figure-frontier-vader")[0].all("ul")[0]
    glyphs = [(svg.children[0].attributes["d"], svg.children[0].attributes["style"]) for svg in legend.all("svg")]
    assert len(glyphs) == len(LEVELS) == len(set(glyphs))
    assert len({path for path, _ in glyphs}) == len({style for _, style in glyphs}) == 10
    assert "var(--m9)" in text


def test_a_method_has_one_colour_whatever_it_is_compared_with(tmp_path: Path) -> None:
    from pipeline.report.facts import Facts

    few, many = Facts(results(["sft", "simpo"])), Facts(results(list(LEVELS)))
    assert few.slots["simpo"] == many.slots["simpo"]
    assert len(set(many.slots.values())) == 10


def test_a_large_comparison_stays_below_a_megabyte_and_a_half(tmp_path: Path) -> None:
    found = results(prompts=256)
    _, text, _ = write(found, samples(found, prompts=256, per_prompt=4), tmp_path)
    assert len(text.encode()) < 1_500_000


def test_results_of_another_version_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json has version 2"):
        write_report({**minimal(), "version": 2}, [], tmp_path)
    assert not list(tmp_path.iterdir())


def test_results_read_from_a_file_give_the_same_page(written: Path, tmp_path: Path) -> None:
    found = results()
    again, rows = json.loads(json.dumps(found)), json.loads(json.dumps(samples(found)))
    write_report(again, rows, tmp_path)
    assert (tmp_path / HTML).read_bytes() == (written / HTML).read_bytes()
