"""A profile as a picture: the time of each mode, beside what the link alone would take. Needs matplotlib."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import Any

from sonic_ep.profiler.report import COMBINE, DISPATCH, ModeTime, ProfileReport

MATPLOTLIB_MISSING = "matplotlib is not installed: pip install matplotlib"
PICKED, OTHER, LINK = "#1b6ca8", "#b8c4ce", "#222222"
INCHES, DPI, LETTERS = (7.5, 3.6), 150, 95
MS_OF_US = 1e-3


def write_picture(report: ProfileReport, path: Path) -> None:
    """Draw ``report`` to ``path``, in the format of its suffix. ``ImportError`` without matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.subplots()
    modes = [mode for mode in report.modes if mode.kind in (DISPATCH, COMBINE)]
    picked = {DISPATCH: report.picked.dispatch.value, COMBINE: report.picked.combine.value}
    times = [mode.spread.median_us * MS_OF_US for mode in modes]
    places = range(len(modes))
    colours = [PICKED if mode.mode == picked[mode.kind] else OTHER for mode in modes]
    axes.barh(places, times, color=colours, height=0.7)
    spreads = [
        (mode.spread.median_us - mode.spread.p10_us, mode.spread.p90_us - mode.spread.median_us) for mode in modes
    ]
    lows, highs = zip(*[(max(0.0, low) * MS_OF_US, max(0.0, high) * MS_OF_US) for low, high in spreads], strict=True)
    axes.errorbar(times, places, xerr=(lows, highs), fmt="none", ecolor=LINK, elinewidth=0.8, capsize=2)
    floors = [(place, floor) for place, mode in zip(places, modes, strict=True) if (floor := link_ms(report, mode))]
    for place, floor in floors:
        axes.plot([floor, floor], [place - 0.4, place + 0.4], color=LINK, linewidth=2)
    axes.set_yticks(places, [f"{mode.kind} {mode.mode}" for mode in modes])
    axes.invert_yaxis()
    axes.set_xlabel("ms, median of the slowest rank; whiskers: p10 to p90")
    axes.spines[["top", "right"]].set_visible(False)
    legend: list[Any] = [Patch(color=PICKED, label="fastest pair"), Patch(color=OTHER, label="other modes")]
    legend += [Line2D([], [], color=LINK, linewidth=2, label="the link alone, at its measured rate")] * bool(floors)
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False, fontsize=8)
    title = f"dispatch {picked[DISPATCH]} and combine {picked[COMBINE]} are the fastest pair"
    figure.suptitle("\n".join([title, *_conditions(report)]), x=0.01, ha="left", fontsize=9)
    figure.savefig(path, dpi=DPI)


def link_ms(report: ProfileReport, mode: ModeTime) -> float | None:
    """Milliseconds that the bytes of ``mode`` take at the rate measured for its way over the link, if there is one."""
    if report.rates is None or mode.ceiling is None:
        return None
    return mode.link_bytes / float(asdict(report.rates)[mode.ceiling]) * 1e3


def _conditions(report: ProfileReport) -> list[str]:
    """The shape and the machine, and what readers of the times have to know."""
    shape, ranks = report.shape, report.shape.world_size
    where = f"{ranks} rank{'s' * (ranks > 1)} on {report.machine.gpu or 'the CPU'}, backend {report.backend}"
    sizes = f"T={shape.max_tokens}, H={shape.hidden}, E={shape.num_experts}, K={shape.top_k}, {shape.dtype}"
    found = [f"{where}; {sizes}, {shape.routing} routing", *([] if report.note is None else [f"note: {report.note}"])]
    return [fill(line, LETTERS) for line in found]
