"""Matplotlib figures as SVG that sits in a page: its colours are the page's variables, its text is text."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.report.facts import SLOTS
from pipeline.report.parts import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, QUIET, LINE, PAPER, ACCENT = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05"
"""Stand-ins: every one of them becomes a variable of the page."""
_VARIABLES = {INK: "--ink", QUIET: "--quiet", LINE: "--line", PAPER: "--paper", ACCENT: "--accent"}
METHOD = [f"#0a0c{slot:02x}" for slot in range(SLOTS)]
"""Stand-ins of the methods' colours, by slot."""
_VARIABLES |= {colour: f"--m{slot}" for slot, colour in enumerate(METHOD)}

PALETTE: list[tuple[str, str]] = [
    ("#3a3d40", "#a49b9f"),
    ("#0b63e6", "#93b2f7"),
    ("#8c1d06", "#e8a883"),
    ("#04835a", "#6afcd2"),
    ("#ad43a6", "#b573b6"),
    ("#875b05", "#aa9446"),
    ("#00607b", "#a8ecf7"),
    ("#d81b52", "#e8557f"),
    ("#535e29", "#cded54"),
    ("#361ab4", "#7a8af8"),
]
"""Colours of the slots on light and on dark paper: at least 4.5:1 against either, told apart with any colour vision."""
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "p", "<", "*"]
"""matplotlib's markers of the slots: a method can be told without its colour."""
GLYPHS = [
    "M8 2.5a5.5 5.5 0 1 0 0 11a5.5 5.5 0 1 0 0-11z",
    "M3 3h10v10H3z",
    "M8 2l6.2 11.5H1.8z",
    "M8 1.4L14.6 8 8 14.6 1.4 8z",
    "M8 14L1.8 2.5h12.4z",
    "M5.7 1.8h4.6v3.9h3.9v4.6h-3.9v3.9H5.7v-3.9H1.8V5.7h3.9z",
    "M4.9 1.8L8 4.9l3.1-3.1 3.1 3.1L11.1 8l3.1 3.1-3.1 3.1L8 11.1l-3.1 3.1-3.1-3.1L4.9 8 1.8 4.9z",
    "M8 1.6l6.4 4.7-2.4 7.5H4L1.6 6.3z",
    "M1.8 8L13.5 1.8v12.4z",
    "M8 1l2 5h5.2l-4.2 3.3 1.6 5.2L8 11.4l-4.6 3.1L5 9.3.8 6H6z",
]
"""The same markers as SVG paths in a box of 16 by 16, for legends and tables."""
_LONG_DASH, _SHORT_DASH, _DASH_DOT = (0, (6, 2)), (0, (2, 1.5)), (0, (6, 1.5, 1.5, 1.5))
DASHES: list[Any] = ["-", "-", _LONG_DASH, _SHORT_DASH, _DASH_DOT, "-", _LONG_DASH, _SHORT_DASH, _DASH_DOT, "-"]
"""Line styles of the slots."""

_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": QUIET,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 12,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.unicode_minus": True,
    "figure.dpi": 72,
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": QUIET,
    "xtick.labelcolor": QUIET,
    "xtick.labelsize": 11.5,
    "ytick.color": QUIET,
    "ytick.labelcolor": QUIET,
    "ytick.labelsize": 11.5,
}
_KEPT_ID = re.compile(r'(?:xlink:href="#|url\(#)([^")]+)')
_STYLED = re.compile(r'style="[^"]*"')
_MEASURED = re.compile(r'(?<= )(?:d|x|y|width|height|transform)="[^"]*"')
_LONG = re.compile(r"(-?\d+\.\d\d)\d+")


class Size(NamedTuple):
    """Width and height in CSS pixels at which the text has its nominal size, and the screens that show it."""

    width: int
    height: int
    screen: str


WIDE, NARROW = Size(820, 420, "wide"), Size(350, 340, "narrow")
SMALL = Size(400, 290, "any")
Painter = Callable[["Axes", Size], None]


