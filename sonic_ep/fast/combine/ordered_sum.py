"""The sum that every combine mode is made of: a fixed order, fp32, one rounding. And the exchange of partial sums.

All sums start at +0 and so never are -0: a term of +0, which stands for an absent one, leaves every bit as it is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.fast.device import peer_pointer, rounded
from sonic_ep.fast.receiving import (
    Receiver,
    arrival_of,
    await_arrivals,
    has_slot,
    raise_arrival,
    receiver,
    send_and_sum,
)
from sonic_ep.fast.workspace import Workspace
from sonic_ep.plan import RoutingPlan


@triton.jit
def add_own_slots(
    rows_ptr,
    scores_ptr,
    expert_ids_ptr,
    row_of_slot_ptr,
    first_slot,
    first_expert,
    experts_per_rank,
    row_capacity,
    column,
    HAS_SCORES: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
):
    """fp32 sum over k, ascending, of score * row, of a token's slots among one rank's experts.

    rows_ptr (R, H), canonical order; scores_ptr (W*C*K,) fp32; first_slot: the token's first; column: which of H.
    """
    total = tl.zeros(column.shape, dtype=tl.float32)
    for k in tl.static_range(0, K):
        expert = tl.load(expert_ids_ptr + first_slot + k)
        row = tl.load(row_of_slot_ptr + first_slot + k).to(tl.int64)
        here = (expert >= first_expert) & (expert < first_expert + experts_per_rank) & (row < row_capacity)
        term = tl.load(rows_ptr + row * H + column, mask=column < tl.where(here, H, 0), other=0.0).to(tl.float32)
        if HAS_SCORES:
            term = term * tl.load(scores_ptr + first_slot + k, mask=here, other=0.0)
        total += term
    return total


@triton.jit(do_not_specialize=["rank", "step", "limit", "first_token", "tokens", "lag"])
def exchange_partial_sums_kernel(
    rows_ptr,
    scores_ptr,
    out_ptr,
    expert_ids_ptr,
    row_of_slot_ptr,
    received_ptr,
    flags_ptr,
    world_size,
    capacity,
    own_tokens,
    experts_per_rank,
    row_capacity,
    first_token,
    tokens,
    lag,
    chunk,
    expiry_ptr,
    rank,
    step,
    limit,
    PHASE: tl.constexpr,
    DENSE: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Send this rank's partial sum of every other rank's token, and sum the home tokens. Grid ((tokens + lag) * W,).

    rows_ptr (R, H), canonical order; scores_ptr (W, C, K) fp32; out_ptr (T, H). received_ptr, flags_ptr (W,) int64:
    addresses of (W - 1, chunk, H) partial sums and (W - 1, chunk) flags of each rank; see ``sonic_ep.fast.receiving``.
    DENSE: a partial sum for every token, also where this rank has no slot of it.

    Rounding points: p_q = round(sum over k on q), out = round(sum over q of p_q), both sums in fp32 and ascending.
    With W=3, rank 0 finds what rank 1 pushed for token t at (0, t), and what rank 2 pushed at (1, t).
    """
    group = tl.program_id(0) // world_size
    place = tl.program_id(0) % world_size
    k = tl.arange(0, K_PADDED)
    first_expert = rank * experts_per_rank
    if place < world_size - 1:
        if group < tokens:
            home = (rank + 1 + place) % world_size
            token = first_token + group
            first_slot = (home.to(tl.int64) * capacity + token) * K
            experts = tl.load(expert_ids_ptr + first_slot + k, mask=k < K, other=-1)
            if has_slot(experts, first_expert, experts_per_rank) | DENSE:
                arrival = arrival_of(rank, home, group, world_size, chunk)
                target = peer_pointer(received_ptr, home, out_ptr) + arrival.to(tl.int64) * H
                for first in range(0, H, COLUMNS):
                    column = first + tl.arange(0, COLUMNS)
                    partial = add_own_slots(
                        rows_ptr,
                        scores_ptr,
                        expert_ids_ptr,
                        row_of_slot_ptr,
                        first_slot,
                        first_expert,
                        experts_per_rank,
                        row_capacity,
                        column,
                        HAS_SCORES,
                        K,
                        H,
                    )
                    tl.store(target + column, rounded(partial, out_ptr), mask=column < H)
                raise_arrival(flags_ptr, home, arrival)
    else:
        group -= lag
        if (group >= 0) & (group < tokens):
            token = first_token + group
            first_slot = (rank.to(tl.int64) * capacity + token) * K
            experts = tl.load(expert_ids_ptr + first_slot + k, mask=k < K, other=-1)
            await_arrivals(
                flags_ptr,
                experts,
                group,
                chunk,
                world_size,
                experts_per_rank,
                expiry_ptr,
                rank,
                step,
                limit,
                PHASE,
                DENSE,
            )
            if token < own_tokens:
                for first in range(0, H, COLUMNS):
                    column = first + tl.arange(0, COLUMNS)
                    own = add_own_slots(
                        rows_ptr,
                        scores_ptr,
                        expert_ids_ptr,
                        row_of_slot_ptr,
                        first_slot,
                        first_expert,
                        experts_per_rank,
                        row_capacity,
                        column,
                        HAS_SCORES,
                        K,
                        H,
                    )
                    own = rounded(own, out_ptr).to(tl.float32)
                    total = tl.zeros((COLUMNS,), dtype=tl.float32)
                    for sender in range(world_size):
                        if sender == rank:
                            total += own
                        elif has_slot(experts, sender * experts_per_rank, experts_per_rank) | DENSE:
                            arrival = arrival_of(sender, rank, group, world_size, chunk)
                            source = peer_pointer(received_ptr, rank, out_ptr) + arrival.to(tl.int64) * H
                            # Past the first-level cache, which knows nothing of what peers write meanwhile.
                            total += tl.load(source + column, mask=column < H, other=0.0, cache_modifier=".cg").to(
                                tl.float32
                            )
                    tl.store(out_ptr + token.to(tl.int64) * H + column, rounded(total, out_ptr), mask=column < H)


def exchange_partial_sums(
    rows_RH: Tensor, scores_WCK: Tensor | None, plan: RoutingPlan, workspace: Workspace, *, dense: bool, most_bytes: int
) -> Tensor:
    """Collective. (T, H) from rows in canonical order, by one partial sum of each token from each rank.

    dense: also from ranks without a slot of the token, whose partial sum is +0.
    """
    row_bytes = rows_RH.shape[1] * rows_RH.element_size()
    shared = reserve_partial_sums(workspace, plan, row_bytes, most_bytes)
    return send_and_sum(exchange_partial_sums_kernel, rows_RH, scores_WCK, plan, workspace, shared, DENSE=dense)


def reserve_partial_sums(workspace: Workspace, plan: RoutingPlan, row_bytes: int, most_bytes: int) -> Receiver:
    """Collective. Shared memory for a partial sum of each token from each other rank."""
    return receiver(workspace, plan, rows_per_token=plan.world_size - 1, row_bytes=row_bytes, most_bytes=most_bytes)
