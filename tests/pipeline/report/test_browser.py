"""The page in headless Chromium: what a reader, a keyboard and a screen reader meet, on a phone and on a desk."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.report.page import HTML, write_report
from tests.browser import CHROMIUM, DESK, PHONE, launched, opened
from tests.pipeline.report.fixture import LEVELS, minimal, results, samples

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

EVIL = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: the page is not opened")

CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (c) => { const s = c / 255; return s <= 0.03928 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4; };
  const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const low = [];
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!text || node.closest("script, style, template, .hidden, .skip") || !node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const drawn = node.namespaceURI.endsWith("svg");
    const [a, b] = [luminance(rgb(drawn ? style.fill : style.color)), luminance(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${node.outerHTML.slice(0, 90)} ${ratio.toFixed(2)}`);
  }
  return low;
}"""

UNNAMED = """() => {
  const bad = [];
  const named = (node) => node.getAttribute("aria-label") || node.labels?.length || node.textContent.trim();
  for (const svg of document.querySelectorAll("svg")) {
    if (svg.closest("[aria-hidden=true]")) continue;
    if (svg.getAttribute("role") !== "img" || !svg.getAttribute("aria-label")) bad.push(svg.outerHTML.slice(0, 80));
  }
  for (const field of document.querySelectorAll("input, select, button")) {
    const label = field.tagName === "BUTTON" ? named(field) : field.labels?.length;
    if (!label) bad.push(field.outerHTML.slice(0, 80));
  }
  for (const table of document.querySelectorAll("table")) {
    if (!table.caption?.textContent.trim()) bad.push("table without caption");
    if ([...table.querySelectorAll("th")].some((th) => !th.scope)) bad.push("th without scope");
  }
  for (const node of document.querySelectorAll("img")) bad.push(node.outerHTML.slice(0, 80));
  if (!document.documentElement.lang) bad.push("no language");
  for (const tag of ["header", "nav", "main", "footer", "h1"]) {
    const count = document.querySelectorAll(`body ${tag}`).length;
    if (count !== 1) bad.push(`${count} of ${tag}`);
  }
  return bad;
}"""