def draw(name: str, painter: Painter, sizes: Sequence[Size]) -> list[Drawing]:
    """The figure `name` at every size.

    Args:
        name: unique in the page; it salts the ids, so that they are unique too, and the bytes equal from run to run.
        painter: draws into one pair of axes.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawings = []
    for size in sizes:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            settings: Any = _STYLE | {"svg.hashsalt": f"tristage {name} {size.screen}"}
            matplotlib.rcParams.update(settings)
            figure = Figure(figsize=(size.width / 72, size.height / 72), layout="constrained")
            painter(figure.add_subplot(), size)
            FigureCanvasSVG(figure)
            stream = io.StringIO()
            figure.savefig(stream, format="svg", metadata={"Date": None})
        drawings.append(Drawing(_for_the_page(stream.getvalue(), size), size.screen))
    return drawings


def _for_the_page(text: str, size: Size) -> str:
    """The drawing alone: page variables for colours and fonts, no ids but those that are referred to, short numbers."""
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    kept = set(_KEPT_ID.findall(body))
    body = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in kept else "", body)
    body = _STYLED.sub(lambda match: _styled(match[0]), body)
    body = _MEASURED.sub(lambda match: " ".join(_LONG.sub(r"\1", match[0]).split()), body)
    body = re.sub(r' transform="rotate\(-?0 [^"]*"', "", body).replace("xlink:href", "href")
    inner = re.sub(r">\s+<", "><", body[body.index(">") + 1 : body.rindex("</svg>")])
    return f'<svg viewBox="0 0 {size.width} {size.height}" role="img" aria-label="@">{inner.strip()}</svg>'


def _styled(style: str) -> str:
    for colour, variable in _VARIABLES.items():
        style = style.replace(colour, f"var({variable})")
    return style.replace("'DejaVu Sans', sans-serif", "var(--sans)")


def named(drawing: Drawing, alternative: str) -> str:
    """The drawing's markup with its text alternative, which must be escaped for an attribute."""
    return drawing.markup.replace('aria-label="@"', f'aria-label="{alternative}"', 1)


class Label(NamedTuple):
    """A text that belongs to a point in data coordinates."""

    x: float
    y: float
    text: str
    colour: str


def place_labels(axes: Axes, labels: Sequence[Label], points: Iterable[tuple[float, float]]) -> None:
    """Writes each label beside its point where it covers no point and no other label; else leaves it to the legend.

    Args:
        points: everything drawn that a label must not cover, in data coordinates.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

    figure = axes.figure
    if not isinstance(figure, Figure):
        raise TypeError("labels need axes that stand in a figure of their own")
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    frame = axes.get_window_extent(renderer)
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in map(axes.transData.transform, points)]
    for label in labels:
        size = renderer.get_text_width_height_descent(label.text, _label_font(), False)
        x, y = axes.transData.transform((label.x, label.y))
        for box, offset, across, up in _beside(x, y, size):
            free = not any(box.overlaps(other) for other in taken)
            if free and frame.contains(*box.min) and frame.contains(*box.max):
                axes.annotate(
                    label.text,
                    (label.x, label.y),
                    offset,
                    textcoords="offset points",
                    ha=across,
                    va=up,
                    color=label.colour,
                    fontweight="bold",
                ).set_in_layout(False)
                taken.append(box)
                break


def _label_font() -> Any:
    from matplotlib.font_manager import FontProperties

    return FontProperties(size=12, weight="bold")


def _beside(x: float, y: float, size: Sequence[float]) -> Iterable[tuple[Any, tuple[float, float], str, str]]:
    from matplotlib.transforms import Bbox

    width, height = size[0], size[1] + 3  # a line of text is a little higher than its letters
    for gap in (11, 20):
        places = [
            (x + gap, y - height / 2, gap, 0, "left", "center"),
            (x - gap - width, y - height / 2, -gap, 0, "right", "center"),
            (x - width / 2, y + gap, 0, gap, "center", "bottom"),
            (x - width / 2, y - gap - height, 0, -gap, "center", "top"),
            (x + gap * 0.7, y + gap * 0.7, gap * 0.7, gap * 0.7, "left", "bottom"),
            (x + gap * 0.7, y - gap * 0.7 - height, gap * 0.7, -gap * 0.7, "left", "top"),
            (x - gap * 0.7 - width, y + gap * 0.7, -gap * 0.7, gap * 0.7, "right", "bottom"),
            (x - gap * 0.7 - width, y - gap * 0.7 - height, -gap * 0.7, -gap * 0.7, "right", "top"),
        ]
        for left, bottom, right, up, across, vertical in places:
            yield Bbox.from_bounds(left, bottom, width, height), (right, up), across, vertical
