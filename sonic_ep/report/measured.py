"""What documents of several kinds hold: times, shapes, settings and profiles; microseconds, GB/s, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sonic_ep.config import ModePair

BYTES_OF: Mapping[str, int] = MappingProxyType({"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2})
UNIFORM = "uniform"
FAST = "fast"
FORWARD, FORWARD_AND_BACKWARD = "forward, training", "forward and backward"
LAYER, GEMMS = "layer", "grouped GEMMs"


@dataclass(frozen=True, kw_only=True)
class Times:
    """Quantiles over rounds, each the slowest rank's time."""

    rounds: int
    median_us: float
    p10_us: float
    p90_us: float
    min_us: float
    max_us: float

    @property
    def spread_percent(self) -> float:
        """p90 - p10, in percent of the median."""
        return 100 * (self.p90_us - self.p10_us) / self.median_us


@dataclass(frozen=True, kw_only=True)
class Shape:
    """tokens: T of each rank. intermediate: None where there are no experts."""

    tokens: int
    hidden: int
    intermediate: int | None
    num_experts: int
    top_k: int
    dtype: str

    @property
    def rank_bytes(self) -> int:
        """Bytes of one rank's x, T*H elements."""
        return self.tokens * self.hidden * BYTES_OF[self.dtype]

    def __str__(self) -> str:
        wide = "" if self.intermediate is None else f", I={self.intermediate}"
        sizes = f"T={self.tokens}, H={self.hidden}{wide}, E={self.num_experts}, K={self.top_k}"
        return f"{sizes}, {self.dtype}"


@dataclass(frozen=True, kw_only=True)
class ProfileShape:
    """tokens: T of each rank, in the order of the ranks."""

    tokens: tuple[int, ...]
    hidden: int
    top_k: int
    num_experts: int
    dtype: str
    routing: str

    def __str__(self) -> str:
        tokens = str(self.tokens[0]) if len(set(self.tokens)) == 1 else "/".join(map(str, self.tokens))
        return (
            f"T={tokens}, H={self.hidden}, E={self.num_experts}, K={self.top_k}, {self.dtype}, {self.routing} routing"
        )


@dataclass(frozen=True, kw_only=True)
class ModeTimes:
    """One mode alone. kind: plan, dispatch or combine; mode: empty for the plan.

    link_bytes: over the link into the busiest rank; gb_per_s: of them at the median.
    """

    kind: str
    mode: str
    times: Times
    link_bytes: float
    gb_per_s: float | None
    ceiling: str | None
    percent: float | None


@dataclass(frozen=True, kw_only=True)
class PairTimes:
    """Both modes together; ``what``: what was timed, a pass of the layer or the path from ids to combined rows."""

    pair: ModePair
    what: str
    times: Times


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Modes, which may be "auto", and flags."""

    dispatch: str
    combine: str
    redispatch_x_in_backward: bool
    cpu_sync_on_runtime: bool
    max_rows: int | None

    def __str__(self) -> str:
        return self._words("redispatch_x_in_backward", "cpu_sync_on_runtime")

    @property
    def short(self) -> str:
        """As the suites call them."""
        return self._words("redispatch", "cpu_sync")

    def _words(self, redispatch: str, cpu_sync: str) -> str:
        flags = [
            *([redispatch] if self.redispatch_x_in_backward else []),
            *([cpu_sync] if self.cpu_sync_on_runtime else []),
            *([] if self.max_rows is None else [f"max_rows={self.max_rows}"]),
        ]
        return ", ".join([f"{self.dispatch} + {self.combine}", *flags])


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What the profiler measured and chose."""

    shape: ProfileShape
    backend: str
    ranks_per_gpu: int | None
    modes: tuple[ModeTimes, ...]
    pairs: tuple[PairTimes, ...]
    settings: Settings


def pair_name(pair: ModePair) -> str:
    """Both modes in words.

    >>> from sonic_ep.config import CombineMode, DispatchMode
    >>> pair_name(ModePair(dispatch=DispatchMode.ALL_TO_ALL, combine=CombineMode.RANK_DEDUP))
    'all_to_all + rank_dedup'
    """
    return f"{pair.dispatch.value} + {pair.combine.value}"
