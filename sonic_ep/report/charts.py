"""Figures of what was measured: bandwidth against size, the parts of the layer, and its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sonic_ep.report.figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MODE_COLOURS,
    MODE_MARKERS,
    ORANGE,
    PURPLE,
    QUIET,
    SKY,
    Layout,
    Picture,
    legend_below,
    size_text,
    stacked,
)
from sonic_ep.report.measured import GEMMS
from sonic_ep.report.origin import caveats, origin_sentence
from sonic_ep.report.selection import Bandwidth, LayerGroup, MemoryBar, PassBar, memory_bars, pass_bars

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PART_COLOURS: Mapping[str, str] = MappingProxyType(
    {"plan": GREY, "dispatch": BLUE, GEMMS: "#c9ced8", "combine": GREEN, "rest": ORANGE}
)
OTHER_PARTS = (PURPLE, SKY)
BAR_HEIGHT = 0.22
GIB = 2**30


def bandwidth_picture(bandwidth: Bandwidth, number: int) -> Picture:
    """GB/s of each mode over the bytes of a rank's x, with the ceiling of its way as a line."""
    sources = [bandwidth.source]
    return Picture(
        name=f"bandwidth_{bandwidth.kind}_{number}",
        title=f"{bandwidth.kind.capitalize()}: link rate against size ({bandwidth.fixed}, uniform routing)",
        alt=f"Lines: {bandwidth_words(bandwidth)}",
        notes=(f"From {origin_sentence(sources)}", *caveats(sources)),
        draw=lambda figure, layout: _draw_bandwidth(bandwidth, figure, layout),
    )


def bandwidth_words(bandwidth: Bandwidth) -> str:
    """The last point of each line, and the ceilings."""
    ends = [f"{line.mode} {line.points[-1].gb_per_s:.0f} GB/s" for line in bandwidth.lines]
    ceilings = [f"{ceiling.name} {ceiling.gb_per_s:.0f} GB/s" for ceiling in bandwidth.ceilings]
    largest = size_text(max(line.points[-1].size_bytes for line in bandwidth.lines))
    limit = f"; measured ceilings: {', '.join(ceilings)}" if ceilings else ""
    return f"at {largest}: {', '.join(ends)}{limit}."


def _draw_bandwidth(bandwidth: Bandwidth, figure: Figure, layout: Layout) -> None:
    axes = stacked(figure, layout, 1, columns=1, heights=[4.6 if layout.narrow else 4.2])[0]
    for line in bandwidth.lines:
        sizes, rates = [p.size_bytes for p in line.points], [p.gb_per_s for p in line.points]
        style: dict[str, Any] = {"color": MODE_COLOURS[line.mode], "marker": MODE_MARKERS[line.mode], "markersize": 5}
        axes.plot(sizes, rates, label=line.mode, **style)
    _draw_ceilings(axes, bandwidth)
    _size_axis(axes, sorted({p.size_bytes for line in bandwidth.lines for p in line.points}), layout)
    axes.set_ylabel("GB/s into the busiest rank, remote bytes only")
    axes.grid(axis="y")
    legend_below(figure, axes, layout, columns=3)


def _draw_ceilings(axes: Axes, bandwidth: Bandwidth) -> None:
    """A line for each, named above it; where there are several, the lower ones below theirs."""
    rates = [ceiling.gb_per_s for ceiling in bandwidth.ceilings]
    measured = [point.gb_per_s for line in bandwidth.lines for point in line.points]
    axes.set_ylim(0, 1.1 * max(*rates, *measured, 0.0, 1e-9))
    for ceiling in bandwidth.ceilings:
        axes.axhline(ceiling.gb_per_s, color=QUIET, linestyle="--", linewidth=1.2)
        above = ceiling.gb_per_s == max(rates)
        axes.annotate(
            f"measured ceiling: {ceiling.name.replace('_', ' ')}, {ceiling.gb_per_s:.0f} GB/s",
            (0.01, ceiling.gb_per_s),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 3 if above else -3),
            textcoords="offset points",
            va="bottom" if above else "top",
            color=QUIET,
        )