OVERLAPS = """() => {
  const bad = [];
  for (const svg of document.querySelectorAll(".plot svg")) {
    if (!svg.getClientRects().length) continue;
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
    texts.forEach(([name, a], at) => {
      if (a.left < frame.left - 1 || a.right > frame.right + 1) bad.push(`${name} leaves the frame`);
      for (const [other, b] of texts.slice(at + 1)) {
        const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (across > 1 && down > 4) bad.push(`${name} over ${other}`);
      }
    });
  }
  return bad;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as found:
        yield found


def unfold(page: Page) -> None:
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("many")
    found = results(list(LEVELS))
    write_report(found, samples(found, prompts=3, per_prompt=1), out)
    return out / HTML


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_it_opens_without_an_error_a_request_or_sideways_scrolling(
    browser: Browser, written: Path, many: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    for name, file in (("five", written / HTML), ("ten", many)):
        with opened(browser, file, width, scheme) as page:
            page.screenshot(path=tmp_path / f"{name}-{width}-{scheme}.png", full_page=True)
            for section in ("summary", "frontier", "win-rates", "cost", "measures", "curves", "samples"):
                assert page.locator(f"section#{section}").is_visible()
            for _ in range(2):
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                unfold(page)
            assert page.evaluate(OVERLAPS) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_of_wcag_aa(browser: Browser, many: Path, scheme: str) -> None:
    with opened(browser, many, DESK, scheme) as page:
        unfold(page)
        assert page.evaluate(CONTRASTS) == []


def test_everything_has_a_name_and_headings_descend_step_by_step(browser: Browser, written: Path) -> None:
    with opened(browser, written / HTML) as page:
        assert page.evaluate(UNNAMED) == []
        levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((h) => Number(h.tagName[1]))")
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))


def test_the_two_renderings_of_a_figure_are_shown_one_at_a_time(browser: Browser, written: Path) -> None:
    for width, shown in ((PHONE, "narrow"), (DESK, "wide")):
        with opened(browser, written / HTML, width) as page:
            drawings = page.locator("#figure-frontier-vader .plot")
            visible = [
                drawings.nth(place).get_attribute("class") for place in range(2) if drawings.nth(place).is_visible()
            ]
            assert visible == [f"plot {shown}"]
            size = page.evaluate(
                "Math.min(...[...document.querySelectorAll('.plot text')].filter((t) => t.getClientRects().length)"
                ".map((t) => t.getBoundingClientRect().height))"
            )
            assert size > 9, "text of a figure is too small to read"


def test_answers_are_filtered_by_the_keyboard_alone(browser: Browser, written: Path) -> None:
    with opened(browser, written / HTML) as page:
        assert page.locator("#answers article").count() == 20
        assert page.locator("#found").inner_text() == "30 comparisons, page 1 of 2"
        page.locator("#filter").focus()
        page.keyboard.type("zebra")
        assert page.locator("#found").inner_text() == "No prompt and no answer has this text."
        for _ in "zebra":
            page.keyboard.press("Backspace")
        page.keyboard.type("SPLENDID")
        found = page.locator("#answers article")
        assert 0 < found.count() <= 20
        for place in range(found.count()):
            assert "splendid" in found.nth(place).inner_text()
        assert page.locator("#answers mark").first.inner_text() == "splendid"
        page.keyboard.press("Enter")
        for _ in range(3):  # seed, sample, the first method
            page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.value") == "sft"
        page.keyboard.press("Space")
        assert page.locator("#answers h4").first.inner_text() == "ppo"


def test_seed_sample_and_pages_choose_what_is_shown(browser: Browser, written: Path) -> None:
    rows = samples(results())
    with opened(browser, written / HTML) as page:
        first = page.locator("#answers article .text").first
        assert first.inner_text() == rows[0]["answers"]["sft"][0]["response"]
        page.locator("#seed").select_option("2")
        assert first.inner_text() == rows[0]["answers"]["sft"][2]["response"]
        page.locator("#sample").select_option("3")
        assert first.inner_text() == rows[3]["answers"]["sft"][2]["response"]
        page.locator("#next").focus()
        page.keyboard.press("Enter")
        assert page.locator("#answers h3").first.inner_text() == "Prompt 21, sample 4"
        assert page.locator("#next").is_disabled()
        page.locator("#sample").select_option("")
        assert page.locator("#found").inner_text() == "120 comparisons, page 1 of 6"


def test_hostile_answers_are_shown_as_text(browser: Browser, tmp_path: Path) -> None:
    found = results(["sft", "dpo"], seeds=1)
    rows = samples(found, prompts=2, per_prompt=1)
    rows[0]["prompt"] = rows[0]["answers"]["dpo"][0]["response"] = EVIL
    rows[1]["answers"]["dpo"][0]["response"] = " \n"
    found["reading"] = [EVIL]
    write_report(found, rows, tmp_path)
    with opened(browser, tmp_path / HTML) as page:
        assert page.title() == "demo: methods compared"
        assert page.locator(".prompt").first.inner_text() == EVIL
        assert page.locator(".answer .text").nth(1).inner_text() == EVIL
        assert page.locator(".reading li").first.inner_text() == EVIL
        assert page.locator(".answer .none").inner_text() == "empty answer"
        assert page.locator("img").count() == 0


def test_the_bare_page_opens(browser: Browser, tmp_path: Path) -> None:
    write_report(minimal(), [], tmp_path)
    with opened(browser, tmp_path / HTML, PHONE) as page:
        unfold(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
        assert page.locator("#samples").inner_text().endswith("No answers were kept.")
        assert page.evaluate(UNNAMED) == []


def test_the_button_changes_the_colours_and_says_what_it_does(browser: Browser, written: Path) -> None:
    with opened(browser, written / HTML, scheme="dark") as page:
        paper = "getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(paper)
        button = page.locator("#theme")
        assert button.inner_text() == "Light colours"
        button.click()
        assert button.inner_text() == "Dark colours"
        assert page.evaluate(paper) != dark


def test_wide_tables_scroll_in_their_frame_and_say_so(browser: Browser, many: Path) -> None:
    with opened(browser, many, PHONE) as page:
        frame = page.locator("#win-rates .frame").first
        hint = page.locator("#win-rates .hint").first
        assert hint.is_visible()
        assert frame.get_attribute("tabindex") == "0"
        frame.focus()
        page.keyboard.press("ArrowRight")
        moved = "document.querySelector('#win-rates .frame').scrollLeft"
        for _ in range(50):
            if page.evaluate(moved):
                break
            page.wait_for_timeout(50)  # the browser scrolls smoothly
        assert page.evaluate(moved) > 0
    with opened(browser, many, DESK) as page:
        assert not page.locator("#summary .hint").first.is_visible()


def test_the_skip_link_comes_first_and_leads_to_the_report(browser: Browser, written: Path) -> None:
    with opened(browser, written / HTML) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
