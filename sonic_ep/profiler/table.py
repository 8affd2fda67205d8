"""A profile as lines of aligned text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sonic_ep.config import CombineMode

if TYPE_CHECKING:
    from sonic_ep.profiler.report import ModeTime, ProfileReport, ProfileShape, Spread

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
    ranks = f"{shape.world_size} rank{'s' * (shape.world_size > 1)}"
    sizes = f"H={shape.hidden}, E={shape.num_experts}, K={shape.top_k}, {shape.dtype}, {shape.routing} routing"
    rounds = f"{report.pairs[0].spread.rounds} alternating rounds; the median over them of the slowest rank"
    lines = [
        f"backend {report.backend}, {ranks} on {machine.gpu or 'the CPU'}{linked}",
        f"{_tokens(shape)}, {sizes}",
        f"{rounds}; GB/s over the link into the busiest rank",
        _bandwidth(report),
    ]
    if report.note is not None:
        lines.append(f"note: {report.note}")
    if report.from_cache:
        lines.append(f"from the cache, measured {report.origin.date}: nothing was measured now")
    return lines


def _tokens(shape: ProfileShape) -> str:
    """T of the ranks, short where they are many or alike."""
    if len(set(shape.tokens)) == 1:
        return f"T={shape.tokens[0]} on each rank"
    if shape.world_size <= MOST_TOKENS_SHOWN:
        return f"T={','.join(map(str, shape.tokens))} by rank"
    return f"T={min(shape.tokens)} to {max(shape.tokens)}"


def _bandwidth(report: ProfileReport) -> str:
    if (rates := report.rates) is not None:
        figures = {"copy engine": rates.copy_engine_in, "reads": rates.read, "writes": rates.write}
        return "ceilings of the link in GB/s: " + ", ".join(f"{name} {r / 1e9:.1f}" for name, r in figures.items())
    why = "these GPUs cannot map each other's memory"
    if report.machine.gpu is None:
        why = "there is no link between GPUs here"
    elif report.shape.world_size == 1:
        why = "one rank uses no link"
    return f"no ceiling was measured: {why}"


def _mode_line(mode: ModeTime) -> str:
    rate = "-" if mode.gb_per_s is None else f"{mode.gb_per_s:.3g}" if mode.gb_per_s < 1 else f"{mode.gb_per_s:.1f}"
    percent = "-" if mode.percent is None else f"{mode.percent:.1f}"
    spread = mode.spread
    width = f"{(spread.p90_us - spread.p10_us) / spread.median_us:.1%}" if spread.median_us else "-"
    return f"{mode.kind:<9} {mode.mode:<15} {_milliseconds(spread):>10} {width:>9} {rate:>8} {percent:>13}"


def _milliseconds(spread: Spread) -> str:
    return f"{spread.median_us / 1e3:.4f}"


def _pair_lines(report: ProfileReport) -> list[str]:
    lines = {"dispatch / combine": [combine.value for combine in CombineMode]}
    for pair in report.pairs:
        picked = (pair.dispatch, pair.combine) == (report.picked.dispatch, report.picked.combine)
        # A mark or the space of one, so that the digits are aligned.
        lines.setdefault(pair.dispatch.value, []).append(f"{_milliseconds(pair.spread)} {'<' if picked else ' '}")
    return [(f"{name:<20}" + "".join(f"{cell:>16}" for cell in cells)).rstrip() for name, cells in lines.items()]
