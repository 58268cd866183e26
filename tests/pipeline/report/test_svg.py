from __future__ import annotations

import re
from importlib.resources import files
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipeline.report.svg import DASHES, GLYPHS, MARKERS, METHOD, NARROW, PALETTE, WIDE, Label, Size, draw, place_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Machado, Oliveira and Fernandes (2009), severity 1, on linear sRGB
VISIONS = {
    "normal": np.eye(3),
    "protanopia": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "deuteranopia": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "tritanopia": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.9505, 1.0, 1.089])


def linear(colour: str) -> np.ndarray:
    shares = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE 1976 L*a*b* of linear sRGB."""
    shares = XYZ @ np.clip(rgb, 0, 1) / WHITE
    x, y, z = np.where(shares > 0.008856, np.cbrt(shares), 7.787 * shares + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def paper(place: int) -> str:
    style = (files("pipeline.report") / "page.css").read_text(encoding="utf-8")
    found = re.search(r"--paper: light-dark\((#\w+), (#\w+)\)", style)
    assert found
    return found[place + 1]


@pytest.mark.parametrize("place", [0, 1])
def test_method_colours_have_the_contrast_of_text(place: int) -> None:
    behind = float(XYZ[1] @ linear(paper(place)))
    for pair in PALETTE:
        light = float(XYZ[1] @ linear(pair[place]))
        assert (max(light, behind) + 0.05) / (min(light, behind) + 0.05) >= 4.5, pair[place]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("vision", VISIONS)
def test_method_colours_differ_with_any_colour_vision(place: int, vision: str) -> None:
    seen = [lab(VISIONS[vision] @ linear(pair[place])) for pair in PALETTE]
    distances = {(a, b): float(np.linalg.norm(seen[a] - seen[b])) for a, b in combinations(range(len(seen)), 2)}
    assert min(distance for pair, distance in distances.items() if max(pair) < 5) > 18  # sft, ppo, dpo, kto, simpo
    assert min(distances.values()) > 10


def test_every_slot_has_a_marker_of_its_own() -> None:
    assert len(METHOD) == len(PALETTE) == len(set(MARKERS)) == len(set(GLYPHS)) == len(DASHES)


def line(axes: Axes, size: Size) -> None:
    axes.plot([0, 1], [0, 1], color=METHOD[1], marker="s")
    axes.set_title("a <b> & $x$ #0a0b01")
    place_labels(axes, [Label(1, 1, "ppo", METHOD[1])], [(0, 0), (1, 1)])


def test_a_drawing_has_the_page_variables_text_and_no_metadata() -> None:
    wide, narrow = draw("one", line, [WIDE, NARROW])
    assert (wide.screen, narrow.screen) == ("wide", "narrow")
    assert wide.markup.startswith('<svg viewBox="0 0 820 420" role="img" aria-label="@">')
    assert "stroke: var(--m1)" in wide.markup
    assert ">a &lt;b&gt; &amp; $x$ #0a0b01</text>" in wide.markup
    assert ">ppo</text>" in wide.markup
    assert not re.search(r"#0a0[bc]\w\w;|metadata|<style|DejaVu|http", wide.markup)
    ids = [set(re.findall(r' id="([^"]+)"', drawing.markup)) for drawing in (wide, narrow)]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_settings_of_matplotlib_neither_leak_in_nor_out() -> None:
    import matplotlib

    before = draw("one", line, [NARROW])
    with matplotlib.rc_context({"font.size": 30.0, "axes.grid": False}):
        assert draw("one", line, [NARROW]) == before
        assert matplotlib.rcParams["font.size"] == 30.0


def test_labels_cover_neither_points_nor_each_other() -> None:
    def crowd(axes: Axes, size: Size) -> None:
        points = [(0.5, 0.5), (0.53, 0.5), (0.5, 0.54)]
        axes.set(xlim=(0, 1), ylim=(0, 1))
        place_labels(axes, [Label(x, y, "method", METHOD[2]) for x, y in points], points)
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == 3
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
        assert not any(box.contains(*axes.transData.transform(point)) for box in boxes for point in points)

    draw("crowd", crowd, [NARROW])


def test_a_label_without_room_is_left_to_the_legend() -> None:
    def full(axes: Axes, size: Size) -> None:
        grid = [(x / 40, y / 40) for x in range(41) for y in range(41)]
        axes.set(xlim=(0, 1), ylim=(0, 1))
        place_labels(axes, [Label(0.5, 0.5, "method", METHOD[2])], grid)
        assert not axes.texts

    draw("full", full, [NARROW])
