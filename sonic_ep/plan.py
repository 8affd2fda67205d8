"""The routing plan: the one metadata format that both backends share.

Letters, used as suffixes of host tensors everywhere in this project:

====  ==============================================================================================
W, r  ranks in the expert-parallel (EP) group, and one of them; the group may be any part of the world
T     tokens on this rank; differs from rank to rank, may be 0
C     token capacity: one number for the whole group, T <= C on every rank
K     experts per token
E, e  experts, and experts per rank (E // W); expert j lives on rank j // e
H, I  hidden size, and intermediate size of an expert
f     slot (r*C + t)*K + k: choice k of token t of rank r
R     rows that a rank has room for; the first group_ends[-1] of them are valid
P     rows of a packed buffer: tokens of the group that have at least one slot on this rank
====  ==============================================================================================

**Canonical row order**: the valid rows of a rank are sorted by expert, then source rank, then token, then k. So
dispatch is a pure permutation, and combine has one order of summation.

Worked example (W=2, E=4, T=C=3 on both ranks, K=2; experts 0 and 1 live on rank 0, experts 2 and 3 on rank 1)::

    expert_ids      rank 0: [[ 0, 2], [ 1, 0], [ 3, 2]]     rank 1: [[ 2, 1], [-1, 3], [ 0, 0]]
    slots f         rank 0: [[ 0, 1], [ 2, 3], [ 4, 5]]     rank 1: [[ 6, 7], [ 8, 9], [10,11]]

Token 1 of rank 1 dropped its first slot; token 2 of rank 1 chose expert 0 twice. The stable sort of the slots by
expert is 0 3 10 11 | 2 7 | 1 5 6 | 4 9; the first six rows belong to rank 0 and the last five to rank 1::

    counts          [4, 2, 3, 2]
    row_of_slot     rank 0: [[ 0, 0], [ 4, 1], [ 3, 1]]     rank 1: [[ 2, 5], [-1, 4], [ 2, 3]]
    pair_tokens     [[2, 2], [2, 2]]

    on rank 0:      group_ends [4, 6]   slot_of_row [0, 3, 10, 11, 2, 7]
                    packed_of_token [[0, 1, -1], [2, -1, 3]]
    on rank 1:      group_ends [3, 5]   slot_of_row [1, 5, 6, 4, 9]
                    packed_of_token [[0, -1, 1], [2, 3, -1]]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sonic_ep.compat import is_zero_without_memory
from sonic_ep.config import EPConfig, is_count
from sonic_ep.errors import PlanError, RecomputeError, RowOverflowError

# Slots and rows are int32. The margin is room for kernels that count past the last one: the stride of a grid over rows,
# the rest of a block or tile (at most 2 * 65536 slots), the lag of a combine (1024 tokens for each rank).
MOST_SLOTS = 2**31 - 2**20
INDEX_DTYPE = torch.int32
INDEX_BYTES = INDEX_DTYPE.itemsize
NO_ROW = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingPlan:
    """Where every slot of the group goes. All tensors are int32 and contiguous, on the device of the routing.

    rank: r, this rank's place in the group. num_tokens: T, this rank's tokens. step: the number of the call that made
        it, object_number: how many ``ExpertParallel`` objects the group had before that one. Both are the same on every
        rank, and ranks that use different plans are found by them; 0 if it came of no such call.

    expert_ids (W, C, K): the expert of each slot; -1 where it is dropped or the token does not exist.
    counts (E,): ``counts[j] = #{f : expert_ids[f] == j}``, over the group.
    row_of_slot (W, C, K): row of the slot on its owner, ``position(f) - position of the owner's first slot``, where
        ``position`` is the place in the one stable counting sort of all slots by expert; -1 where there is no expert.
    group_ends (e,): ``group_ends[i] = sum(counts[r*e : r*e + i + 1])``, the ``offs`` of
        ``torch.nn.functional.grouped_mm``; its last entry is the number of valid rows on this rank.
    slot_of_row (R,): inverse of ``row_of_slot`` on this rank; -1 past the last valid row.
    pair_tokens (W, W): ``pair_tokens[p, q] = #{t : some slot of token t of rank p lives on rank q}``.
    packed_of_token (W, C): place of token (p, t) among the tokens that have a slot on this rank, ordered by p, then t;
        -1 where it has none.
    """

    rank: int
    num_tokens: int
    expert_ids: Tensor
    counts: Tensor
    row_of_slot: Tensor
    group_ends: Tensor
    slot_of_row: Tensor
    pair_tokens: Tensor
    packed_of_token: Tensor
    step: int = 0
    object_number: int = 0

    @property
    def world_size(self) -> int:
        """W."""
        return self.expert_ids.shape[0]

    @property
    def max_tokens(self) -> int:
        """C, in tokens."""
        return self.expert_ids.shape[1]

    @property
    def top_k(self) -> int:
        """K."""
        return self.expert_ids.shape[2]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.counts.shape[0]

    @property
    def experts_per_rank(self) -> int:
        """Experts of one rank, e."""
        return self.group_ends.shape[0]

    @property
    def row_capacity(self) -> int:
        """R, in rows."""
        return self.slot_of_row.shape[0]

    def rows(self) -> int:
        """Valid rows on this rank. A read on the host: on a GPU it waits for the plan."""
        return int(self.group_ends[-1])

    def packed_rows(self) -> int:
        """P, the tokens of the group with at least one slot on this rank. A read on the host."""
        return int(self.pair_tokens[:, self.rank].sum())

    def owner_of_slot(self) -> Tensor:
        """Rank that owns each slot's expert, (W, C, K) int32; -1 where there is no expert."""
        owner_WCK = torch.div(self.expert_ids, self.experts_per_rank, rounding_mode="floor")
        return owner_WCK.where(self.expert_ids >= 0, NO_ROW)

    def check(self) -> None:
        """Hold every field against its definition. Reads the host; for tests and for the suspicious.

        Raises ``PlanError`` naming the first field that is wrong.
        """
        _check_form(self)
        valid_WCK = self.expert_ids >= 0
        _expect("expert_ids", bool((self.expert_ids < self.num_experts).all() & (self.expert_ids >= -1).all()))
        _check_counts(self, valid_WCK)
        _check_rows(self, valid_WCK)
        _check_tokens(self)


