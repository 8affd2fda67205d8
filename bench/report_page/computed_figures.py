"""Figures of what is computed: the winners over K and W, and the extrapolation to larger W."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from schema import pair_name

from report_page.computed import COMPUTED, Extrapolation, GridCell, WinnerGrid
from report_page.drawing import GREY, INK, MODE_STYLES, QUIET, Picture, axes_below
from report_page.load import caveats, origin

# Height of a mode in a cell; the rest is for how it is known.
BAND = 0.34


def winner_picture(grid: WinnerGrid, number: int) -> Picture:
    """The fastest pair for each K and W: a solid frame where it was measured, a dashed one where it is computed."""
    sweeps = list(dict.fromkeys(cell.measured.sweep for cell in grid.cells if cell.measured is not None))
    measured = [f"Measured cells: {origin(sweeps)}"] if sweeps else []
    computed = f"Computed cells: at the rates in {origin([grid.machine.document])}"
    how = f"measured at W={grid.machine.world_size}, computed elsewhere" if sweeps else COMPUTED
    cells = [f"W={c.world_size}, K={c.top_k}: {pair_name(c.shown)}, {c.how_known}." for c in grid.cells]
    return Picture(
        name=f"winners_{number}",
        title=f"Fastest modes over K and W, E={grid.num_experts}: {how}",
        alt=f"Grid of mode pairs. {' '.join(cells)}",
        notes=[*measured, computed, *caveats(sweeps)],
        draw=lambda figure: _draw_winners(grid, figure),
    )


def _draw_winners(grid: WinnerGrid, figure: Figure) -> None:
    sizes = sorted({cell.world_size for cell in grid.cells})
    choices = sorted({cell.top_k for cell in grid.cells})
    (axes,) = axes_below(figure, 0.72 * len(choices) + 0.9)
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
        colour, _ = MODE_STYLES[mode]
        axes.add_patch(Rectangle((column - 0.47, top), 0.94, BAND, color=colour, alpha=0.25, linewidth=0))
        axes.text(column, top + BAND / 2, mode, ha="center", va="center")
    frame: dict[str, Any] = {"linestyle": "--", "edgecolor": GREY}
    words: dict[str, Any] = {"fontstyle": "italic", "color": QUIET}
    if cell.measured is not None:
        frame, words = {"linewidth": 1.8, "edgecolor": INK}, {"fontweight": "bold"}
    axes.add_patch(Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, fill=False, **frame))
    axes.text(column, row + 0.34, cell.how_known, ha="center", va="center", fontsize=8.5, **words)


def extrapolation_picture(found: Extrapolation, number: int) -> Picture:
    """Dispatch and combine over W, one line a mode."""
    words = "; ".join(
        f"W={step.world_size}: {pair_name(step.cheapest)} {step.forward_us / 1e3:.2f} ms" for step in found.steps
    )
    return Picture(
        name=f"extrapolation_{number}",
        title=f"One dispatch and one combine over W, {COMPUTED} ({found.shape})",
        alt=f"Lines of time over W by mode, {COMPUTED}. The cheapest pair, {words}.",
        notes=[f"Computed from bytes at the rates in {origin([found.machine.document])}"],
        draw=lambda figure: _draw_extrapolation(found, figure),
    )


def _draw_extrapolation(found: Extrapolation, figure: Figure) -> None:
    sizes = [step.world_size for step in found.steps]
    kinds = {"dispatch": [s.dispatch_us for s in found.steps], "combine": [s.combine_us for s in found.steps]}
    highest = max(us for steps in kinds.values() for step in steps for us in step.values()) / 1e3
    for axes, (kind, steps) in zip(axes_below(figure, 3.6, 2), kinds.items(), strict=True):
        for place, mode in enumerate(steps[0]):
            # Modes may cost the same: wider below narrower, so that each is seen.
            (colour, marker), width = MODE_STYLES[mode], 3.6 - 1.2 * place
            times = [step[mode] / 1e3 for step in steps]
            axes.plot(sizes, times, f"--{marker}", color=colour, linewidth=width, markersize=4 + width, label=mode)
        axes.set_title(f"{kind}, {COMPUTED}", loc="left", fontweight="bold")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set(xlabel="W", ylabel="ms", ylim=(0, 1.08 * highest or 1))
        axes.grid(axis="y")
        axes.legend(loc="upper left")
