"""The figures: each is drawn once, and saved as SVG for the page and as a PNG between its title and notes."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from report_page import selection
from report_page.computed import COMPUTED, Extrapolation, GridCell, WinnerGrid

WIDTH, LETTERS, PNG_DPI = 9.2, 125, 150
INK, QUIET, GRID = "#1c2330", "#5a6475", "#dde1e8"
# Colours that stay apart for colour-blind readers, after Okabe and Ito.
BLUE, TEAL, ORANGE, PURPLE, SKY, GREY = "#0072b2", "#009e73", "#d55e00", "#a8558a", "#56b4e9", "#9aa3b2"
# Colour and marker of each mode, and of each kind of file.
STYLES = {
    "all_to_all": (BLUE, "o"), "rank_dedup": (TEAL, "s"), "all_gather": (ORANGE, "^"), "reduce_scatter": (PURPLE, "D"),
    "suite": (BLUE, "o"), "profile": (ORANGE, "s"), "layer": (TEAL, "^"), "sweep": (PURPLE, "D"),
}  # fmt: skip
PART_COLOURS = {"plan": GREY, "dispatch": BLUE, selection.GEMMS: "#c9ced8", "combine": TEAL, "rest": ORANGE}
# Below this, a spread is drawn at it: the axis is logarithmic.
LEAST_PERCENT = 0.01
LABEL_LETTERS = 42
# Height of a mode in a cell; the rest is for how it is known.
BAND = 0.34
# A dollar sign starts no formula.
SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9, "text.parse_math": False, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": GREY, "xtick.color": QUIET, "ytick.color": QUIET,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "svg.fonttype": "path",
    "grid.color": GRID, "grid.linewidth": 0.8, "legend.frameon": False, "legend.borderaxespad": 0,
}  # fmt: skip


def save(
    draw: Callable[[Figure, Any], None], data: Any, *, name: str, title: str, notes: Sequence[str], folder: Path
) -> str:
    """Writes the PNG; returns the SVG, the same for the same numbers, as an address of data."""
    svg = BytesIO()
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, WIDTH), layout="constrained", facecolor="white")
        draw(figure, data)
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        title, below = fill(title, LETTERS - 20), "\n".join(fill(note, LETTERS) for note in notes)
        figure.set_figheight(figure.get_figheight() + 0.17 * (title.count("\n") + below.count("\n") + 3))
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10)
        figure.supxlabel(below, x=0.01, ha="left", color=QUIET, fontsize=8)
        figure.savefig(folder / f"{name}.png", dpi=PNG_DPI)
    return f"data:image/svg+xml;base64,{b64encode(svg.getvalue()).decode()}"


def bandwidth(figure: Figure, found: selection.Bandwidth) -> None:
    """GB/s of each mode over the bytes of a rank's x, with the ceiling of its way as a line."""
    axes = _axes(figure, 4.2)
    for mode, line in found.lines.items():
        colour, marker = STYLES[mode]
        axes.plot(list(line), list(line.values()), color=colour, marker=marker, markersize=5, label=mode)
    for name, rate in found.limits.items():
        axes.axhline(rate, color=QUIET, linestyle="--", linewidth=1.2)
        words = f"measured ceiling: {name.replace('_', ' ')}, {rate:.0f} GB/s"
        up = rate == max(found.limits.values())
        place: dict[str, Any] = {"xytext": (0, 3 if up else -12), "textcoords": "offset points"}
        axes.annotate(words, (0.01, rate), xycoords=axes.get_yaxis_transform(), color=QUIET, **place)
    rates = [rate for line in found.lines.values() for rate in line.values()]
    axes.set_xscale("log", base=2)
    axes.set_xticks(found.sizes, [size_text(size) for size in found.sizes])
    axes.minorticks_off()
    axes.set_xlabel("bytes of one rank's x, T·H elements")
    axes.set_ylabel("GB/s into the busiest rank, remote bytes only")
    axes.set_ylim(0, 1.1 * max(*rates, *found.limits.values(), 1e-9))
    axes.grid(axis="y")
    _legend(axes)


