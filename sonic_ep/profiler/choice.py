"""From timings to a report: rates under their ceilings, and the pair that is picked."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType

from sonic_ep.config import CombineMode, DispatchMode, EPConfig, ModePair
from sonic_ep.cost import (
    WAY_OF_COMBINE,
    WAY_OF_DISPATCH,
    LinkCeilings,
    RankCounts,
    Traffic,
    Workload,
    choose_modes,
    combine_traffic,
    dispatch_traffic,
    exchange_link_bytes,
    reference_dispatch_link_bytes,
)
from sonic_ep.machine import commit
from sonic_ep.profiler.problem import REFERENCE, dtype_of
from sonic_ep.profiler.report import ProfileReport
from sonic_ep.profiler.times import (
    COMBINE,
    DISPATCH,
    EVERY_MODE,
    PLAN,
    ModeTime,
    Origin,
    PairTime,
    ProfileShape,
    Spread,
)
from sonic_ep.testing.timing import Ceiling, Timing

# Ranks whose traffic differs by no more are taken for equally busy.
BALANCED = 1.1
# Two pairs closer than this are taken for equally fast.
TIE = 0.01
WAYS: Mapping[str, str | None] = MappingProxyType(
    {
        PLAN: None,
        **{f"{DISPATCH} {mode.value}": way for mode, way in WAY_OF_DISPATCH.items()},
        **{f"{COMBINE} {mode.value}": WAY_OF_COMBINE for mode in CombineMode},
    }
)


def pick(pairs: Sequence[PairTime], config: EPConfig, load: Workload) -> ModePair:
    """The fastest of ``pairs`` that keeps the modes which ``config`` fixes.

    Of those within ``TIE`` of the fastest, the one that ``sonic_ep.cost`` predicts, or else the first.
    """
    kept = [pair for pair in pairs if _keeps(config, pair)]
    best = min(pair.spread.median_us for pair in kept)
    tied = [pair for pair in kept if pair.spread.median_us <= best * (1 + TIE)]
    modes = [ModePair(dispatch=pair.dispatch, combine=pair.combine) for pair in tied]
    predicted = choose_modes(config, load)
    return predicted if predicted in modes else modes[0]


def _keeps(config: EPConfig, pair: PairTime) -> bool:
    fixed = ((config.dispatch, DispatchMode, pair.dispatch), (config.combine, CombineMode, pair.combine))
    return all(mode == measured for mode, modes, measured in fixed if isinstance(mode, modes))


def config_of(pairs: Sequence[PairTime], config: EPConfig, shape: ProfileShape) -> EPConfig:
    """``config`` with the pair that is picked."""
    load = Workload(world_size=shape.world_size, top_k=shape.top_k, num_experts=shape.num_experts)
    picked = pick(pairs, config, load)
    return replace(config, dispatch=picked.dispatch, combine=picked.combine)


def require_answer(report: ProfileReport, *, shape: ProfileShape, backend: str, config: EPConfig) -> None:
    """Raise ``ValueError`` unless ``report`` is what a profile of ``shape`` by ``backend`` and ``config`` may find."""
    found = report.config
    open_modes = {
        name: getattr(found, name)
        for name, modes in (("dispatch", DispatchMode), ("combine", CombineMode))
        if not isinstance(getattr(config, name), modes)
    }
    asked = {"shape": shape, "backend": backend, "config": replace(config, **open_modes)}
    for name, expected in asked.items():
        got = getattr(report, name)
        if got != expected:
            raise ValueError(f"{name}: got a profile of {got}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class LinkLoad:
    """Bytes that one work brings over the link into each rank, and out of it."""

    into: tuple[int, ...]
    out_of: tuple[int, ...]

    @property
    def busiest(self) -> int:
        """Into the rank that most comes to."""
        return max(self.into)

    @property
    def balanced(self) -> bool:
        """All ranks are about equally busy, in both directions."""
        both = (*self.into, *self.out_of)
        return max(both) <= BALANCED * min(both)

    @property
    def under_ceiling(self) -> float:
        """What has to stay under a ceiling that was measured with both directions of every rank busy.

        Traffic in one direction may be faster than that; the mean over the ranks may not.
        """
        return self.busiest if self.balanced else sum(self.into) / len(self.into)


def link_loads(shape: ProfileShape, backend: str, counts: Sequence[RankCounts]) -> list[LinkLoad]:
    """What the plan and each mode bring over the link, in the order of a report."""
    per_rank = [_traffic(shape, backend, of_rank) for of_rank in counts]
    return [
        LinkLoad(into=tuple(t.link_in for t in of_mode), out_of=tuple(t.link_out for t in of_mode))
        for of_mode in zip(*per_rank, strict=True)
    ]


def _traffic(shape: ProfileShape, backend: str, counts: RankCounts) -> list[Traffic]:
    """Of one rank; memory is not counted."""
    row_bytes = shape.hidden * dtype_of(shape).itemsize
    exchange = {"world_size": shape.world_size, "max_tokens": shape.max_tokens, "top_k": shape.top_k}
    ids, both = (exchange_link_bytes(**exchange, with_scores=scores) for scores in (False, True))
    dispatched = dict(dispatch_traffic(counts, row_bytes))
    if backend == REFERENCE:
        # It plainly sends one row a slot.
        sent = counts.slots_out * row_bytes
        received = reference_dispatch_link_bytes(counts, row_bytes)[DispatchMode.ALL_TO_ALL]
        dispatched[DispatchMode.ALL_TO_ALL] = Traffic(link_in=received, link_out=sent, memory=0)
    combined = combine_traffic(counts, row_bytes)
    return [
        Traffic(link_in=ids, link_out=ids, memory=0),
        *(dispatched[mode] for mode in DispatchMode),
        *(_with(combined[mode], both - ids) for mode in CombineMode),
    ]


def _with(traffic: Traffic, nbytes: int) -> Traffic:
    """``nbytes`` more in each direction."""
    return replace(traffic, link_in=traffic.link_in + nbytes, link_out=traffic.link_out + nbytes)


def mode_times(
    timings: Sequence[Timing], loads: Sequence[LinkLoad], ceilings: LinkCeilings | None
) -> tuple[ModeTime, ...]:
    """The plan and each mode, in the order of a report. Raises ``AboveCeilingError`` if the link cannot be so fast."""
    named = zip(EVERY_MODE, timings, loads, strict=True)
    return tuple(_mode_time(kind, mode, timing, load, ceilings) for (kind, mode), timing, load in named)


def _mode_time(kind: str, mode: str, timing: Timing, load: LinkLoad, ceilings: LinkCeilings | None) -> ModeTime:
    name = f"{kind} {mode}".strip()
    way = None if ceilings is None else WAYS[name]
    # A clock too coarse for the work tells no rate.
    rate = load.busiest / timing.median if timing.median > 0 else None
    percent = None
    if way is not None and rate is not None:
        ceiling = Ceiling(name=f"the {way} ceiling", bytes_per_second=getattr(ceilings, way))
        ceiling.share_of(load.under_ceiling, timing.median, name)
        percent = _to_six_digits(100 * rate / ceiling.bytes_per_second)
    return ModeTime(
        kind=kind,
        mode=mode,
        spread=Spread.of(timing),
        link_bytes=float(load.busiest),
        gb_per_s=None if rate is None else _to_six_digits(rate / 1e9),
        ceiling=way,
        percent=percent,
    )


def _to_six_digits(value: float) -> float:
    """A rate of a few bytes is not zero: 0.0000254321 stays 2.54321e-05."""
    return float(f"{value:.6g}")


def origin_now(process_group: str | None) -> Origin:
    """Where and when this is."""
    program = Path(sys.argv[0]).name if sys.argv else ""
    return Origin(
        process_group=process_group,
        commit=commit(),
        command=shlex.join([program, *sys.argv[1:]]),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
