"""What each mode costs: predicted from W, K and E for the rule behind ``"auto"``, and counted from a plan.

Only rows that leave their rank count as link traffic. Counted traffic is that of the fast backend: dispatch pulls from
the x that each rank stages, combine pushes to the token's rank. Every access counts, even if a cache serves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import TypeVar

from sonic_ep.config import CombineMode, DispatchMode, EPConfig, ModePair

Matrix = Sequence[Sequence[int]]
ModeT = TypeVar("ModeT", DispatchMode, CombineMode)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of a machine in bytes/s: copy engine and kernels over the link, and device memory."""

    copy_engine: float
    link_read: float
    link_write: float
    memory: float


@dataclass(frozen=True, kw_only=True)
class LinkBandwidth:
    """The highest rates measured over the link in bytes/s, both directions busy.

    Copies queued by the receiver (in) or the sender (out), and kernels that read or write a peer's memory.
    """

    copy_engine_in: float
    copy_engine_out: float
    read: float
    write: float


# The field of ``LinkBandwidth`` that bounds each mode.
WAY_OF_DISPATCH: Mapping[DispatchMode, str] = {
    DispatchMode.ALL_GATHER: "copy_engine_in",
    DispatchMode.ALL_TO_ALL: "read",
    DispatchMode.RANK_DEDUP: "read",
}
WAY_OF_COMBINE = "write"

# Measured on 2×H200, both directions busy; memory: reads and writes of a large copy.
H200_NVLINK = Rates(copy_engine=368e9, link_read=333e9, link_write=360e9, memory=4.3e12)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """W ranks, K of E experts a token. Costs are per token, so T and H do not enter."""

    world_size: int
    top_k: int
    num_experts: int

    @property
    def remote_ranks(self) -> int:
        """W - 1."""
        return self.world_size - 1

    @property
    def remote_slots(self) -> float:
        """Expected slots of a token on other ranks, for uniform routing."""
        return self.top_k * self.remote_ranks / self.world_size

    @property
    def remote_pairs(self) -> float:
        """Expected other ranks with at least one slot of a token, for uniform routing to distinct experts.

        A rank has none of the K choices with probability C(E - e, K) / C(E, K) (hypergeometric).
        """
        elsewhere = self.num_experts - self.num_experts // self.world_size
        chosen = min(self.top_k, self.num_experts)
        return self.remote_ranks * (1 - comb(elsewhere, chosen) / comb(self.num_experts, chosen))


def dispatch_seconds_per_byte(load: Workload, rates: Rates) -> Mapping[DispatchMode, float]:
    """Seconds per byte of a token's row: over the link, then in the experts' gather, which ``all_to_all`` spares."""
    gather = 2 * load.top_k / rates.memory
    return {
        DispatchMode.ALL_TO_ALL: load.remote_pairs / rates.link_read,
        DispatchMode.ALL_GATHER: load.remote_ranks / rates.copy_engine + gather,
        DispatchMode.RANK_DEDUP: load.remote_pairs / rates.link_read + gather,
    }


def combine_seconds_per_byte(load: Workload, rates: Rates) -> Mapping[CombineMode, float]:
    """Seconds per byte of a token's row over the link, behind which the sums are hidden."""
    return {
        CombineMode.RANK_DEDUP: load.remote_pairs / rates.link_write,
        CombineMode.REDUCE_SCATTER: load.remote_ranks / rates.link_write,
        CombineMode.ALL_TO_ALL: load.remote_slots / rates.link_write,
    }


def choose_modes(config: EPConfig, load: Workload, rates: Rates = H200_NVLINK) -> ModePair:
    """The modes of ``config``, with ``"auto"`` replaced by the mode predicted cheapest. The same on every rank."""
    dispatch, combine = config.dispatch, config.combine
    if not isinstance(dispatch, DispatchMode):
        dispatch = _cheapest(dispatch_seconds_per_byte(load, rates))
    if not isinstance(combine, CombineMode):
        combine = _cheapest(combine_seconds_per_byte(load, rates))
    return ModePair(dispatch=dispatch, combine=combine)


def _cheapest(costs: Mapping[ModeT, float]) -> ModeT:
    return min(costs, key=costs.__getitem__)


@dataclass(frozen=True, kw_only=True)
class RankCounts:
    """The integers that decide the traffic of one rank r.

    Slots: of r's tokens on r (slots_kept), of other ranks' tokens on r (slots_in), of r's tokens elsewhere (slots_out).
    Distinct pairs of a token and a rank with a slot of it: pairs_kept, pairs_in, pairs_out likewise.
    """

    world_size: int
    max_tokens: int
    tokens: int
    slots_kept: int
    slots_in: int
    slots_out: int
    pairs_kept: int
    pairs_in: int
    pairs_out: int

    @property
    def remote_ranks(self) -> int:
        """W - 1."""
        return self.world_size - 1

    @property
    def rows(self) -> int:
        """Valid rows on this rank, ``group_ends[-1]``."""
        return self.slots_kept + self.slots_in

    @property
    def packed_rows(self) -> int:
        """P."""
        return self.pairs_kept + self.pairs_in