def headline(figure: Figure, found: selection.Headline) -> None:
    """A bar for the layer and for each time that it is compared with."""
    axes = _axes(figure, 1.0 + 0.36 * len(found.milliseconds))
    for place, (name, ms) in enumerate(found.milliseconds.items()):
        axes.barh(place, ms, 0.6, color=BLUE if name == "the layer" else PART_COLOURS[selection.GEMMS])
        axes.text(ms, place, f"  {ms:.1f}", va="center", color=INK)
    axes.margins(x=0.1)
    axes.set_xlabel("ms, forward and backward")
    _name_bars(axes, list(found.milliseconds))


def breakdown(figure: Figure, found: tuple[selection.LayerGroup, str]) -> None:
    """One stacked bar for each layer, and marks for its time and for the GEMMs alone with the link."""
    group, pass_name = found
    bars = group.breakdowns(pass_name)
    axes = _axes(figure, 1.4 + 0.5 * len(bars))
    for place, (layer, parts) in enumerate(bars.values()):
        end = 0.0
        for name, us in parts.items():
            label = name if name in PART_COLOURS else "other"
            axes.barh(place, us / 1e3, 0.5, left=end, color=PART_COLOURS.get(name, SKY), label=label)
            end += us / 1e3
        limit, total = selection.limit_us(layer, pass_name), selection.total_us(layer, pass_name, parts) / 1e3
        if limit is not None:
            label = "GEMMs and link alone"
            axes.vlines(limit / 1e3, place - 0.35, place + 0.35, color=INK, linewidth=2, label=label)
        axes.plot(total, place, "D", markersize=5, color="white", markeredgecolor=INK, label="the layer")
        axes.text(max(end, total), place, f"  {total:.2f}", va="center", color=QUIET)
    axes.margins(x=0.1)
    axes.set_xlabel("ms")
    _name_bars(axes, list(bars))


def memory(figure: Figure, group: selection.LayerGroup) -> None:
    """For each kind of memory one bar a layer, as measured, and the formula as a mark."""
    bars = [(use, label) for label, layer in group.layers.items() for use in layer.known_memory]
    kinds = [use.what for use, _ in bars]
    bars.sort(key=lambda bar: kinds.index(bar[0].what))
    largest = max(max(use.formula_bytes or 0, use.measured_bytes or 0) for use, _ in bars)
    unit, name = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
    axes = _axes(figure, 1.2 + 0.4 * len(bars))
    for place, (use, _) in enumerate(bars):
        axes.barh(place, (use.measured_bytes or 0) / unit, 0.5, color=SKY, label="measured")
        if use.formula_bytes is not None:
            x = use.formula_bytes / unit
            axes.vlines(x, place - 0.35, place + 0.35, color=INK, linewidth=2, label="formula")
    axes.set_xlabel(name)
    _name_bars(axes, [f"{use.what}: {label}" for use, label in bars])


def winners(figure: Figure, grid: WinnerGrid) -> None:
    """The fastest pair for each K and W: a solid frame where it was measured, a dashed one where it is computed."""
    sizes = sorted({cell.world_size for cell in grid.cells})
    choices = sorted({cell.top_k for cell in grid.cells})
    axes = _axes(figure, 0.72 * len(choices) + 0.7)
    for cell in grid.cells:
        _draw_cell(axes, cell, sizes.index(cell.world_size), choices.index(cell.top_k))
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    axes.set_ylim(len(choices) - 0.5, -0.5)
    axes.set_xticks(range(len(sizes)), [f"W={size}" for size in sizes])
    axes.set_yticks(range(len(choices)), [f"K={top_k}" for top_k in choices])
    axes.tick_params(length=0)
    axes.set_xlabel("in a cell: dispatch above, combine below")
    axes.spines[:].set_visible(False)


def _draw_cell(axes: Axes, cell: GridCell, column: int, row: int) -> None:
    for band, mode in enumerate((cell.shown.dispatch.value, cell.shown.combine.value)):
        top = row - 0.46 + BAND * band
        axes.add_patch(Rectangle((column - 0.47, top), 0.94, BAND, color=STYLES[mode][0], alpha=0.25, linewidth=0))
        axes.text(column, top + BAND / 2, mode, ha="center", va="center")
    frame: dict[str, Any] = {"linestyle": "--", "edgecolor": GREY}
    words: dict[str, Any] = {"fontstyle": "italic", "color": QUIET}
    if cell.measured:
        frame, words = {"linewidth": 1.8, "edgecolor": INK}, {"fontweight": "bold"}
    axes.add_patch(Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, fill=False, **frame))
    axes.text(column, row + 0.34, cell.how_known, ha="center", va="center", fontsize=8.5, **words)


