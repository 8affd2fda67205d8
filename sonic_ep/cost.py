"""What each mode costs over the link, predicted from W, K and E: the rule behind ``"auto"``.

Link rows count remote rows only: a row that stays on its rank crosses no link.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb
from types import MappingProxyType

from sonic_ep.config import CombineMode, DispatchMode, EPConfig, ModePair


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Measured rates of a machine, in bytes/s: copy engine and kernels over the link, and device memory."""

    copy_engine: float
    link_read: float
    link_write: float
    memory: float


# 2×H200: NVLink measured with both directions busy, by copy engine, kernel reads and kernel writes; device memory as a
# copy of a large tensor moves it, reads and writes counted.
H200_NVLINK = Rates(copy_engine=368e9, link_read=333e9, link_write=360e9, memory=4.3e12)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Shape of one call: W ranks, K of E experts a token. Costs are per token, so T and H do not enter."""

    world_size: int
    top_k: int
    num_experts: int

    @property
    def remote_ranks(self) -> int:
        """W - 1."""
        return self.world_size - 1

    @property
    def remote_slots(self) -> float:
        """Expected slots of a token on other ranks, under uniform routing."""
        return self.top_k * self.remote_ranks / self.world_size

    @property
    def remote_pairs(self) -> float:
        """Expected other ranks with at least one slot of a token, under uniform routing without repetition.

        A rank holds none of the K choices with probability C(E - e, K) / C(E, K), the hypergeometric term for zero.
        """
        elsewhere = self.num_experts - self.num_experts // self.world_size
        chosen = min(self.top_k, self.num_experts)
        return self.remote_ranks * (1 - comb(elsewhere, chosen) / comb(self.num_experts, chosen))


def dispatch_seconds_per_byte(load: Workload, rates: Rates) -> Mapping[DispatchMode, float]:
    """Seconds for each byte of a token's row, by mode: link time, then what the experts' gather costs in memory.

    ``all_to_all`` writes expert order behind the link; the other two leave a gather of the K rows a token has.
    """
    gather = 2 * load.top_k / rates.memory
    return MappingProxyType(
        {
            DispatchMode.ALL_TO_ALL: load.remote_pairs / rates.link_read,
            DispatchMode.ALL_GATHER: load.remote_ranks / rates.copy_engine + gather,
            DispatchMode.RANK_DEDUP: load.remote_pairs / rates.link_read + gather,
        }
    )


def combine_seconds_per_byte(load: Workload, rates: Rates) -> Mapping[CombineMode, float]:
    """Seconds for each byte of a token's row, by mode. Sums on the way are hidden behind the link."""
    return MappingProxyType(
        {
            CombineMode.RANK_DEDUP: load.remote_pairs / rates.link_write,
            CombineMode.REDUCE_SCATTER: load.remote_ranks / rates.link_write,
            CombineMode.ALL_TO_ALL: load.remote_slots / rates.link_write,
        }
    )


def choose_modes(config: EPConfig, load: Workload, rates: Rates = H200_NVLINK) -> ModePair:
    """The modes of ``config``, each ``"auto"`` replaced by the one predicted cheapest. The same on every rank."""
    dispatch_cost = dispatch_seconds_per_byte(load, rates)
    combine_cost = combine_seconds_per_byte(load, rates)
    dispatch, combine = config.dispatch, config.combine
    return ModePair(
        dispatch=dispatch if isinstance(dispatch, DispatchMode) else min(dispatch_cost, key=dispatch_cost.__getitem__),
        combine=combine if isinstance(combine, CombineMode) else min(combine_cost, key=combine_cost.__getitem__),
    )
