"""One drawing of each figure, saved as SVG for the page and as a PNG that says itself where it comes from."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH, LETTERS, PNG_DPI = 8.0, 110, 150
INK, QUIET, GRID = "#1c2330", "#5a6475", "#dde1e8"
# Colours that stay apart for colour-blind readers, after Okabe and Ito.
BLUE, GREEN, ORANGE, PURPLE, SKY, GREY = "#0072b2", "#009e73", "#d55e00", "#a8558a", "#56b4e9", "#9aa3b2"
# Colour and marker of each mode.
MODE_STYLES = {
    "all_to_all": (BLUE, "o"),
    "rank_dedup": (GREEN, "s"),
    "all_gather": (ORANGE, "^"),
    "reduce_scatter": (PURPLE, "D"),
}
KIB = 1024
# No dollar starts a formula, and the same numbers give the same SVG.
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9, "text.parse_math": False, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": GREY, "xtick.color": QUIET, "ytick.color": QUIET,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": GRID, "grid.linewidth": 0.8, "legend.frameon": False, "svg.fonttype": "path",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure of the page. name: the stem of its PNG. alt: its content in words. draw: also sets the height."""

    name: str
    title: str
    alt: str
    notes: list[str]
    draw: Callable[[Figure], None]

    def save(self, folder: Path) -> str:
        """Writes the PNG between title and notes; returns the SVG as an address of data."""
        text = StringIO()
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": self.name}):
            figure = Figure(figsize=(WIDTH, WIDTH), layout="constrained", facecolor="white")
            self.draw(figure)
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
            notes = "\n".join(fill(note, LETTERS) for note in self.notes)
            # Outside of the figure, which the tight box then takes in.
            figure.text(0.01, 1.02, fill(self.title, LETTERS - 20), va="bottom", fontweight="bold")
            figure.text(0.01, -0.02, notes, va="top", color=QUIET, fontsize=8)
            figure.savefig(folder / f"{self.name}.png", dpi=PNG_DPI, bbox_inches="tight")
        return f"data:image/svg+xml;base64,{b64encode(text.getvalue().encode()).decode()}"


def axes_below(figure: Figure, height: float, count: int = 1) -> list[Axes]:
    """``count`` axes side by side; sets the height of the figure in inches."""
    figure.set_figheight(height)
    return list(figure.subplots(1, count, squeeze=False)[0])


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """What ``axes`` has labels for, below the figure."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=columns)


def time_axis(axes: Axes) -> None:
    """A logarithmic axis of microseconds; its limits stay as the data made them."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    marks = [digit * 10.0**power for power in range(-1, 9) for digit in (1, 2, 5)]
    marks = [mark for mark in marks if low <= mark <= high]
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
        if nbytes >= KIB**power:
            return f"{nbytes / KIB**power:.3g} {unit}"
    return f"{nbytes:.3g} B"