def extrapolation(figure: Figure, found: Extrapolation) -> None:
    """Dispatch and combine over W, one line a mode."""
    figure.set_figheight(3.6)
    sizes = [step.world_size for step in found.steps]
    kinds = {"dispatch": [step.dispatch_us for step in found.steps], "combine": [s.combine_us for s in found.steps]}
    highest = max(us for steps in kinds.values() for step in steps for us in step.values()) / 1e3
    for axes, (kind, steps) in zip(figure.subplots(1, 2), kinds.items(), strict=True):
        for place, mode in enumerate(steps[0]):
            # Modes may cost the same: wider below narrower, so that each is seen.
            (colour, marker), width = STYLES[mode], 3.6 - 1.2 * place
            times = [step[mode] / 1e3 for step in steps]
            axes.plot(sizes, times, f"--{marker}", color=colour, linewidth=width, markersize=4 + width, label=mode)
        axes.set_title(f"{kind}, {COMPUTED}", loc="left", fontweight="bold")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set(xlabel="W", ylabel="ms", ylim=(0, 1.08 * highest or 1))
        axes.grid(axis="y")
        axes.legend(loc="upper left", borderaxespad=1)


def between_runs(figure: Figure, again: Sequence[selection.Repeated]) -> None:
    """Difference between runs over the smallest median, with what counts as a difference."""
    axes = _axes(figure, 3.6)
    for differs, colour, words in ((False, BLUE, "all others"), (True, ORANGE, "above 100 µs and 5% or more")):
        found = [one for one in again if one.differs == differs]
        if found:
            x, y = [min(one.medians_us) for one in found], [one.difference_percent for one in found]
            axes.scatter(x, y, s=18, alpha=0.7, color=colour, label=f"{words}: {len(found)}")
    axes.axhline(selection.LARGE_PERCENT, color=QUIET, linestyle="--", linewidth=1)
    axes.axvline(selection.LARGE_US, color=QUIET, linestyle="--", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("largest over smallest median, %")
    _time_axis(axes, "smallest median")


def within_runs(figure: Figure, runs: Sequence[Sequence[selection.Measurement]]) -> None:
    """p10 to p90 in percent of the median over the median, one dot for each time."""
    axes = _axes(figure, 3.6)
    for kind in dict.fromkeys(run[0].document.kind for run in runs):
        times = [measured.times for run in runs for measured in run if measured.document.kind == kind]
        spreads, (colour, marker) = [max(each.spread_percent, LEAST_PERCENT) for each in times], STYLES[kind]
        dots: dict[str, Any] = {"s": 14, "alpha": 0.55, "linewidth": 0, "label": f"{kind}: {len(times)} times"}
        axes.scatter([each.median_us for each in times], spreads, color=colour, marker=marker, **dots)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}%")
    axes.set_ylabel("p90 - p10, % of the median")
    _time_axis(axes, "median")


def _axes(figure: Figure, height: float) -> Axes:
    figure.set_figheight(height)
    return figure.subplots()


def _legend(axes: Axes) -> None:
    """Above the axes, each label once."""
    handles, names = axes.get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))
    axes.legend(once.values(), once.keys(), loc="lower left", bbox_to_anchor=(0, 1.02), ncols=4)


def _name_bars(axes: Axes, labels: Sequence[str]) -> None:
    """Label the bars, the first on top."""
    axes.set_yticks(range(len(labels)), [fill(label, LABEL_LETTERS) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    _legend(axes)


def _time_axis(axes: Axes, label: str) -> None:
    """A logarithmic axis of microseconds, in their usual units."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda us, _: f"{us / 1e3:g} ms" if us >= 1e3 else f"{us:g} µs")
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.grid()
    _legend(axes)


def size_text(nbytes: float) -> str:
    """Bytes in the largest unit of which there is one.

    >>> size_text(1536), size_text(3 * 2**30), size_text(12)
    ('1.5 KiB', '3 GiB', '12 B')
    """
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes >= 2**power:
            return f"{nbytes / 2**power:.3g} {unit}"
    return f"{nbytes:.3g} B"