# What says where slots go: all but which call made the plan.
ROUTING_FIELDS = tuple(field.name for field in fields(RoutingPlan) if field.name not in ("step", "object_number"))
TENSOR_FIELDS = tuple(field.name for field in fields(RoutingPlan) if field.type == "Tensor")


def malformed_field(plan: RoutingPlan) -> str | None:
    """The first field that is not of the kind, dtype, form in memory, device and shape of a plan's, or None.

    On the host alone, in some microseconds: no value is read.
    """
    ids_WCK = plan.expert_ids
    # It is the first of them.
    for name in TENSOR_FIELDS:
        tensor = getattr(plan, name)
        if not _is_well_held(tensor) or tensor.device != ids_WCK.device:
            return name
    if ids_WCK.ndim != 3 or 0 in (ids_WCK.shape[0], ids_WCK.shape[2]) or ids_WCK.numel() > MOST_SLOTS:
        return "expert_ids"
    if plan.group_ends.ndim != 1 or plan.experts_per_rank == 0:
        return "group_ends"
    if plan.slot_of_row.ndim != 1 or plan.row_capacity > ids_WCK.numel():
        return "slot_of_row"
    return _misshapen_field(plan)


def raise_if_malformed(where: object, plan: RoutingPlan) -> None:
    """Raise ``ValueError`` if dtype, shape or storage of a field of ``plan`` has changed; ``where`` begins the message.

    For a backward: its forward has checked the plan, whose memory the caller may have freed since.
    """
    malformed = malformed_field(plan)
    if malformed is not None:
        raise ValueError(
            f"{where}: {malformed} of plan: got a tensor that was freed or resized after forward, expected it "
            "unchanged: keep the plan until its backward has run"
        )


def row_ceiling(*, world_size: int, max_tokens: int, top_k: int, experts_per_rank: int, distinct: bool) -> int:
    """Rows that a rank can receive at the most: W*C*min(K, e) if a token's experts are distinct, else W*C*K."""
    slots_here = min(top_k, experts_per_rank) if distinct else top_k
    return world_size * max_tokens * slots_here


def check_slots(where: object, *, world_size: int, max_tokens: int, top_k: int) -> None:
    """Raise ``ValueError`` if the group has more slots than int32 can count; ``where`` begins the message."""
    slots = world_size * max_tokens * top_k
    if slots > MOST_SLOTS:
        raise ValueError(f"{where}: W*C*K: got {slots} slots, expected at most {MOST_SLOTS} (slots are int32)")


def overflow_error(where: object, *, max_rows: int, rank: int, rows: int, more: str = "") -> RowOverflowError:
    """What to raise where ``rank`` is routed ``rows`` rows and no more than ``max_rows`` are admitted."""
    return RowOverflowError(
        f"{where}: max_rows: got {max_rows}, expected at least {rows}: rank {rank} is routed {rows} rows{more}"
    )


def recompute_error(where: object, step: int) -> RecomputeError:
    """What to raise where a backward of ``step`` finds another routing than its forward had."""
    return RecomputeError(
        f"{where}: step {step}: got another routing when activation checkpointing ran forward again, expected "
        "the same: x of the layer was not what it was (dropout in front of it needs preserve_rng_state=True)"
    )


