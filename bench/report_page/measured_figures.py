"""Figures of what was measured: bandwidth against size, the parts of the layer, its memory, and the spread."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from schema import Breakdown, Layer

from report_page.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MODE_STYLES,
    ORANGE,
    PURPLE,
    QUIET,
    SKY,
    Picture,
    axes_below,
    legend_below,
    size_text,
    time_axis,
)
from report_page.load import caveats, origin
from report_page.selection import GEMMS, LAYER, Bandwidth, LayerGroup, limit_us, median_us
from report_page.spread import LARGE_PERCENT, LARGE_US, Repeated, WithinRun

PART_COLOURS = {"plan": GREY, "dispatch": BLUE, GEMMS: "#c9ced8", "combine": GREEN, "rest": ORANGE}
KIND_STYLES = {"suite": (BLUE, "o"), "profile": (ORANGE, "s"), "layer": (GREEN, "^"), "sweep": (PURPLE, "D")}
# Below this, a spread is drawn at it: the axis is logarithmic.
LEAST_PERCENT = 0.01
LABEL_LETTERS = 32
GIB, MIB = 2**30, 2**20


def bandwidth_picture(bandwidth: Bandwidth, number: int) -> Picture:
    """GB/s of each mode over the bytes of a rank's x, with the ceiling of its way as a line."""
    largest = max(max(line) for line in bandwidth.lines.values())
    ends = [f"{mode} {line[max(line)]:.0f} GB/s" for mode, line in bandwidth.lines.items()]
    ceilings = ", ".join(f"{name} {rate:.0f} GB/s" for name, rate in bandwidth.ceilings.items())
    limit = f"; measured ceilings: {ceilings}" if ceilings else ""
    return Picture(
        name=f"bandwidth_{bandwidth.kind}_{number}",
        title=f"{bandwidth.kind.capitalize()}: link rate against size ({bandwidth.fixed}, uniform routing)",
        alt=f"Lines: at {size_text(largest)}: {', '.join(ends)}{limit}.",
        notes=[f"From {origin([bandwidth.sweep])}", *caveats([bandwidth.sweep])],
        draw=lambda figure: _draw_bandwidth(bandwidth, figure),
    )


