"""How long collective work takes: every round entered together, its slowest rank counted, the median over rounds.

A rank that times itself alone measures how long it waited for the others. So all ranks meet before each round, outside
of what is timed, and a round took as long as it took the slowest of them. Bytes over that time are a rate, and a rate
above what the link was seen to carry is an error of the measurement, never a success.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from sonic_ep.distributed.group import EPGroup

# Two measurements of one link differ by about a percent.
MOST_ABOVE_CEILING = 1.02
# What `keep_busy` holds a GPU for: a plan, a dispatch and a combine are launched in less.
BUSY_SECONDS = 3e-3
# Cycles that a GPU spins for a second of it. An upper end of its clocks: too long does no harm.
CYCLES_PER_SECOND = 2e9
WARMUP_OF_CAPTURE = 3
QUANTILES = (("median_us", 0.5), ("p10_us", 0.1), ("p90_us", 0.9), ("min_us", 0.0), ("max_us", 1.0))


class AboveCeilingError(AssertionError):
    """A measured rate is above the ceiling that was measured in the same run: one of the two is wrong."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of each round, those of its slowest rank."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of the round in the middle, or the mean of the two there."""
        return self.quantile(0.5)

    def quantile(self, share: float) -> float:
        """Seconds that ``share`` of the rounds did not take longer than, between two rounds in proportion.

        >>> Timing(rounds=(4.0, 1.0, 2.0)).quantile(0.25)
        1.5
        """
        ordered = sorted(self.rounds)
        place = share * (len(ordered) - 1)
        below = min(int(place), len(ordered) - 1)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    def as_json(self, digits: int = 2) -> dict[str, float]:
        """The number of rounds, and quantiles over them in microseconds.

        >>> Timing(rounds=(1e-6, 3e-6)).as_json()
        {'rounds': 2, 'median_us': 2.0, 'p10_us': 1.2, 'p90_us': 2.8, 'min_us': 1.0, 'max_us': 3.0}
        """
        micros = {name: round(self.quantile(share) * 1e6, digits) for name, share in QUANTILES}
        return {"rounds": len(self.rounds), **micros}


def slowest_rank(seconds_WN: Sequence[Sequence[float]]) -> Timing:
    """The timing of N rounds from what each of W ranks measured.

    >>> slowest_rank([[1.0, 5.0], [2.0, 3.0]])
    Timing(rounds=(2.0, 5.0))
    """
    return Timing(rounds=tuple(max(of_ranks) for of_ranks in zip(*seconds_WN, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The most that a link was seen to carry in one way, in bytes/s."""

    name: str
    bytes_per_second: float

    def share_of(self, nbytes: float, seconds: float, work: str) -> float:
        """How much of the ceiling ``work`` reached that brought a rank ``nbytes`` over the link, 1.0 for all of it.

        Raises ``AboveCeilingError`` if that is more than the link can carry.
        """
        rate = nbytes / seconds
        share = rate / self.bytes_per_second
        if share > MOST_ABOVE_CEILING:
            raise AboveCeilingError(
                f"{work}: got {rate / 1e9:.1f} GB/s, expected at most {MOST_ABOVE_CEILING:g} times the ceiling of "
                f"{self.bytes_per_second / 1e9:.1f} GB/s ({self.name}) that was measured in the same run"
            )
        return share


def measure(
    function: Callable[[], object],
    *,
    rounds: int,
    warmup: int,
    device: torch.device,
    group: EPGroup,
    enter: Callable[[], object],
) -> Timing:
    """Collective: what ``function`` takes, over ``rounds`` rounds after ``warmup`` more. The same on every rank.

    enter: the meeting of all ranks before each round, which is not timed. On a GPU it should be queued on the current
        stream like all else: then the host waits for nothing between the rounds, and events on the stream tell the
        time. On the CPU the processor's clock does.

    Buffers are not rotated: rounds of some 100 MB push each other out of the cache, and where less is moved a cache
    that is warm is what a caller finds as well.
    """
    if rounds < 1:
        raise ValueError(f"{group}: rounds: got {rounds}, expected at least 1")
    for _ in range(warmup):
        enter()
        function()
    clock = _seconds_on_stream if device.type == "cuda" else _seconds_on_host
    return slowest_rank(_gathered(clock(function, rounds, enter, device), group, device))


def measure_in_turn(
    functions: Sequence[Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    device: torch.device,
    group: EPGroup,
    enter: Callable[[], object],
) -> list[Timing]:
    """Collective: ``measure`` of each function, taking turns round by round, ``rounds`` of each.

    GPUs get slower as they get warm: what is to be compared takes turns.
    """
    if not functions:
        return []
    turns, several = cycle(functions), len(functions)
    timing = measure(
        lambda: next(turns)(),
        rounds=rounds * several,
        warmup=warmup * several,
        device=device,
        group=group,
        enter=enter,
    )
    return [Timing(rounds=timing.rounds[call_lock::several]) for call_lock in range(several)]


def keep_busy(device: torch.device, seconds: float = BUSY_SECONDS) -> None:
    """Queue a spin on the GPU, so that the host gets ahead and what it queues next runs without a gap.

    Before a round it keeps the host's launches out of what is measured. Nothing on the CPU.
    """
    if device.type == "cuda":
        torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))


@dataclass(frozen=True, kw_only=True, eq=False)
class Captured:
    """A function in a CUDA graph. A call replays it; ``result`` is what it returned, written anew by each replay."""

    graph: torch.cuda.CUDAGraph
    result: Any

    def __call__(self) -> Any:
        """Replay, and return ``result``."""
        self.graph.replay()
        return self.result


def captured(function: Callable[[], Any], device: torch.device) -> Captured:
    """``function`` in a CUDA graph, after a few calls on a side stream. All ranks capture collective work together."""
    current = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARMUP_OF_CAPTURE):
            function()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads, NCCL's watchdog for one, may ask the driver questions meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    return Captured(graph=graph, result=result)


def _seconds_on_stream(
    function: Callable[[], object], rounds: int, enter: Callable[[], object], device: torch.device
) -> list[float]:
    begins, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(rounds)] for _ in range(2))
    with torch.cuda.device(device):
        for begin, end in zip(begins, ends, strict=True):
            enter()
            begin.record()
            function()
            end.record()
        torch.cuda.synchronize(device)
    milliseconds = [begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True)]
    return [each / 1e3 for each in milliseconds]


def _seconds_on_host(
    function: Callable[[], object], rounds: int, enter: Callable[[], object], device: torch.device
) -> list[float]:
    seconds = []
    for _ in range(rounds):
        enter()
        begin = perf_counter()
        function()
        seconds.append(perf_counter() - begin)
    return seconds


def _gathered(mine: list[float], group: EPGroup, device: torch.device) -> list[list[float]]:
    """``mine`` of every rank, in rank order."""
    if group.world_size == 1:
        return [mine]
    seconds_N = torch.tensor(mine, dtype=torch.float64, device=group.device_for(device))
    seconds_WN = [torch.empty_like(seconds_N) for _ in range(group.world_size)]
    dist.all_gather(seconds_WN, seconds_N, group=group.process_group)
    return [of_rank.tolist() for of_rank in seconds_WN]
