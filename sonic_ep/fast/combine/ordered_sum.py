"""The sum that every combine mode is made of: a fixed order, fp32, one rounding. And the exchange of partial sums.

All sums start at +0 and so never are -0: a term of +0, which stands for an absent one, leaves every bit as it is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sonic_ep.fast.combine.base import (
    UNSPECIALIZED,
    PushedCombine,
    await_receive_slots,
    has_slot,
    origin_and_group,
    receive_slot_of,
    signal_receive_slot,
)
from sonic_ep.fast.device_functions import peer_pointer, rounded
from sonic_ep.plan import RoutingPlan


@triton.jit(do_not_specialize=UNSPECIALIZED)
def exchange_partial_sums_kernel(
    rows_ptr,
    scores_ptr,
    out_ptr,
    expert_ids_ptr,
    row_of_slot_ptr,
    received_ptr,
    flags_ptr,
    world_size,
    max_tokens,
    own_tokens,
    experts_per_rank,
    row_capacity,
    first_token,
    tokens,
    lag,
    chunk,
    wait_errors_ptr,
    rank,
    tag,
    limit,
    DENSE: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Send this rank's partial sum of every other rank's token, and sum the home tokens. Grid ((tokens + lag) * W,).

    rows_ptr (R, H), canonical order; scores_ptr (W, C, K) fp32; out_ptr (T, H). received_ptr, flags_ptr (W,) int64:
    addresses of (W - 1, chunk, H) partial sums and (W - 1, chunk) flags of each rank; see ``combine.base``.
    DENSE: a partial sum for every token, also where this rank has no slot of it.

    Rounding points: p_q = round(sum over k on q), out = round(sum over q of p_q), both sums in fp32 and ascending.
    With W=3, rank 0 finds what rank 1 pushed for token t at (0, t), and what rank 2 pushed at (1, t).
    """
    home, group = origin_and_group(tl.program_id(0), rank, world_size, lag)
    if (group >= 0) & (group < tokens):
        token = first_token + group
        first_slot = (home.to(tl.int64) * max_tokens + token) * K
        k = tl.arange(0, K_PADDED)
        experts = tl.load(expert_ids_ptr + first_slot + k, mask=k < K, other=-1)
        first_expert = rank * experts_per_rank
        if home == rank:
            await_receive_slots(
                flags_ptr,
                experts,
                group,
                chunk,
                world_size,
                experts_per_rank,
                wait_errors_ptr,
                rank,
                tag,
                limit,
                DENSE,
            )
            takes_part = token < own_tokens
        else:
            takes_part = has_slot(experts, first_expert, experts_per_rank) | DENSE
        if takes_part:
            for first in range(0, H, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                partial = tl.zeros((COLUMNS,), dtype=tl.float32)
                # Each row is read once: the cache is for what peers have pushed and nobody has summed yet.
                for choice in tl.static_range(0, K):
                    expert = tl.load(expert_ids_ptr + first_slot + choice)
                    row = tl.load(row_of_slot_ptr + first_slot + choice).to(tl.int64)
                    here = (expert >= first_expert) & (expert < first_expert + experts_per_rank) & (row < row_capacity)
                    inside = column < tl.where(here, H, 0)
                    term = tl.load(
                        rows_ptr + row * H + column, mask=inside, other=0.0, eviction_policy="evict_first"
                    ).to(tl.float32)
                    if HAS_SCORES:
                        term = term * tl.load(scores_ptr + first_slot + choice, mask=here, other=0.0)
                    partial += term
                # Rounded where it was summed, also if that is the home itself.
                own = rounded(partial, out_ptr)
                if home == rank:
                    total = tl.zeros((COLUMNS,), dtype=tl.float32)
                    for sender in range(world_size):
                        if sender == rank:
                            total += own.to(tl.float32)
                        # Not an elif: in a nested branch Triton 3.6 loses the alignment and loads single elements.
                        pushed = has_slot(experts, sender * experts_per_rank, experts_per_rank) | DENSE
                        if (sender != rank) & pushed:
                            arrival = receive_slot_of(sender, rank, group, world_size, chunk).to(tl.int64)
                            source_ptr = peer_pointer(received_ptr, rank, out_ptr) + arrival * H + column
                            # Past the first-level cache, which knows nothing of what peers write meanwhile.
                            arrived = tl.load(source_ptr, mask=column < H, other=0.0, cache_modifier=".cg")
                            total += arrived.to(tl.float32)
                    tl.store(out_ptr + token.to(tl.int64) * H + column, rounded(total, out_ptr), mask=column < H)
                else:
                    arrival = receive_slot_of(rank, home, group, world_size, chunk).to(tl.int64)
                    target_ptr = peer_pointer(received_ptr, home, out_ptr) + arrival * H + column
                    tl.store(target_ptr, own, mask=column < H)
            if home != rank:
                signal_receive_slot(flags_ptr, home, receive_slot_of(rank, home, group, world_size, chunk), tag)


class PartialSums(PushedCombine):
    """A combine mode made of one partial sum of each token from each rank, of those with a slot of it or of all."""

    _kernel = exchange_partial_sums_kernel

    @staticmethod
    def _rows_per_token(plan: RoutingPlan) -> int:
        return plan.world_size - 1