def _size_axis(axes: Axes, sizes: Sequence[int], layout: Layout) -> None:
    axes.set_xscale("log", base=2)
    most = 4 if layout.narrow else 9
    step = -(-len(sizes) // most)
    shown = sizes[::-1][::step][::-1]
    axes.set_xticks(shown, [size_text(size) for size in shown])
    axes.minorticks_off()
    axes.set_xlabel("bytes of one rank's x, T·H elements")


def breakdown_picture(group: LayerGroup, pass_name: str, number: int) -> Picture:
    """One stacked bar for each layer, and the GEMMs alone with the link as a mark."""
    bars = pass_bars(group, pass_name)
    sources = [layer.source for layer in group.layers if any(b.pass_name == pass_name for b in layer.breakdown)]
    words = "; ".join(f"{bar.label} {_time_of(bar) / 1e3:.2f} ms" for bar in bars)
    return Picture(
        name=f"breakdown_{number}",
        title=f"Where the layer's time goes: {pass_name} ({group.title})",
        alt=f"Stacked bars of plan, dispatch, GEMMs, combine and rest. {words}.",
        notes=(f"From {origin_sentence(sources)}", *caveats(sources)),
        draw=lambda figure, layout: _draw_breakdown(bars, figure, layout),
    )


def _draw_breakdown(bars: Sequence[PassBar], figure: Figure, layout: Layout) -> None:
    texts = _wrapped([bar.label for bar in bars], layout.letters)
    height = _bars_height(texts, layout) + 0.9 + (1.0 if layout.narrow else 0.3)
    axes = stacked(figure, layout, 1, columns=1, heights=[height])[0]
    for position, bar in enumerate(bars):
        _draw_parts(axes, bar, position)
    limits = [(bar.limit_us / 1e3, position) for position, bar in enumerate(bars) if bar.limit_us is not None]
    for number, (limit, position) in enumerate(limits):
        words = "GEMMs and link alone" if number == 0 else ""
        axes.vlines(limit, position - 0.24, position + 0.24, color=INK, linewidth=2.2, label=words)
    layers = [(bar.layer_us / 1e3, position) for position, bar in enumerate(bars) if bar.layer_us is not None]
    if layers:
        style: dict[str, Any] = {"marker": "D", "s": 26, "facecolor": "white", "edgecolor": INK, "zorder": 3}
        axes.scatter(*zip(*layers, strict=True), label="the layer", **style)
    _name_bars(axes, texts, layout)
    axes.set_xlabel("ms")
    _legend_of_parts(figure, axes, layout)


def _draw_parts(axes: Axes, bar: PassBar, position: int) -> None:
    end = 0.0
    for part in bar.breakdown.parts:
        width, colour = part.us / 1e3, _part_colour(part.name)
        axes.barh(position, width, left=end, height=0.36, color=colour, edgecolor="white", linewidth=0.6)
        end += width
    end = max(end, (bar.layer_us or 0) / 1e3)
    words = f"{_time_of(bar) / 1e3:.2f}"
    axes.annotate(words, (end, position), xytext=(7, 0), textcoords="offset points", va="center", color=QUIET)
    axes.margins(x=0.1)


def _time_of(bar: PassBar) -> float:
    """What the layer took; the sum of its parts where that is unknown."""
    return sum(part.us for part in bar.breakdown.parts) if bar.layer_us is None else bar.layer_us


def _part_colour(name: str) -> str:
    return PART_COLOURS.get(name, OTHER_PARTS[len(name) % len(OTHER_PARTS)])


def _legend_of_parts(figure: Figure, axes: Axes, layout: Layout) -> None:
    from matplotlib.patches import Patch

    drawn = {patch.get_facecolor() for patch in axes.patches}
    parts = [Patch(color=colour, label=name) for name, colour in PART_COLOURS.items()]
    parts = [part for part in parts if part.get_facecolor() in drawn]
    others = [Patch(color=colour, label="other") for colour in OTHER_PARTS]
    parts += [part for part in others if part.get_facecolor() in drawn][:1]
    marks, _ = axes.get_legend_handles_labels()
    figure.legend(handles=[*parts, *marks], loc="outside lower center", ncols=2 if layout.narrow else 7)


def memory_picture(group: LayerGroup, kinds: Sequence[str], number: int) -> Picture:
    """For each kind of memory one bar a layer, as measured, and the formula as a mark."""
    panels = {what: memory_bars(group, what) for what in kinds}
    return Picture(
        name=f"memory_{number}",
        title=f"Memory of one rank, by formula and as measured ({group.title})",
        alt=f"Bars of measured memory with the formula as a mark: {'; '.join(kinds)}. The table below has the numbers.",
        notes=(f"From {origin_sentence(group.sources)}", *caveats(group.sources)),
        draw=lambda figure, layout: _draw_memory(panels, figure, layout),
    )


def _draw_memory(panels: Mapping[str, Sequence[MemoryBar]], figure: Figure, layout: Layout) -> None:
    letters = layout.letters if layout.narrow else layout.letters // 2 - 8
    texts = {what: _wrapped([bar.label for bar in bars], letters) for what, bars in panels.items()}
    heights = [_bars_height(texts[what], layout) + 0.75 for what in panels]
    for axes, (what, bars) in zip(
        stacked(figure, layout, len(panels), columns=2, heights=heights), panels.items(), strict=True
    ):
        _draw_memory_bars(axes, bars)
        _name_bars(axes, texts[what], layout)
        axes.set_title(what, loc="left", fontweight="bold")
    figure.set_figheight(figure.get_figheight() + 2 * layout.line)
    _legend_of_memory(figure)


def _draw_memory_bars(axes: Axes, bars: Sequence[MemoryBar]) -> None:
    known = [value for bar in bars for value in (bar.formula_bytes, bar.measured_bytes) if value is not None]
    unit, name = (GIB, "GiB") if max(known, default=0) >= GIB else (2**20, "MiB")
    for position, bar in enumerate(bars):
        if bar.measured_bytes is not None:
            axes.barh(position, bar.measured_bytes / unit, height=0.36, color=SKY)
        if bar.formula_bytes is not None:
            axes.vlines(bar.formula_bytes / unit, position - 0.24, position + 0.24, color=INK, linewidth=2.2)
    axes.set_xlim(0, 1.08 * max(known, default=1) / unit or 1)
    axes.set_xlabel(name)


def _legend_of_memory(figure: Figure) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    mark = Line2D([], [], color=INK, linewidth=2.2, label="formula")
    figure.legend(handles=[Patch(color=SKY, label="measured"), mark], loc="outside lower center", ncols=2)


def _wrapped(names: Sequence[str], letters: int) -> list[str]:
    return ["\n".join(wrap(name, letters) or [""]) for name in names]


def _bars_height(texts: Sequence[str], layout: Layout) -> float:
    """Inches for bars with their labels above them."""
    lines = max(text.count("\n") + 1 for text in texts)
    return len(texts) * (lines * layout.line + 1.6 * BAR_HEIGHT)


def _name_bars(axes: Axes, texts: Sequence[str], layout: Layout) -> None:
    """A label above each bar; the first is on top."""
    lines = max(text.count("\n") + 1 for text in texts)
    for position, text in enumerate(texts):
        axes.text(0, position - 0.22, text, transform=axes.get_yaxis_transform(), va="bottom", linespacing=1.15)
    share = lines * layout.line / (lines * layout.line + 1.6 * BAR_HEIGHT)
    axes.set_ylim(len(texts) - 0.65, -0.25 - max(0.35, share))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
