"""A profile as lines of aligned text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sonic_ep.config import CombineMode, DispatchMode

if TYPE_CHECKING:
    from sonic_ep.profiler.report import ModeTime, PairTime, ProfileReport, ProfileShape, Spread

MOST_TOKENS_SHOWN = 8


def table_of(report: ProfileReport) -> list[str]:
    """The lines: what was profiled, every mode, every pair with the pick marked, and the pick."""
    return [
        *_heading(report),
        "",
        f"{'what':<9} {'mode':<15} {'ms':>10} {'p10..p90':>9} {'GB/s':>8} {'% of ceiling':>13}",
        *map(_mode_line, report.modes),
        "",
        "ids, plan, dispatch and combine together, in ms:",
        *_pair_lines(report),
        "",
        f"picked: dispatch {report.picked.dispatch.value}, combine {report.picked.combine.value}",
    ]


def _heading(report: ProfileReport) -> list[str]:
    machine, shape = report.machine, report.shape
    linked = "" if machine.link is None else f", {machine.link}"
    sizes = f"H={shape.hidden}, E={shape.num_experts}, K={shape.top_k}, {shape.dtype}, {shape.routing} routing"
    lines = [
        f"backend {report.backend}, {shape.world_size} rank{'s' * (shape.world_size > 1)} on "
        f"{machine.gpu or 'the CPU'}{linked}",
        f"{_tokens(shape)}, {sizes}",
        f"{report.pairs[0].spread.rounds} alternating rounds; the median over them of the slowest rank; GB/s over the "
        "link into the busiest rank",
        _bandwidth(report),
    ]
    notes = [] if report.note is None else [f"note: {report.note}"]
    cached = [f"from the cache, measured {report.origin.date}: nothing was measured now"] if report.from_cache else []
    return [*lines, *notes, *cached]


def _tokens(shape: ProfileShape) -> str:
    """T of the ranks, short where they are many or alike."""
    if len(set(shape.tokens)) == 1:
        return f"T={shape.tokens[0]} on each rank"
    if shape.world_size <= MOST_TOKENS_SHOWN:
        return f"T={','.join(map(str, shape.tokens))} by rank"
    return f"T={min(shape.tokens)} to {max(shape.tokens)}"


def _bandwidth(report: ProfileReport) -> str:
    if report.rates is not None:
        rates = report.rates
        figures = {"copy engine": rates.copy_engine_in, "reads": rates.read, "writes": rates.write}
        return "ceilings of the link in GB/s: " + ", ".join(f"{name} {r / 1e9:.1f}" for name, r in figures.items())
    if report.machine.gpu is None:
        return "no ceiling was measured: there is no link between GPUs here"
    if report.shape.world_size == 1:
        return "no ceiling was measured: one rank uses no link"
    return "no ceiling was measured: these GPUs cannot map each other's memory"


def _mode_line(mode: ModeTime) -> str:
    rate = "-" if mode.gb_per_s is None else f"{mode.gb_per_s:.3g}" if mode.gb_per_s < 1 else f"{mode.gb_per_s:.1f}"
    percent = "-" if mode.percent is None else f"{mode.percent:.1f}"
    spread = mode.spread
    width = f"{(spread.p90_us - spread.p10_us) / spread.median_us:.1%}" if spread.median_us else "-"
    return f"{mode.kind:<9} {mode.mode:<15} {_milliseconds(spread):>10} {width:>9} {rate:>8} {percent:>13}"


def _milliseconds(spread: Spread) -> str:
    return f"{spread.median_us / 1e3:.4f}"


def _pair_lines(report: ProfileReport) -> list[str]:
    cells = {(pair.dispatch, pair.combine): _pair_cell(report, pair) for pair in report.pairs}
    header = f"{'dispatch / combine':<20}" + "".join(f"{combine.value:>16}" for combine in CombineMode)
    rows = [
        f"{dispatch.value:<20}" + "".join(f"{cells[dispatch, combine]:>16}" for combine in CombineMode)
        for dispatch in DispatchMode
    ]
    return [line.rstrip() for line in (header, *rows)]


def _pair_cell(report: ProfileReport, pair: PairTime) -> str:
    """A time, and a mark or the space of one, so that the digits are aligned."""
    picked = (pair.dispatch, pair.combine) == (report.picked.dispatch, report.picked.combine)
    return f"{_milliseconds(pair.spread)} {'<' if picked else ' '}"
