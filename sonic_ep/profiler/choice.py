"""From timings to a report: rates under their ceilings, and the pair that is picked."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType

from sonic_ep.config import CombineMode, DispatchMode, EPConfig, ModePair
from sonic_ep.cost import (
    WAY_OF_COMBINE,
    WAY_OF_DISPATCH,
    LinkCeilings,
    RankCounts,
    Workload,
    choose_modes,
    combine_traffic,
    dispatch_traffic,
    exchange_link_bytes,
    reference_dispatch_link_bytes,
)
from sonic_ep.machine import commit
from sonic_ep.profiler.problem import REFERENCE, dtype_of
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


def link_bytes_of(shape: ProfileShape, backend: str, counts: Sequence[RankCounts]) -> list[float]:
    """Bytes into a rank over the link, the mean over the ranks, of the plan and each mode in the order of a report."""
    per_rank = [_link_bytes(shape, backend, of_rank) for of_rank in counts]
    return [sum(of_mode) / len(counts) for of_mode in zip(*per_rank, strict=True)]


def _link_bytes(shape: ProfileShape, backend: str, counts: RankCounts) -> list[int]:
    row_bytes = shape.hidden * dtype_of(shape).itemsize
    exchange = {"world_size": shape.world_size, "capacity": shape.capacity, "top_k": shape.top_k}
    ids, both = (exchange_link_bytes(**exchange, with_scores=scores) for scores in (False, True))
    fast = {mode: traffic.link_in for mode, traffic in dispatch_traffic(counts, row_bytes).items()}
    dispatched = reference_dispatch_link_bytes(counts, row_bytes) if backend == REFERENCE else fast
    combined = combine_traffic(counts, row_bytes)
    scores = both - ids
    return [
        ids,
        *(dispatched[mode] for mode in DispatchMode),
        *(combined[mode].link_in + scores for mode in CombineMode),
    ]


def mode_times(
    timings: Sequence[Timing], link_bytes: Sequence[float], ceilings: LinkCeilings | None
) -> tuple[ModeTime, ...]:
    """The plan and each mode, in the order of a report. Raises ``AboveCeilingError`` if the link cannot be so fast."""
    named = zip(EVERY_MODE, timings, link_bytes, strict=True)
    return tuple(_mode_time(kind, mode, timing, nbytes, ceilings) for (kind, mode), timing, nbytes in named)


def _mode_time(kind: str, mode: str, timing: Timing, nbytes: float, ceilings: LinkCeilings | None) -> ModeTime:
    name = f"{kind} {mode}".strip()
    way = None if ceilings is None else WAYS[name]
    percent = None
    if way is not None:
        ceiling = Ceiling(name=f"the {way} ceiling", bytes_per_second=getattr(ceilings, way))
        percent = round(100 * ceiling.share_of(nbytes, timing.median, name), 2)
    return ModeTime(
        kind=kind,
        mode=mode,
        spread=Spread.of(timing),
        link_bytes=nbytes,
        gb_per_s=round(nbytes / timing.median / 1e9, 6) if timing.median > 0 else None,
        ceiling=way,
        percent=percent,
    )


def origin_now(process_group: str | None) -> Origin:
    """Where and when this is."""
    program = Path(sys.argv[0]).name if sys.argv else ""
    return Origin(
        process_group=process_group,
        commit=commit(),
        command=shlex.join([program, *sys.argv[1:]]),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