def rank_counts(rank: int, *, max_tokens: int, tokens: int, pair_tokens: Matrix, pair_slots: Matrix) -> RankCounts:
    """The counts of ``rank``. pair_tokens[p][q], pair_slots[p][q]: p's tokens with slots on q, and those slots."""
    slots, pairs = pair_slots[rank][rank], pair_tokens[rank][rank]
    return RankCounts(
        world_size=len(pair_tokens),
        max_tokens=max_tokens,
        tokens=tokens,
        slots_kept=slots,
        slots_in=sum(row[rank] for row in pair_slots) - slots,
        slots_out=sum(pair_slots[rank]) - slots,
        pairs_kept=pairs,
        pairs_in=sum(row[rank] for row in pair_tokens) - pairs,
        pairs_out=sum(pair_tokens[rank]) - pairs,
    )


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one primitive moves over the link and in memory of one rank, whichever rank issues the access."""

    link_in: int
    link_out: int
    memory: int


def dispatch_traffic(counts: RankCounts, row_bytes: int) -> Mapping[DispatchMode, Traffic]:
    """Bytes that each dispatch moves to receive its rows; ``row_bytes`` is H * itemsize.

    ``all_gather`` moves blocks of C rows. ``all_to_all`` reads each pair once and writes each of its rows,
    ``rank_dedup`` writes it once. Then see ``canonical_gather_bytes``.
    """
    block, staged = counts.remote_ranks * counts.max_tokens, staging_bytes(counts, 1)
    # Rows of this rank that it and its peers read.
    read = counts.pairs_kept + counts.pairs_out
    moved = {
        DispatchMode.ALL_GATHER: (block, block, staged + 2 * (counts.tokens + block)),
        DispatchMode.ALL_TO_ALL: (counts.pairs_in, counts.pairs_out, staged + read + counts.rows),
        DispatchMode.RANK_DEDUP: (counts.pairs_in, counts.pairs_out, staged + read + counts.packed_rows),
    }
    return _in_bytes(moved, row_bytes)


def staging_bytes(counts: RankCounts, row_bytes: int) -> int:
    """Memory bytes of the first half of every dispatch: x is copied to where peers can read it."""
    return 2 * counts.tokens * row_bytes if counts.remote_ranks else 0


def canonical_gather_bytes(counts: RankCounts, row_bytes: int) -> Mapping[DispatchMode, int]:
    """Memory bytes of a gather from the received rows to canonical order, unless experts read through an index."""
    gather = 2 * counts.rows * row_bytes
    return {DispatchMode.ALL_GATHER: gather, DispatchMode.ALL_TO_ALL: 0, DispatchMode.RANK_DEDUP: gather}


def combine_traffic(counts: RankCounts, row_bytes: int) -> Mapping[CombineMode, Traffic]:
    """Bytes that each combine moves from canonical rows to (T, H); ``row_bytes`` is H * itemsize.

    A rank sends one row for each remote slot, one partial sum for each of C tokens of every other rank, or one for each
    remote pair. Partial sums have the dtype of the rows.
    """
    padded, summed = counts.remote_ranks * counts.max_tokens, counts.remote_ranks * counts.tokens
    # Rows that experts wrote, and tokens.
    ends = counts.rows + counts.tokens
    moved = {
        CombineMode.ALL_TO_ALL: (counts.slots_out, counts.slots_in, ends + 2 * counts.slots_out),
        # Padding arrives, too, and is not read.
        CombineMode.REDUCE_SCATTER: (padded, padded, ends + padded + summed),
        CombineMode.RANK_DEDUP: (counts.pairs_out, counts.pairs_in, ends + 2 * counts.pairs_out),
    }
    return _in_bytes(moved, row_bytes)


def _in_bytes(moved: Mapping[ModeT, tuple[int, int, int]], row_bytes: int) -> Mapping[ModeT, Traffic]:
    """moved: rows into a rank, out of it, and read or written in its memory."""
    bytes_of = {mode: [rows * row_bytes for rows in each] for mode, each in moved.items()}
    return {mode: Traffic(link_in=into, link_out=out, memory=own) for mode, (into, out, own) in bytes_of.items()}


def exchange_link_bytes(*, world_size: int, max_tokens: int, top_k: int, with_scores: bool) -> int:
    """Link bytes into a rank, and out of it, for the routing of all ranks: (W-1)*C*K ids (int32) and scores (fp32)."""
    return (world_size - 1) * max_tokens * top_k * (4 + 4 * with_scores)
