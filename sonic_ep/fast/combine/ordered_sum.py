"""The exchange of partial sums: fp32, in a fixed order, each rounded once. +0 for an absent term changes no bit."""

import triton.language as tl

from sonic_ep.fast.combine.base import (
    PushedCombine,
    await_receive_slots,
    bring_scores,
    experts_of_token,
    has_slot,
    origin_and_group,
    receive_slot_of,
    return_values,
    signal_receive_slot,
    take_ticket,
)
from sonic_ep.fast.device_functions import peer_pointer, rounded
from sonic_ep.fast.launch import triton_kernel


@triton_kernel
def exchange_partial_sums_kernel(
    rows_ptr,
    scores_ptr,
    scores_table_ptr,
    epoch_ptr,
    out_ptr,
    expert_ids_ptr,
    row_of_slot_ptr,
    values_ptr,
    origins_ptr,
    values_out_ptr,
    received_ptr,
    flags_ptr,
    ticket_ptr,
    wait_errors_ptr,
    world_size,
    max_tokens,
    own_tokens,
    experts_per_rank,
    row_capacity,
    first_token,
    tokens,
    lag,
    chunk,
    rank,
    tag: tl.int64,
    limit: tl.int64,
    DENSE: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    STAGED_SCORES: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Send partial sums of other ranks' tokens, sum this rank's tokens. Grid ((tokens + lag) * W,): ``combine.base``.

    rows_ptr (N, H), canonical order, N = ``row_capacity``; out_ptr (T, H). received_ptr, flags_ptr (W,) int64:
    addresses of (W - 1, chunk, H) partial sums and (W - 1, chunk) flags of each rank. DENSE: send a partial sum also
    where this rank has no slot of the token. With scores, rows from N on count as NaN. For the other pointers see
    ``combine.base``.

    Rounding points: p_q = round(sum over k on q), out = round(sum over q of p_q), both sums in fp32 and ascending.
    With W=3, rank 0 receives the partial sum of token t from rank 1 at (0, t), from rank 2 at (1, t).
    """
    origin, group = origin_and_group(take_ticket(tl.program_id(0), ticket_ptr, world_size), rank, world_size, lag)
    if (group >= 0) & (group < tokens):
        token = first_token + group
        first_slot = (origin.to(tl.int64) * max_tokens + token) * K
        experts = experts_of_token(expert_ids_ptr, first_slot, K, K_PADDED)
        if STAGED_SCORES:
            bring_scores(scores_ptr, scores_table_ptr, epoch_ptr, origin, token, first_slot, world_size, K, K_PADDED)
        first_expert = rank * experts_per_rank
        if origin == rank:
            await_receive_slots(
                flags_ptr, experts, group, chunk, world_size, experts_per_rank, wait_errors_ptr, rank, tag, limit, DENSE
            )
            takes_part = token < own_tokens
            if HAS_VALUES:
                values, routing = (values_ptr, origins_ptr, values_out_ptr), (expert_ids_ptr, row_of_slot_ptr)
                sizes = (rank, experts_per_rank, row_capacity, own_tokens)
                return_values(token, first_slot, values, routing, sizes, K, K_PADDED)
        else:
            takes_part = has_slot(experts, first_expert, experts_per_rank) | DENSE
        if takes_part:
            for first in range(0, H, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                partial = tl.zeros((COLUMNS,), dtype=tl.float32)
                # Each row is read once: the cache is for pushed sums that are not summed yet.
                for choice in tl.static_range(0, K):
                    expert = tl.load(expert_ids_ptr + first_slot + choice)
                    row = tl.load(row_of_slot_ptr + first_slot + choice).to(tl.int64)
                    here = (expert >= first_expert) & (expert < first_expert + experts_per_rank)
                    inside = column < tl.where(here & (row < row_capacity), H, 0)
                    place = rows_ptr + row * H + column
                    term = tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
                    if HAS_SCORES:
                        weight = tl.load(scores_ptr + first_slot + choice, mask=here, other=0.0)
                        term = term * tl.where(here & (row >= row_capacity), float("nan"), weight)
                    partial += term
                own = rounded(partial, out_ptr)
                if origin == rank:
                    total = tl.zeros((COLUMNS,), dtype=tl.float32)
                    for sender in range(world_size):
                        if sender == rank:
                            total += own.to(tl.float32)
                        # No elif: in a nested branch Triton 3.6 loses the alignment and loads single elements.
                        if (sender != rank) & (has_slot(experts, sender * experts_per_rank, experts_per_rank) | DENSE):
                            slot = receive_slot_of(sender, rank, group, world_size, chunk).to(tl.int64)
                            source_ptr = peer_pointer(received_ptr, rank, out_ptr) + slot * H + column
                            # Past the first-level cache, which does not see what peers write meanwhile.
                            pushed_sum = tl.load(source_ptr, mask=column < H, other=0.0, cache_modifier=".cg")
                            total += pushed_sum.to(tl.float32)
                    tl.store(out_ptr + token.to(tl.int64) * H + column, rounded(total, out_ptr), mask=column < H)
                else:
                    slot = receive_slot_of(rank, origin, group, world_size, chunk).to(tl.int64)
                    tl.store(peer_pointer(received_ptr, origin, out_ptr) + slot * H + column, own, mask=column < H)
            if origin != rank:
                signal_receive_slot(flags_ptr, origin, receive_slot_of(rank, origin, group, world_size, chunk), tag)


class PartialSums(PushedCombine):
    """A combine mode by one partial sum for each token and rank: ranks with a slot of it, or all if DENSE."""

    _kernel = exchange_partial_sums_kernel

    @staticmethod
    def _rows_per_token(world_size: int, top_k: int) -> int:
        return world_size - 1
