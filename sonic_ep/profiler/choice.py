"""From timings to a report: rates under their ceilings, and the pair that is picked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sonic_ep.config import CombineMode, DispatchMode, EPConfig, ModePair
from sonic_ep.cost import (
    WAY_OF_COMBINE,
    WAY_OF_DISPATCH,
    LinkBandwidth,
    RankCounts,
    Traffic,
    Workload,
    choose_modes,
    combine_traffic,
    dispatch_traffic,
    exchange_link_bytes,
    reference_dispatch_link_bytes,
)
from sonic_ep.profiler.report import EVERY_MODE, REFERENCE, ModeTime, PairTime, ProfileReport, ProfileShape, Spread
from sonic_ep.profiler.timing import Ceiling, Timing

# Ranks whose traffic differs by no more count as equally busy.
BALANCED = 1.1
# Two pairs closer than this count as equally fast.
TIE = 0.01
# The ceiling of each mode, in the order of a report; none of the plan.
WAYS = (None, *(WAY_OF_DISPATCH[mode] for mode in DispatchMode), *(WAY_OF_COMBINE for _ in CombineMode))


def pick(pairs: Sequence[PairTime], config: EPConfig, shape: ProfileShape) -> ModePair:
    """The fastest of ``pairs`` that keeps the modes which ``config`` fixes.

    Of those within ``TIE`` of the fastest, the one that ``sonic_ep.cost`` predicts, or else the first.
    """
    fixed = _fixed_modes(config)
    kept = [pair for pair in pairs if all(getattr(pair, name) is mode for name, mode in fixed.items())]
    best = min(pair.spread.median_us for pair in kept)
    tied = [pair for pair in kept if pair.spread.median_us <= best * (1 + TIE)]
    modes = [ModePair(dispatch=pair.dispatch, combine=pair.combine) for pair in tied]
    load = Workload(world_size=shape.world_size, top_k=shape.top_k, num_experts=shape.num_experts)
    predicted = choose_modes(config, load)
    return predicted if predicted in modes else modes[0]


def require_answer(report: ProfileReport, *, shape: ProfileShape, backend: str, config: EPConfig) -> None:
    """Raise ``ValueError`` unless ``report`` is what a profile of ``shape`` by ``backend`` and ``config`` may find."""
    picked = replace(config, dispatch=report.config.dispatch, combine=report.config.combine)
    asked = {"shape": shape, "backend": backend, "config": replace(picked, **_fixed_modes(config))}
    for name, expected in asked.items():
        got = getattr(report, name)
        if got != expected:
            raise ValueError(f"{name}: got a profile of {got}, expected {expected}")


def _fixed_modes(config: EPConfig) -> Mapping[str, Any]:
    """The modes of ``config`` that are not "auto"."""
    modes = {"dispatch": config.dispatch, "combine": config.combine}
    return {name: mode for name, mode in modes.items() if isinstance(mode, DispatchMode | CombineMode)}


@dataclass(frozen=True, kw_only=True)
class LinkLoad:
    """Bytes that one work brings over the link into each rank, and out of it."""

    into: tuple[int, ...]
    out_of: tuple[int, ...]

    @property
    def busiest(self) -> int:
        """Into the rank that receives most."""
        return max(self.into)

    @property
    def under_ceiling(self) -> float:
        """The bytes that the ceiling limits: of the busiest rank if traffic is balanced, else of the mean rank.

        The ceiling was measured with both directions busy, and traffic in one direction may be faster.
        """
        both = (*self.into, *self.out_of)
        return self.busiest if max(both) <= BALANCED * min(both) else sum(self.into) / len(self.into)


def link_loads(shape: ProfileShape, backend: str, counts: Sequence[RankCounts]) -> list[LinkLoad]:
    """The load of the plan and of each mode, in the order of a report."""
    per_rank = [_traffic(shape, backend, of_rank) for of_rank in counts]
    return [
        LinkLoad(into=tuple(t.link_in for t in of_mode), out_of=tuple(t.link_out for t in of_mode))
        for of_mode in zip(*per_rank, strict=True)
    ]


def _traffic(shape: ProfileShape, backend: str, counts: RankCounts) -> list[Traffic]:
    """Of one rank; memory is not counted."""
    row_bytes = shape.hidden * shape.row_dtype.itemsize
    exchange = {"world_size": shape.world_size, "max_tokens": shape.max_tokens, "top_k": shape.top_k}
    ids, both = (exchange_link_bytes(**exchange, with_scores=scores) for scores in (False, True))
    dispatched = dict(dispatch_traffic(counts, row_bytes))
    if backend == REFERENCE:
        # It sends one row for each slot.
        received = reference_dispatch_link_bytes(counts, row_bytes)[DispatchMode.ALL_TO_ALL]
        sent = counts.slots_out * row_bytes
        dispatched[DispatchMode.ALL_TO_ALL] = Traffic(link_in=received, link_out=sent, memory=0)
    combined, scores = combine_traffic(counts, row_bytes), both - ids
    return [
        Traffic(link_in=ids, link_out=ids, memory=0),
        *(dispatched[mode] for mode in DispatchMode),
        *(
            replace(combined[mode], link_in=combined[mode].link_in + scores, link_out=combined[mode].link_out + scores)
            for mode in CombineMode
        ),
    ]


def mode_times(
    timings: Sequence[Timing], loads: Sequence[LinkLoad], bandwidth: LinkBandwidth | None
) -> tuple[ModeTime, ...]:
    """The plan and each mode, in the order of a report. Raises ``AboveCeilingError`` if the link cannot be so fast."""
    found = []
    for (kind, mode), way, timing, load in zip(EVERY_MODE, WAYS, timings, loads, strict=True):
        # A clock too coarse for the work measures no rate.
        rate = load.busiest / timing.median if timing.median > 0 else None
        percent = None
        if bandwidth is not None and way is not None and rate is not None:
            ceiling = Ceiling(name=f"the {way} ceiling", bytes_per_second=getattr(bandwidth, way))
            ceiling.share_of(load.under_ceiling, timing.median, f"{kind} {mode}")
            percent = _to_six_digits(100 * rate / ceiling.bytes_per_second)
        found.append(
            ModeTime(
                kind=kind,
                mode=mode,
                spread=Spread.of(timing),
                link_bytes=float(load.busiest),
                gb_per_s=None if rate is None else _to_six_digits(rate / 1e9),
                ceiling=None if bandwidth is None else way,
                percent=percent,
            )
        )
    return tuple(found)


def _to_six_digits(value: float) -> float:
    """Significant ones: a rate of a few bytes is not zero."""
    return float(f"{value:.6g}")
