"""From timings to a report: rates under their ceilings, and the pair that is picked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sonic_ep import cost
from sonic_ep.config import AUTO, CombineMode, DispatchMode, EPConfig, ModePair
from sonic_ep.profiler.report import EVERY_MODE, REFERENCE, ModeTime, PairTime, ProfileReport, ProfileShape, Spread
from sonic_ep.profiler.timing import Ceiling, Timing

# Ranks whose traffic differs by no more count as equally busy.
BALANCED = 1.1
# Two pairs closer than this count as equally fast.
TIE = 0.01
# The ceiling of each mode, in the order of a report; None for the plan.
WAYS = (None, *(cost.WAY_OF_DISPATCH[mode] for mode in DispatchMode), *(cost.WAY_OF_COMBINE for _ in CombineMode))


def pick(pairs: Sequence[PairTime], config: EPConfig, shape: ProfileShape) -> ModePair:
    """The fastest of ``pairs`` that keeps the modes which ``config`` fixes.

    Of those within ``TIE`` of the fastest, the one that ``sonic_ep.cost`` predicts, or else the first.
    """
    kept = [p for p in pairs if config.dispatch in (AUTO, p.dispatch) and config.combine in (AUTO, p.combine)]
    most = min(pair.spread.median_us for pair in kept) * (1 + TIE)
    tied = [ModePair(dispatch=p.dispatch, combine=p.combine) for p in kept if p.spread.median_us <= most]
    load = cost.Workload(world_size=shape.world_size, top_k=shape.top_k, num_experts=shape.num_experts)
    predicted = cost.choose_modes(config, load)
    return predicted if predicted in tied else tied[0]


def require_answer(report: ProfileReport, *, shape: ProfileShape, backend: str, config: EPConfig) -> None:
    """Raise ``ValueError`` unless ``report`` is what a profile of ``shape`` by ``backend`` and ``config`` may find."""
    found = {name: getattr(report.config, name) for name in ("dispatch", "combine") if getattr(config, name) == AUTO}
    for name, expected in (("shape", shape), ("backend", backend), ("config", replace(config, **found))):
        got = getattr(report, name)
        if got != expected:
            raise ValueError(f"{name}: got a profile of {got}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class LinkLoad:
    """Bytes that one work brings over the link into each rank, and out of it."""

    into: tuple[int, ...]
    out_of: tuple[int, ...]

    @property
    def under_ceiling(self) -> float:
        """The bytes that the ceiling limits: of the busiest rank if traffic is balanced, else of the mean rank.

        The ceiling was measured with both directions busy, and traffic in one direction may be faster.
        """
        both = (*self.into, *self.out_of)
        return max(self.into) if max(both) <= BALANCED * min(both) else sum(self.into) / len(self.into)


def link_loads(shape: ProfileShape, backend: str, counts: Sequence[cost.RankCounts]) -> list[LinkLoad]:
    """The load of the plan and of each mode, in the order of a report."""
    per_work = zip(*(_link_bytes(shape, backend, of_rank) for of_rank in counts), strict=True)
    return [LinkLoad(into=into, out_of=out_of) for into, out_of in (zip(*work, strict=True) for work in per_work)]


def _link_bytes(shape: ProfileShape, backend: str, counts: cost.RankCounts) -> list[tuple[int, int]]:
    """Into one rank and out of it."""
    row_bytes = shape.hidden * shape.row_dtype.itemsize
    exchange = {"world_size": shape.world_size, "max_tokens": shape.max_tokens, "top_k": shape.top_k}
    ids, both = (cost.exchange_link_bytes(**exchange, with_scores=scores) for scores in (False, True))
    scores = both - ids
    dispatched = {mode: (t.link_in, t.link_out) for mode, t in cost.dispatch_traffic(counts, row_bytes).items()}
    if backend == REFERENCE:
        # It sends one row for each slot.
        dispatched[DispatchMode.ALL_TO_ALL] = (counts.slots_in * row_bytes, counts.slots_out * row_bytes)
    combined = cost.combine_traffic(counts, row_bytes)
    return [
        (ids, ids),
        *(dispatched[mode] for mode in DispatchMode),
        *((combined[mode].link_in + scores, combined[mode].link_out + scores) for mode in CombineMode),
    ]


def mode_times(
    timings: Sequence[Timing], loads: Sequence[LinkLoad], bandwidth: cost.LinkBandwidth | None
) -> tuple[ModeTime, ...]:
    """The plan and each mode, in the order of a report. Raises ``AboveCeilingError`` if the link cannot be so fast."""
    found = []
    for (kind, mode), way, timing, load in zip(EVERY_MODE, WAYS, timings, loads, strict=True):
        # A clock too coarse for the work measures no rate.
        rate = max(load.into) / timing.median if timing.median > 0 else None
        share = None
        if bandwidth is not None and way is not None and rate is not None:
            ceiling = Ceiling(name=f"the {way} ceiling", bytes_per_second=getattr(bandwidth, way))
            ceiling.share_of(load.under_ceiling, timing.median, f"{kind} {mode}")
            share = rate / ceiling.bytes_per_second
        time = ModeTime(
            kind=kind,
            mode=mode,
            spread=Spread.of(timing),
            link_bytes=float(max(load.into)),
            # Six significant digits: a rate of a few bytes is not zero.
            gb_per_s=None if rate is None else float(f"{rate / 1e9:.6g}"),
            ceiling=None if bandwidth is None else way,
            percent=None if share is None else float(f"{100 * share:.6g}"),
        )
        found.append(time)
    return tuple(found)
