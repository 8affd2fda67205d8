"""A figure drawn three times: wide and narrow for the page, and as a PNG that says itself where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from textwrap import fill
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PNG_DPI = 150
POINTS_PER_INCH = 72
INK, QUIET, GRID = "#1c2330", "#5a6475", "#dde1e8"
# Colours that stay apart for colour-blind readers, after Okabe and Ito.
BLUE, GREEN, ORANGE, PURPLE, SKY, GREY = "#0072b2", "#009e73", "#d55e00", "#a8558a", "#56b4e9", "#9aa3b2"
MODE_COLOURS: Mapping[str, str] = MappingProxyType(
    {"all_to_all": BLUE, "rank_dedup": GREEN, "all_gather": ORANGE, "reduce_scatter": PURPLE}
)
MODE_MARKERS: Mapping[str, str] = MappingProxyType(
    {"all_to_all": "o", "rank_dedup": "s", "all_gather": "^", "reduce_scatter": "D"}
)
# One for each kind of document.
CYCLE = (BLUE, ORANGE, GREEN, PURPLE)
MARKERS = ("o", "s", "^", "D")
KIB = 1024


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Width in inches, size of the text in points, and the letters of that size that fit into the width."""

    width: float
    font_size: float
    letters: int

    @property
    def narrow(self) -> bool:
        """Whether this is for a phone."""
        return self == NARROW

    @property
    def line(self) -> float:
        """Height of a line of text, in inches."""
        return 1.3 * self.font_size / POINTS_PER_INCH


WIDE = Layout(width=9.2, font_size=9, letters=120)
NARROW = Layout(width=3.7, font_size=8.5, letters=48)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure of the page. name: the stem of its PNG. title and notes: in words, around it. draw: sets its height."""

    name: str
    title: str
    alt: str
    notes: tuple[str, ...]
    draw: Callable[[Figure, Layout], None]


def svg(picture: Picture, layout: Layout) -> str:
    """The figure as SVG, the same for the same numbers."""
    text = StringIO()
    with _style(picture.name, layout):
        figure = _figure(layout)
        picture.draw(figure, layout)
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def write_png(picture: Picture, folder: Path) -> Path:
    """The wide figure between its title and its notes, at 150 dpi; returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = folder / f"{picture.name}.png"
    title, notes = fill(picture.title, WIDE.letters - 20), "\n".join(fill(note, WIDE.letters) for note in picture.notes)
    top, bottom = ((text.count("\n") + 2) * WIDE.line for text in (title, notes))
    with _style(picture.name, WIDE):
        drawing = _figure(WIDE, dpi=PNG_DPI)
        picture.draw(drawing, WIDE)
        canvas = FigureCanvasAgg(drawing)
        canvas.draw()
        height = top + drawing.get_figheight() + bottom
        sheet = Figure(figsize=(WIDE.width, height), dpi=PNG_DPI, facecolor="white")
        sheet.figimage(canvas.buffer_rgba(), 0, round(bottom * PNG_DPI))
        middle, inset = WIDE.line / 2 / height, 0.01
        sheet.text(inset, 1 - middle, title, va="top", fontweight="bold", fontsize=WIDE.font_size + 1)
        sheet.text(inset, middle, notes, va="bottom", color=QUIET, fontsize=WIDE.font_size - 1)
        sheet.savefig(path, format="png")
    return path


@contextmanager
def _style(name: str, layout: Layout) -> Iterator[None]:
    """Our settings of matplotlib while a figure is drawn. Text is text: no dollar starts a formula."""
    import matplotlib

    settings: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": layout.font_size,
        "axes.titlesize": layout.font_size,
        "text.parse_math": False,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GREY,
        "xtick.color": QUIET,
        "ytick.color": QUIET,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "hatch.linewidth": 0.6,
        "svg.fonttype": "path",
        "svg.hashsalt": f"{name} {layout.width}",
    }
    with matplotlib.rc_context(settings):
        yield


def _figure(layout: Layout, dpi: int = POINTS_PER_INCH) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(layout.width, layout.width), dpi=dpi, layout="constrained", facecolor="white")


def stacked(figure: Figure, layout: Layout, count: int, *, columns: int, heights: list[float]) -> list[Axes]:
    """``count`` axes in columns on a wide figure, in one on a narrow one; sets its height from those of the axes.

    heights: in inches, of each axes.
    """
    columns = 1 if layout.narrow else min(columns, count)
    rows = -(-count // columns)
    by_row = [max(heights[row * columns : (row + 1) * columns]) for row in range(rows)]
    figure.set_figheight(sum(by_row))
    grid = figure.add_gridspec(rows, columns, height_ratios=by_row)
    return [figure.add_subplot(grid[position // columns, position % columns]) for position in range(count)]


def legend_below(figure: Figure, axes: Axes, layout: Layout, *, columns: int) -> None:
    """What ``axes`` has labels for, below all axes."""
    handles, names = axes.get_legend_handles_labels()
    if names:
        figure.legend(handles, names, loc="outside lower center", ncols=1 if layout.narrow else columns)


def time_axis(axes: Axes) -> None:
    """A logarithmic axis of microseconds; its limits stay as the data made them."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    marks = [digit * 10.0**power for power in range(-1, 9) for digit in (1, 2, 5)]
    marks = [mark for mark in marks if low <= mark <= high]
    # Powers of ten alone, where there are enough of them.
    powers = [mark for mark in marks if f"{mark:e}".startswith("1.0")]
    shown = powers if len(powers) > 2 else marks
    axes.set_xticks(shown, [time_text(mark) for mark in shown])
    axes.minorticks_off()


def time_text(us: float) -> str:
    """Microseconds in their usual unit.

    >>> time_text(20), time_text(1e4), time_text(0.5)
    ('20 µs', '10 ms', '0.5 µs')
    """
    return f"{us / 1e3:g} ms" if us >= 1e3 else f"{us:g} µs"


def size_text(nbytes: float) -> str:
    """Bytes in the largest unit of which there is one.

    >>> size_text(1536), size_text(3 * 2**30), size_text(12)
    ('1.5 KiB', '3 GiB', '12 B')
    """
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(nbytes) >= KIB**power:
            return f"{nbytes / KIB**power:.3g} {unit}"
    return f"{nbytes:.3g} B"
