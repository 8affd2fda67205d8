"""What each mode costs: predicted from W, K and E, the rule behind ``"auto"``, and counted from a plan.

Link rows count remote rows only: a row that stays on its rank crosses no link.

Counted traffic is that of the fast backend. Dispatch pulls: a rank copies its x into a shared buffer and its peers read
there. Combine pushes: the owner of a row reads it, sums where its mode sums, and writes into the home rank's buffer.
Every access to a row counts, also where a cache may answer it. The worked example of ``sonic_ep.plan``, rank 0:

>>> counts = rank_counts(0, capacity=3, tokens=3, pair_tokens=[[2, 2], [2, 2]], pair_slots=[[3, 3], [3, 2]])
>>> dispatch_traffic(counts, row_bytes=1)[DispatchMode.ALL_TO_ALL]
Traffic(link_in=2, link_out=2, memory=16)
>>> combine_traffic(counts, row_bytes=1)[CombineMode.ALL_TO_ALL]
Traffic(link_in=3, link_out=3, memory=15)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True, kw_only=True)
class LinkCeilings:
    """The best rates seen over the link, into one rank and as much out of it at the same time, in bytes/s.

    copy_engine_in, copy_engine_out: copies that the receiver or the sender queues. read: kernels that read a peer's
    memory. write: kernels that write to it.
    """

    copy_engine_in: float
    copy_engine_out: float
    read: float
    write: float


# By which field of ``LinkCeilings`` rows travel: dispatch pulls, combine pushes.
WAY_OF_DISPATCH: Mapping[DispatchMode, str] = MappingProxyType(
    {
        DispatchMode.ALL_GATHER: "copy_engine_in",
        DispatchMode.ALL_TO_ALL: "read",
        DispatchMode.RANK_DEDUP: "read",
    }
)
WAY_OF_COMBINE = "write"

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


@dataclass(frozen=True, kw_only=True)
class RankCounts:
    """The integers that decide the traffic of one rank r; ``rank_counts`` takes them from a plan.

    world_size: W. capacity: C. tokens: T of this rank.
    Slots with an expert: slots_kept are of a token of r and live on r; slots_in of another rank's token, on r;
    slots_out of a token of r, elsewhere.
    Distinct pairs of a token and a rank that holds a slot of it: pairs_kept, pairs_in and pairs_out likewise.
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
        """Valid rows on this rank, ``group_ends[-1]`` of its plan."""
        return self.slots_kept + self.slots_in

    @property
    def packed_rows(self) -> int:
        """P, the tokens of the group with at least one slot on this rank."""
        return self.pairs_kept + self.pairs_in


def rank_counts(
    rank: int,
    *,
    max_tokens: int,
    tokens: int,
    pair_tokens: Sequence[Sequence[int]],
    pair_slots: Sequence[Sequence[int]],
) -> RankCounts:
    """The counts of ``rank`` from those of the group; the same matrices serve every rank.

    tokens: T of this rank, ``plan.num_tokens``.
    pair_tokens[p][q]: tokens of p with a slot on q, ``plan.pair_tokens.tolist()``.
    pair_slots[p][q]: slots of p's tokens on q, ``(plan.owner_of_slot()[p] == q).sum()``.
    """
    return RankCounts(
        world_size=len(pair_tokens),
        max_tokens=max_tokens,
        tokens=tokens,
        slots_kept=pair_slots[rank][rank],
        slots_in=_column_of_others(pair_slots, rank),
        slots_out=_row_of_others(pair_slots, rank),
        pairs_kept=pair_tokens[rank][rank],
        pairs_in=_column_of_others(pair_tokens, rank),
        pairs_out=_row_of_others(pair_tokens, rank),
    )


def _column_of_others(pairs: Sequence[Sequence[int]], rank: int) -> int:
    return sum(row[rank] for source, row in enumerate(pairs) if source != rank)


