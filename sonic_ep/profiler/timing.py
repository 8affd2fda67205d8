"""How long collective work takes: all ranks enter a round together, and its slowest rank counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sonic_ep.distributed.group import EPGroup

# Two measurements of one link differ by about a percent.
MOST_ABOVE_CEILING = 1.02
# Longer than the host takes to launch a plan, a dispatch and a combine.
BUSY_SECONDS = 3e-3
# An upper bound of a GPU's clock: a spin that is too long does no harm.
CYCLES_PER_SECOND = 2e9
WARMUP, WARMUP_OF_CAPTURE = 5, 3
QUANTILES = (("median_us", 0.5), ("p10_us", 0.1), ("p90_us", 0.9), ("min_us", 0.0), ("max_us", 1.0))


class AboveCeilingError(AssertionError):
    """A measured rate is above the ceiling that was measured in the same run: one of the two is wrong."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of each round, those of its slowest rank."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return self.quantile(0.5)

    def quantile(self, share: float) -> float:
        """Seconds that ``share`` of the rounds did not exceed, interpolated."""
        return float(np.quantile(self.rounds, share))

    def as_json(self, digits: int = 2) -> dict[str, Any]:
        """The number of rounds, and quantiles over them in microseconds.

        >>> Timing(rounds=(1e-6, 3e-6)).as_json()
        {'rounds': 2, 'median_us': 2.0, 'p10_us': 1.2, 'p90_us': 2.8, 'min_us': 1.0, 'max_us': 3.0}
        """
        micros = {name: round(self.quantile(share) * 1e6, digits) for name, share in QUANTILES}
        return {"rounds": len(self.rounds), **micros}


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The highest rate measured over the link for one kind of transfer, in bytes/s."""

    name: str
    bytes_per_second: float

    def share_of(self, nbytes: float, seconds: float, work: str) -> float:
        """``nbytes`` in ``seconds`` as a share of the ceiling. Raises ``AboveCeilingError`` if it is more."""
        rate = nbytes / seconds
        share = rate / self.bytes_per_second
        if share > MOST_ABOVE_CEILING:
            raise AboveCeilingError(
                f"{work}: got {rate / 1e9:.1f} GB/s, expected at most {MOST_ABOVE_CEILING:g} times the ceiling of "
                f"{self.bytes_per_second / 1e9:.1f} GB/s ({self.name}) that was measured in the same run"
            )
        return share


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundTimer:
    """Times collective work of ``group`` on ``device``. Methods are collective and return the same on every rank.

    barrier: synchronizes all ranks before each round, untimed. On a GPU it is queued on the current stream: the host
        waits for nothing between rounds, and events measure the time.
    ahead: keep the GPU busy for ``busy_seconds`` first, so that launches on the host are not measured.
    """

    group: EPGroup
    device: torch.device
    barrier: Callable[[], object]
    ahead: bool = True
    busy_seconds: float = BUSY_SECONDS

    def time(self, functions: Sequence[Callable[[], object]], *, rounds: int, warmup: int = 0) -> list[Timing]:
        """``rounds`` rounds of each function after ``warmup`` more; they alternate, because warm GPUs get slower."""
        if rounds < 1:
            raise ValueError(f"{self.group}: rounds: got {rounds}, expected at least 1")
        if not functions:
            return []
        for function in [*functions] * warmup:
            self.enter()
            function()
        clock = self._seconds_on_stream if self.device.type == "cuda" else self._seconds_on_host
        seconds = clock([*functions] * rounds)
        if self.group.world_size > 1:
            seconds_N = torch.tensor(seconds, dtype=torch.float64, device=self.group.device_for(self.device))
            dist.all_reduce(seconds_N, dist.ReduceOp.MAX, group=self.group.process_group)
            seconds = seconds_N.tolist()
        return [Timing(rounds=tuple(seconds[place :: len(functions)])) for place in range(len(functions))]

    def median(self, function: Callable[[], object], rounds: int) -> float:
        """The median in seconds, after a few rounds of warm-up."""
        (timing,) = self.time([function], rounds=rounds, warmup=min(WARMUP, rounds))
        return timing.median

    def enter(self) -> None:
        """Begin a round on all ranks together."""
        if self.ahead:
            keep_busy(self.device, self.busy_seconds)
        self.barrier()

    def _seconds_on_stream(self, functions: Sequence[Callable[[], object]]) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in functions]
        with torch.cuda.device(self.device):
            for function, (begin, end) in zip(functions, events, strict=True):
                self.enter()
                begin.record()
                function()
                end.record()
            torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]

    def _seconds_on_host(self, functions: Sequence[Callable[[], object]]) -> list[float]:
        seconds = []
        for function in functions:
            self.enter()
            begin = perf_counter()
            function()
            seconds.append(perf_counter() - begin)
        return seconds


def keep_busy(device: torch.device, seconds: float = BUSY_SECONDS) -> None:
    """Queue a spin on the GPU, so that the host gets ahead and what follows runs without gaps. Nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))


@dataclass(frozen=True, kw_only=True, eq=False)
class CapturedCall:
    """A CUDA graph of a function; a call replays it and returns the result, which every replay overwrites."""

    graph: torch.cuda.CUDAGraph
    result: Any
    # Held because the graph reads the memory of the tensors that the function holds.
    function: Callable[[], Any]

    def __call__(self) -> Any:
        """Replay on the current stream."""
        self.graph.replay()
        return self.result


def captured(function: Callable[[], Any], device: torch.device) -> CapturedCall:
    """``function`` in a CUDA graph, after ``WARMUP_OF_CAPTURE`` calls."""
    current = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARMUP_OF_CAPTURE):
            function()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads, NCCL's watchdog for one, may query the driver meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    return CapturedCall(graph=graph, result=result, function=function)
