"""Combine by all-to-all: one row for each remote slot goes to its origin rank, which sums."""

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
def exchange_rows_kernel(
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
    HAS_SCORES: tl.constexpr,
    STAGED_SCORES: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Send the rows of other ranks' tokens, sum this rank's tokens. Grid ((tokens + lag) * W,): ``combine.base``.

    rows_ptr (N, H), canonical order, N = ``row_capacity``; out_ptr (T, H). received_ptr, flags_ptr (W,) int64:
    addresses of (chunk, K, H) rows and (W - 1, chunk) flags of each rank. Rows from N on are NaN. For the other
    pointers see ``combine.base``.

    Rounding point: out = round(sum over k, ascending, of score * row), products and sum in fp32.
    With K=2, the row of choice 1 of the chunk's token 5 is received in row 11.
    """
    origin, group = origin_and_group(take_ticket(tl.program_id(0), ticket_ptr, world_size), rank, world_size, lag)
    if (group >= 0) & (group < tokens):
        token = first_token + group
        first_slot = (origin.to(tl.int64) * max_tokens + token) * K
        experts = experts_of_token(expert_ids_ptr, first_slot, K, K_PADDED)
        if STAGED_SCORES:
            bring_scores(scores_ptr, scores_table_ptr, epoch_ptr, origin, token, first_slot, world_size, K, K_PADDED)
        first_expert = rank * experts_per_rank
        next_expert = first_expert + experts_per_rank
        received = peer_pointer(received_ptr, origin, out_ptr) + group.to(tl.int64) * K * H
        if origin == rank:
            await_receive_slots(
                flags_ptr, experts, group, chunk, world_size, experts_per_rank, wait_errors_ptr, rank, tag, limit, False
            )
            if token < own_tokens:
                if HAS_VALUES:
                    values, routing = (values_ptr, origins_ptr, values_out_ptr), (expert_ids_ptr, row_of_slot_ptr)
                    sizes = (rank, experts_per_rank, row_capacity, own_tokens)
                    return_values(token, first_slot, values, routing, sizes, K, K_PADDED)
                for first in range(0, H, COLUMNS):
                    column = first + tl.arange(0, COLUMNS)
                    total = tl.zeros((COLUMNS,), dtype=tl.float32)
                    for choice in range(K):
                        expert = tl.load(expert_ids_ptr + first_slot + choice)
                        row = tl.load(row_of_slot_ptr + first_slot + choice).to(tl.int64)
                        own = (expert >= first_expert) & (expert < next_expert) & (row < row_capacity)
                        remote = ((expert >= 0) & (expert < first_expert)) | (expert >= next_expert)
                        term = tl.load(rows_ptr + row * H + column, mask=column < tl.where(own, H, 0), other=0.0)
                        there = column < tl.where(remote, H, 0)
                        place = received + tl.cast(choice, tl.int64) * H + column
                        # Past the first-level cache, which does not see what peers write meanwhile.
                        pushed = tl.load(place, mask=there, other=0.0, cache_modifier=".cg")
                        term = tl.where(there, pushed, term).to(tl.float32)
                        if HAS_SCORES:
                            weight = tl.load(scores_ptr + first_slot + choice, mask=expert >= 0, other=0.0)
                            # A row that the caller has not passed.
                            missing = (row >= row_capacity) & (expert >= first_expert) & (expert < next_expert)
                            term = term * tl.where(missing, float("nan"), weight)
                        total += term
                    tl.store(out_ptr + token.to(tl.int64) * H + column, rounded(total, out_ptr), mask=column < H)
        elif has_slot(experts, first_expert, experts_per_rank):
            for choice in range(K):
                expert = tl.load(expert_ids_ptr + first_slot + choice)
                row = tl.load(row_of_slot_ptr + first_slot + choice).to(tl.int64)
                if (expert >= first_expert) & (expert < next_expert):
                    for first in range(0, H, COLUMNS):
                        column = first + tl.arange(0, COLUMNS)
                        there = column < tl.where(row < row_capacity, H, 0)
                        value = tl.load(rows_ptr + row * H + column, mask=there, other=float("nan"))
                        tl.store(received + tl.cast(choice, tl.int64) * H + column, value, mask=column < H)
            signal_receive_slot(flags_ptr, origin, receive_slot_of(rank, origin, group, world_size, chunk), tag)


class AllToAllCombine(PushedCombine):
    """``out = round(sum over k of score_k * y_k)`` on the token's own rank: fp32, k ascending, one rounding."""

    _kernel = exchange_rows_kernel

    @staticmethod
    def _rows_per_token(world_size: int, top_k: int) -> int:
        return top_k if world_size > 1 else 0