def _row_of_others(pairs: Sequence[Sequence[int]], rank: int) -> int:
    return sum(count for owner, count in enumerate(pairs[rank]) if owner != rank)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one primitive moves, seen from one rank.

    link_in, link_out: what arrives from other ranks and what leaves for them, whoever issues the access.
    memory: reads and writes of this rank's device memory, those of its peers included.
    """

    link_in: int
    link_out: int
    memory: int


def dispatch_traffic(counts: RankCounts, row_bytes: int) -> Mapping[DispatchMode, Traffic]:
    """Traffic of each dispatch up to what it receives, in bytes; ``row_bytes`` is H * itemsize.

    ``all_gather`` moves whole blocks of C rows. ``all_to_all`` reads a pair once and writes each of its rows,
    ``rank_dedup`` writes it once. ``canonical_gather_bytes`` is what it takes from there to canonical order.
    """
    block = counts.remote_ranks * counts.max_tokens
    pairs = _Rows(kept=counts.pairs_kept, link_in=counts.pairs_in, link_out=counts.pairs_out)
    tokens = _Rows(kept=counts.tokens, link_in=block, link_out=block)
    return MappingProxyType(
        {
            DispatchMode.ALL_GATHER: _pulled(counts, row_bytes, tokens, written=counts.tokens + block),
            DispatchMode.ALL_TO_ALL: _pulled(counts, row_bytes, pairs, written=counts.rows),
            DispatchMode.RANK_DEDUP: _pulled(counts, row_bytes, pairs, written=counts.packed_rows),
        }
    )


def reference_dispatch_link_bytes(counts: RankCounts, row_bytes: int) -> Mapping[DispatchMode, int]:
    """Link bytes into a rank by each dispatch of the reference, whose ``all_to_all`` plainly sends one row a slot."""
    link_in = {mode: traffic.link_in for mode, traffic in dispatch_traffic(counts, row_bytes).items()}
    return MappingProxyType({**link_in, DispatchMode.ALL_TO_ALL: counts.slots_in * row_bytes})


def staging_bytes(counts: RankCounts, row_bytes: int) -> int:
    """Memory bytes of the first half of every dispatch: x is read, and written where peers can read it."""
    return 2 * counts.tokens * row_bytes if counts.remote_ranks else 0


def canonical_gather_bytes(counts: RankCounts, row_bytes: int) -> Mapping[DispatchMode, int]:
    """Memory bytes of a local gather from what each dispatch receives to canonical rows: each is read and written.

    Experts that read through an index instead spare them. ``all_to_all`` writes canonical rows to begin with.
    """
    gather = 2 * counts.rows * row_bytes
    return MappingProxyType(
        {DispatchMode.ALL_GATHER: gather, DispatchMode.ALL_TO_ALL: 0, DispatchMode.RANK_DEDUP: gather}
    )


def combine_traffic(counts: RankCounts, row_bytes: int) -> Mapping[CombineMode, Traffic]:
    """Traffic of each combine from canonical rows to (T, H), in bytes; ``row_bytes`` is H * itemsize.

    A rank sends one row for each remote slot, a partial sum for each of the C tokens that any other rank may have, or
    one for each remote pair. Partial sums travel in the dtype of the rows.
    """
    padded = counts.remote_ranks * counts.max_tokens
    return MappingProxyType(
        {
            CombineMode.ALL_TO_ALL: _pushed(counts, row_bytes, link_in=counts.slots_out, link_out=counts.slots_in),
            CombineMode.REDUCE_SCATTER: _pushed(
                counts, row_bytes, link_in=padded, link_out=padded, unread=padded - counts.remote_ranks * counts.tokens
            ),
            CombineMode.RANK_DEDUP: _pushed(counts, row_bytes, link_in=counts.pairs_out, link_out=counts.pairs_in),
        }
    )


def exchange_link_bytes(*, world_size: int, max_tokens: int, top_k: int, with_scores: bool) -> int:
    """Link bytes into a rank, and as many out of it, for the routing of all ranks: (W-1)*C*K ids, int32.

    ``with_scores``: the fp32 scores of the same slots travel too.
    """
    slot_bytes = 4 + 4 * with_scores
    return (world_size - 1) * max_tokens * top_k * slot_bytes


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows that a dispatch reads: kept from this rank's own tokens, link_in from peers, link_out by peers from here."""

    kept: int
    link_in: int
    link_out: int


def _pulled(counts: RankCounts, row_bytes: int, read: _Rows, *, written: int) -> Traffic:
    """A dispatch: x is staged where peers can read it, peers and this rank read, this rank writes."""
    return Traffic(
        link_in=read.link_in * row_bytes,
        link_out=read.link_out * row_bytes,
        memory=staging_bytes(counts, row_bytes) + (read.kept + read.link_out + written) * row_bytes,
    )


def _pushed(counts: RankCounts, row_bytes: int, *, link_in: int, link_out: int, unread: int = 0) -> Traffic:
    """A combine: this rank reads its rows once, peers write what they send, it reads that and writes its tokens.

    ``unread``: rows that peers write for tokens that do not exist.
    """
    return Traffic(
        link_in=link_in * row_bytes,
        link_out=link_out * row_bytes,
        memory=(counts.rows + 2 * link_in - unread + counts.tokens) * row_bytes,
    )