def room_for_rows(where: object, config: EPConfig, *, rank: int, ceiling: int, rows_W: Sequence[int] | None) -> int:
    """R: the exact rows with ``cpu_sync_on_runtime``, else the ceiling, or ``max_rows`` if that is less.

    rows_W: the rows of every rank, where the host knows them. Then an overflow is raised here, by all ranks, so that
    nobody is left waiting. Raises ``RowOverflowError``.
    """
    if rows_W is not None and config.max_rows is not None and max(rows_W) > config.max_rows:
        fullest = rows_W.index(max(rows_W))
        more = f" (all ranks: {list(rows_W)})"
        raise overflow_error(where, max_rows=config.max_rows, rank=fullest, rows=max(rows_W), more=more)
    if rows_W is not None and config.cpu_sync_on_runtime:
        return rows_W[rank]
    return ceiling if config.max_rows is None else min(ceiling, config.max_rows)


def _expect(field: str, holds: bool) -> None:
    if not holds:
        raise PlanError(f"routing plan: {field} contradicts its definition")


def _is_well_held(tensor: object) -> bool:
    """Whether kernels may read ``tensor`` where it lies, as contiguous int32."""
    return (
        type(tensor) is Tensor
        and tensor.dtype == INDEX_DTYPE
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and not is_zero_without_memory(tensor)
        # It may have been freed.
        and tensor.untyped_storage().nbytes() >= INDEX_BYTES * (tensor.storage_offset() + tensor.numel())
    )


def _misshapen_field(plan: RoutingPlan) -> str | None:
    """The first field that does not fit W, C, K and e of ``expert_ids`` and ``group_ends``."""
    world_size, max_tokens, _ = plan.expert_ids.shape
    if plan.counts.shape != (world_size * plan.experts_per_rank,):
        return "counts"
    if plan.row_of_slot.shape != plan.expert_ids.shape:
        return "row_of_slot"
    if plan.pair_tokens.shape != (world_size, world_size):
        return "pair_tokens"
    if plan.packed_of_token.shape != (world_size, max_tokens):
        return "packed_of_token"
    return None if is_count(plan.num_tokens) and plan.num_tokens <= max_tokens else "num_tokens"


def _check_form(plan: RoutingPlan) -> None:
    malformed = malformed_field(plan)
    _expect(f"form of {malformed}", malformed is None)
    _expect("rank", 0 <= plan.rank < plan.world_size)
    _expect("num_tokens", not bool((plan.expert_ids[plan.rank, plan.num_tokens :] >= 0).any()))


def _check_counts(plan: RoutingPlan, valid_WCK: Tensor) -> None:
    ids_N = plan.expert_ids[valid_WCK].long()
    _expect("counts", torch.equal(plan.counts.long(), torch.bincount(ids_N, minlength=plan.num_experts)))
    first = plan.rank * plan.experts_per_rank
    here_e = plan.counts[first : first + plan.experts_per_rank]
    _expect("group_ends", torch.equal(plan.group_ends.long(), here_e.long().cumsum(0)))


def _check_rows(plan: RoutingPlan, valid_WCK: Tensor) -> None:
    _expect("row_of_slot", torch.equal(plan.row_of_slot >= 0, valid_WCK))
    owner_F = plan.owner_of_slot().flatten()
    for rank in range(plan.world_size):
        slots_N = (owner_F == rank).nonzero().squeeze(1)
        by_row_N = slots_N[plan.row_of_slot.flatten()[slots_N].long().argsort()]
        rows_N = plan.row_of_slot.flatten()[by_row_N].long()
        _expect("row_of_slot", torch.equal(rows_N, torch.arange(len(rows_N), device=rows_N.device)))
        # Canonical order is the order of the pairs (expert, slot), and a slot's number orders rank, token and k.
        sort_key_N = plan.expert_ids.flatten()[by_row_N].long() * owner_F.numel() + by_row_N
        _expect("row_of_slot", bool((sort_key_N.diff() > 0).all()))
        if rank == plan.rank:
            _expect("slot_of_row", len(by_row_N) <= plan.row_capacity)
            _expect("slot_of_row", torch.equal(plan.slot_of_row[: len(by_row_N)].long(), by_row_N))
            _expect("slot_of_row", bool((plan.slot_of_row[len(by_row_N) :] == NO_ROW).all()))


def _check_tokens(plan: RoutingPlan) -> None:
    owner_WCK = plan.owner_of_slot()
    for rank in range(plan.world_size):
        present_WC = (owner_WCK == rank).any(dim=2)
        _expect("pair_tokens", torch.equal(plan.pair_tokens[:, rank].long(), present_WC.sum(dim=1)))
        if rank == plan.rank:
            packed_N = plan.packed_of_token[present_WC].long()
            _expect("packed_of_token", torch.equal(packed_N, torch.arange(len(packed_N), device=packed_N.device)))
            _expect("packed_of_token", bool((plan.packed_of_token[~present_WC] == NO_ROW).all()))
