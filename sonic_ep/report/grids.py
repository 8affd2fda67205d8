"""Figures of what is computed, and of how far times differ: winners over K and W, extrapolation, spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sonic_ep.config import ModePair
from sonic_ep.report.computed import COMPUTED, Extrapolation, GridCell, WinnerGrid
from sonic_ep.report.figures import (
    BLUE,
    CYCLE,
    GREY,
    INK,
    MARKERS,
    MODE_COLOURS,
    MODE_MARKERS,
    ORANGE,
    QUIET,
    Layout,
    Picture,
    legend_below,
    stacked,
    time_axis,
)
from sonic_ep.report.measured import pair_name
from sonic_ep.report.origin import Source, caveats, origin_sentence
from sonic_ep.report.spread import LARGE_PERCENT, LARGE_US, Repeated, WithinRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Below this, a spread is drawn at it: the axis is logarithmic.
LEAST_PERCENT = 0.01
# Of a cell: dispatch, combine, and less for how that is known.
BAND = 0.34
TINT = 0.25


def winner_picture(grid: WinnerGrid, number: int) -> Picture:
    """The cheapest pair for each K and W: a solid frame where it was measured, a dashed one where it is computed."""
    measured = [cell.measured for cell in grid.cells if cell.measured is not None]
    sources = list(dict.fromkeys([winner.source for winner in measured]))
    computed = f"Computed cells: at the rates in {origin_sentence([grid.machine.source])}"
    notes = (*([f"Measured cells: {origin_sentence(sources)}"] if sources else []), computed, *caveats(sources))
    what = f"measured at W={grid.machine.source.environment.world_size}, computed elsewhere" if measured else COMPUTED
    return Picture(
        name=f"winners_{number}",
        title=f"Fastest modes over K and W, E={grid.num_experts}: {what}",
        alt=f"Grid of mode pairs. {' '.join(map(_cell_words, grid.cells))}",
        notes=notes,
        draw=lambda figure, layout: _draw_winners(grid, figure, layout),
    )


def _cell_words(cell: GridCell) -> str:
    return f"W={cell.world_size}, K={cell.top_k}: {pair_name(shown_pair(cell))}, {how_known(cell)}."


def shown_pair(cell: GridCell) -> ModePair:
    """The measured pair where there is one."""
    return cell.computed if cell.measured is None else cell.measured.best.pair


def how_known(cell: GridCell) -> str:
    """Whether the shown pair was measured."""
    return "computed" if cell.measured is None else "measured"


def _draw_winners(grid: WinnerGrid, figure: Figure, layout: Layout) -> None:
    sizes = sorted({cell.world_size for cell in grid.cells})
    choices = sorted({cell.top_k for cell in grid.cells})
    height = len(choices) * (1.0 if layout.narrow else 0.72) + 0.9
    axes = stacked(figure, layout, 1, columns=1, heights=[height])[0]
    for cell in grid.cells:
        _draw_cell(axes, cell, (sizes.index(cell.world_size), choices.index(cell.top_k)), layout)
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    axes.set_ylim(len(choices) - 0.5, -0.5)
    axes.set_xticks(range(len(sizes)), [f"W={size}" for size in sizes])
    axes.set_yticks(range(len(choices)), [f"K={top_k}" for top_k in choices])
    axes.tick_params(length=0)
    axes.set_xlabel("in a cell: dispatch above, combine below")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_cell(axes: Axes, cell: GridCell, place: tuple[int, int], layout: Layout) -> None:
    from matplotlib.patches import Rectangle

    column, row = place
    measured = cell.measured is not None
    size = layout.font_size - (1.3 if layout.narrow else 0)
    for band, mode in enumerate((shown_pair(cell).dispatch.value, shown_pair(cell).combine.value)):
        top = row - 0.46 + BAND * band
        axes.add_patch(Rectangle((column - 0.47, top), 0.94, BAND, color=MODE_COLOURS[mode], alpha=TINT, linewidth=0))
        name = _broken(mode) if layout.narrow else mode
        axes.text(column, top + BAND / 2, name, ha="center", va="center", fontsize=size, linespacing=0.95)
    frame: dict[str, Any] = {"linewidth": 1.8, "edgecolor": INK} if measured else {"linestyle": "--", "edgecolor": GREY}
    axes.add_patch(Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, fill=False, **frame))
    style: dict[str, Any] = (
        {"fontweight": "bold", "color": INK} if measured else {"fontstyle": "italic", "color": QUIET}
    )
    place_of_word = row + 0.34
    axes.text(column, place_of_word, how_known(cell), ha="center", va="center", fontsize=size - 0.5, **style)


def _broken(name: str) -> str:
    """A mode's name that fits into a cell of a phone's width."""
    return name.replace("reduce_scatter", "reduce_\nscatter")


def extrapolation_picture(extrapolation: Extrapolation, number: int) -> Picture:
    """Dispatch and combine over W, one line a mode."""
    source = extrapolation.machine.source
    words = "; ".join(
        f"W={step.world_size}: {pair_name(step.cheapest)} {step.forward_us / 1e3:.2f} ms"
        for step in extrapolation.steps
    )
    return Picture(
        name=f"extrapolation_{number}",
        title=f"One dispatch and one combine over W, {COMPUTED} ({extrapolation.shape})",
        alt=f"Lines of time over W by mode, {COMPUTED}. The cheapest pair, {words}.",
        notes=(f"Computed from bytes at the rates in {origin_sentence([source])}",),
        draw=lambda figure, layout: _draw_extrapolation(extrapolation, figure, layout),
    )


def _draw_extrapolation(extrapolation: Extrapolation, figure: Figure, layout: Layout) -> None:
    height = 2.9 if layout.narrow else 3.6
    left, right = stacked(figure, layout, 2, columns=2, heights=[height, height])
    dispatch = [{mode.value: us for mode, us in step.dispatch_us.items()} for step in extrapolation.steps]
    combine = [{mode.value: us for mode, us in step.combine_us.items()} for step in extrapolation.steps]
    sizes = [step.world_size for step in extrapolation.steps]
    highest = max(us for step in (*dispatch, *combine) for us in step.values()) / 1e3
    for axes, kind, steps in ((left, "dispatch", dispatch), (right, "combine", combine)):
        _draw_modes(axes, sizes, steps)
        axes.set_title(f"{kind}, {COMPUTED}", loc="left", fontweight="bold")
        axes.set_ylim(0, 1.08 * highest or 1)


def _draw_modes(axes: Axes, sizes: Sequence[int], steps: Sequence[Mapping[str, float]]) -> None:
    for position, mode in enumerate(steps[0]):
        times = [step[mode] / 1e3 for step in steps]
        # Modes may cost the same: wider below narrower, so that each is seen.
        width = 3.6 - 1.2 * position
        style: dict[str, Any] = {"color": MODE_COLOURS[mode], "marker": MODE_MARKERS[mode], "markersize": 4 + width}
        axes.plot(sizes, times, linestyle="--", linewidth=width, label=mode, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("W")
    axes.set_ylabel("ms")
    axes.grid(axis="y")
    axes.legend(loc="upper left")


def within_picture(runs: Sequence[WithinRun]) -> Picture:
    """p10 to p90 in percent of the median over the median, one dot for each time."""
    sources = [run.source for run in runs]
    words = "; ".join(f"{run.source.file} {run.typical_percent:.2f}%" for run in runs)
    return Picture(
        name="spread_within_runs",
        title="Within one run: p10 to p90 in percent of the median",
        alt=f"Dots over the median time, one colour for each kind of file. In the middle: {words}.",
        notes=(f"From {origin_sentence(sources)}", *caveats(sources)),
        draw=lambda figure, layout: _draw_within(runs, figure, layout),
    )


def _draw_within(runs: Sequence[WithinRun], figure: Figure, layout: Layout) -> None:
    axes = stacked(figure, layout, 1, columns=1, heights=[4.0 if layout.narrow else 3.6])[0]
    kinds = dict.fromkeys(run.source.kind for run in runs)
    for kind, colour, marker in zip(kinds, CYCLE, MARKERS, strict=False):
        times = [measured.times for run in runs if run.source.kind == kind for measured in run.measured]
        spreads = [max(found.spread_percent, LEAST_PERCENT) for found in times]
        style: dict[str, Any] = {"s": 14, "alpha": 0.55, "color": colour, "marker": marker, "linewidth": 0}
        axes.scatter([found.median_us for found in times], spreads, label=f"{kind}: {len(times)} times", **style)
    time_axis(axes)
    axes.set_yscale("log")
    axes.set_yticks(*_percent_ticks(axes.get_ylim()))
    axes.minorticks_off()
    axes.set_ylabel("p90 - p10, % of the median")
    axes.set_xlabel("median")
    axes.grid()
    legend_below(figure, axes, layout, columns=4)


def _percent_ticks(limits: tuple[float, float]) -> tuple[list[float], list[str]]:
    marks = [mark for mark in (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0) if limits[0] <= mark <= limits[1]]
    return marks, [f"{mark:g}%" for mark in marks]


def repeated_picture(again: Sequence[Repeated]) -> Picture:
    """Difference between runs over the smallest median, with what counts as a difference."""
    sources: list[Source] = list(dict.fromkeys(m.source for found in again for m in found.measured))
    differing = sum(found.differs for found in again)
    return Picture(
        name="spread_between_runs",
        title="From run to run: how far medians of the same thing differ",
        alt=f"{len(again)} dots, {differing} of them above {LARGE_US:.0f} us and {LARGE_PERCENT:.0f}% or more apart.",
        notes=(f"From {origin_sentence(sources)}", *caveats(sources)),
        draw=lambda figure, layout: _draw_repeated(again, figure, layout),
    )


def _draw_repeated(again: Sequence[Repeated], figure: Figure, layout: Layout) -> None:
    axes = stacked(figure, layout, 1, columns=1, heights=[3.6])[0]
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
    legend_below(figure, axes, layout, columns=2)