def _draw_bandwidth(bandwidth: Bandwidth, figure: Figure) -> None:
    (axes,) = axes_below(figure, 4.2)
    for mode, line in bandwidth.lines.items():
        colour, marker = MODE_STYLES[mode]
        axes.plot(list(line), list(line.values()), color=colour, marker=marker, markersize=5, label=mode)
    highest = max([*bandwidth.ceilings.values(), *(max(line.values()) for line in bandwidth.lines.values()), 1e-9])
    for name, rate in bandwidth.ceilings.items():
        axes.axhline(rate, color=QUIET, linestyle="--", linewidth=1.2)
        above = rate == max(bandwidth.ceilings.values())
        words = f"measured ceiling: {name.replace('_', ' ')}, {rate:.0f} GB/s"
        place = (axes.get_yaxis_transform(), "bottom" if above else "top")
        axes.text(0.01, rate, f"{words}", transform=place[0], va=place[1], color=QUIET)
    axes.set_ylim(0, 1.1 * highest)
    axes.set_xscale("log", base=2)
    sizes = sorted({size for line in bandwidth.lines.values() for size in line})
    axes.set_xticks(sizes, [size_text(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("bytes of one rank's x, T·H elements")
    axes.set_ylabel("GB/s into the busiest rank, remote bytes only")
    axes.grid(axis="y")
    legend_below(figure, axes, 3)


def breakdown_picture(group: LayerGroup, pass_name: str, number: int) -> Picture:
    """One stacked bar for each layer, and the GEMMs alone with the link as a mark."""
    bars = {
        label: (layer, breakdown)
        for label, layer in group.layers.items()
        for breakdown in layer.breakdown
        if breakdown.pass_name == pass_name
    }
    layers = [layer for layer, _ in bars.values()]
    words = "; ".join(f"{label} {_time_us(*bar) / 1e3:.2f} ms" for label, bar in bars.items())
    return Picture(
        name=f"breakdown_{number}",
        title=f"Where the layer's time goes: {pass_name} ({group.title})",
        alt=f"Stacked bars of plan, dispatch, GEMMs, combine and rest. {words}.",
        notes=[f"From {origin(layers)}", *caveats(layers)],
        draw=lambda figure: _draw_breakdown(list(bars), list(bars.values()), figure),
    )


def _time_us(layer: Layer, breakdown: Breakdown) -> float:
    """What the layer took; the sum of its parts where that is unknown."""
    return median_us(layer, breakdown.pass_name, LAYER) or sum(breakdown.parts.values())


def _draw_breakdown(labels: Sequence[str], bars: Sequence[tuple[Layer, Breakdown]], figure: Figure) -> None:
    (axes,) = axes_below(figure, 1.3 + 0.55 * len(bars))
    shown: set[str] = set()

    def once(name: str) -> str:
        """The label at its first use, so that the legend has it once."""
        seen = name in shown
        shown.add(name)
        return "" if seen else name

    for place, (layer, breakdown) in enumerate(bars):
        end = 0.0
        for name, us in breakdown.parts.items():
            label = once(name if name in PART_COLOURS else "other")
            axes.barh(place, us / 1e3, left=end, height=0.5, color=PART_COLOURS.get(name, SKY), label=label)
            end += us / 1e3
        limit, total = limit_us(layer, breakdown.pass_name), _time_us(layer, breakdown) / 1e3
        if limit is not None:
            axes.vlines(
                limit / 1e3, place - 0.35, place + 0.35, color=INK, linewidth=2, label=once("GEMMs and link alone")
            )
        axes.plot(total, place, "D", markersize=5, color="white", markeredgecolor=INK, label=once("the layer"))
        axes.annotate(f"{total:.2f}", (max(end, total), place), (7, 0), textcoords="offset points", va="center")
    axes.margins(x=0.1)
    axes.set_xlabel("ms")
    _name_bars(axes, labels)
    legend_below(figure, axes, 7)


def _name_bars(axes: Axes, labels: Sequence[str]) -> None:
    """The first is on top."""
    axes.set_yticks(range(len(labels)), [fill(label, LABEL_LETTERS) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def memory_picture(group: LayerGroup, number: int) -> Picture:
    """For each kind of memory one bar a layer, as measured, and the formula as a mark."""
    layers = list(group.layers.values())
    kinds = "; ".join(dict.fromkeys(use.what for layer in layers for use in layer.known_memory))
    return Picture(
        name=f"memory_{number}",
        title=f"Memory of one rank, by formula and as measured ({group.title})",
        alt=f"Bars of measured memory with the formula as a mark: {kinds}. The table below has the numbers.",
        notes=[f"From {origin(layers)}", *caveats(layers)],
        draw=lambda figure: _draw_memory(group, figure),
    )


def _draw_memory(group: LayerGroup, figure: Figure) -> None:
    bars = [(label, use) for label, layer in group.layers.items() for use in layer.known_memory]
    bars = sorted(bars, key=lambda bar: [use.what for _, use in bars].index(bar[1].what))
    known = [size for _, use in bars for size in (use.formula_bytes, use.measured_bytes) if size is not None]
    unit, name = (GIB, "GiB") if max(known) >= GIB else (MIB, "MiB")
    (axes,) = axes_below(figure, 1.3 + 0.4 * len(bars))
    axes.barh(range(len(bars)), [(use.measured_bytes or 0) / unit for _, use in bars], 0.5, color=SKY, label="measured")
    marks = [(use.formula_bytes / unit, place) for place, (_, use) in enumerate(bars) if use.formula_bytes is not None]
    axes.vlines([x for x, _ in marks], [y - 0.35 for _, y in marks], [y + 0.35 for _, y in marks], INK, label="formula")
    axes.set_xlabel(name)
    _name_bars(axes, [f"{use.what}: {label}" for label, use in bars])
    legend_below(figure, axes, 2)


def within_picture(runs: Sequence[WithinRun]) -> Picture:
    """p10 to p90 in percent of the median over the median, one dot for each time."""
    documents = [run.document for run in runs]
    words = "; ".join(f"{run.document.file} {run.typical_percent:.2f}%" for run in runs)
    return Picture(
        name="spread_within_runs",
        title="Within one run: p10 to p90 in percent of the median",
        alt=f"Dots over the median time, one colour for each kind of file. In the middle: {words}.",
        notes=[f"From {origin(documents)}", *caveats(documents)],
        draw=lambda figure: _draw_within(runs, figure),
    )


def _draw_within(runs: Sequence[WithinRun], figure: Figure) -> None:
    (axes,) = axes_below(figure, 3.6)
    for kind in dict.fromkeys(run.document.kind for run in runs):
        times = [measured.times for run in runs if run.document.kind == kind for measured in run.measured]
        spreads = [max(found.spread_percent, LEAST_PERCENT) for found in times]
        medians, (colour, marker) = [found.median_us for found in times], KIND_STYLES[kind]
        axes.scatter(
            medians,
            spreads,
            s=14,
            color=colour,
            marker=marker,
            alpha=0.55,
            linewidth=0,
            label=f"{kind}: {len(times)} times",
        )
    time_axis(axes)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}%")
    axes.minorticks_off()
    axes.set_ylabel("p90 - p10, % of the median")
    axes.set_xlabel("median")
    axes.grid()
    legend_below(figure, axes, 4)


def repeated_picture(again: Sequence[Repeated]) -> Picture:
    """Difference between runs over the smallest median, with what counts as a difference."""
    documents = list(dict.fromkeys(measured.document for found in again for measured in found.measured))
    differing = sum(found.differs for found in again)
    return Picture(
        name="spread_between_runs",
        title="From run to run: how far medians of the same thing differ",
        alt=f"{len(again)} dots, {differing} of them above {LARGE_US:.0f} us and {LARGE_PERCENT:.0f}% or more apart.",
        notes=[f"From {origin(documents)}", *caveats(documents)],
        draw=lambda figure: _draw_repeated(again, figure),
    )


def _draw_repeated(again: Sequence[Repeated], figure: Figure) -> None:
    (axes,) = axes_below(figure, 3.6)
    for differs, colour, words in ((False, BLUE, "all others"), (True, ORANGE, "above 100 µs and 5% or more")):
        found = [one for one in again if one.differs == differs]
        if found:
            x, y = [one.least_us for one in found], [one.difference_percent for one in found]
            axes.scatter(x, y, s=18, alpha=0.7, color=colour, label=f"{words}: {len(found)}")
    axes.axhline(LARGE_PERCENT, color=QUIET, linestyle="--", linewidth=1)
    axes.axvline(LARGE_US, color=QUIET, linestyle="--", linewidth=1)
    time_axis(axes)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("largest over smallest median, %")
    axes.set_xlabel("smallest median")
    axes.grid()
    legend_below(figure, axes, 2)
