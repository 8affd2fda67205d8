"""The kernels of the plan: stage, count, scan, place, totals. See ``sonic_ep.fast.plan`` for how they follow."""

from __future__ import annotations

import triton
import triton.language as tl

from sonic_ep.fast.device import peer_pointer

# Stands for an id out of range until the plan is built, where it counts as dropped.
OUT_OF_RANGE: tl.constexpr = tl.constexpr(-2)


@triton.jit(do_not_specialize=["given", "room"])
def stage_ids_kernel(ids_ptr, staged_ptr, given, room, num_experts, BLOCK: tl.constexpr):
    """This rank's ids, int32 or int64, to shared memory as int32. Grid (ceil(room / BLOCK),).

    ids_ptr (T*K,); staged_ptr (C*K,) int32: -1 behind the ``given`` = T*K ids, ``OUT_OF_RANGE`` for ids that are
    neither -1 nor of one of the experts.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids_ptr + place, mask=place < given, other=-1)
    known = (expert >= -1) & (expert < num_experts)
    staged = tl.where(known, expert, OUT_OF_RANGE).to(tl.int32)
    tl.store(staged_ptr + place, staged, mask=place < room)


@triton.jit(do_not_specialize=["capacity", "tiles_per_rank"])
def count_kernel(
    staged_ptr,
    expert_ids_ptr,
    counts_ptr,
    verdict_ptr,
    capacity,
    tiles_per_rank,
    num_experts,
    experts_per_rank,
    world_size,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
):
    """Gather the ids of one tile and count them. Grid (tiles,).

    staged_ptr (W,) int64: addresses of the ids that each rank staged, (C, K) int32. expert_ids_ptr (W, C, K) int32.
    counts_ptr (tiles, E + W) int32: slots of each expert, then tokens with a slot on each rank. verdict_ptr: see
    ``Verdict``; its first entry becomes p + 1 where rank p has an id out of range.

    Two tokens with the experts 0 2 and 1 0 of four, on two ranks, count 2 1 1 0, then 2 1.
    """
    tile = tl.program_id(0)
    source = tile // tiles_per_rank
    token = (tile % tiles_per_rank) * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, K_PADDED)
    inside = (token < capacity)[:, None] & (k < K)[None, :]
    slot = token[:, None] * K + k[None, :]
    expert = tl.load(peer_pointer(staged_ptr, source, expert_ids_ptr) + slot, mask=inside, other=-1)
    if tl.min(tl.min(expert, axis=1), axis=0) < -1:
        tl.store(verdict_ptr, source + 1)
    expert = tl.maximum(expert, -1)
    tl.store(expert_ids_ptr + source * capacity * K + slot, expert, mask=inside)
    flat = tl.reshape(expert, (TOKENS * K_PADDED,))
    of_expert = tl.histogram(tl.where(flat < 0, num_experts, flat), EXPERTS_PADDED)
    bin_of = tl.arange(0, EXPERTS_PADDED)
    counts_ptr += tile.to(tl.int64) * (num_experts + world_size)
    tl.store(counts_ptr + bin_of, of_expert, mask=bin_of < num_experts)
    for rank in range(world_size):
        first = rank * experts_per_rank
        here = (expert >= first) & (expert < first + experts_per_rank)
        tokens_here = tl.sum(tl.max(here.to(tl.int32), axis=1), axis=0)
        tl.store(counts_ptr + num_experts + rank, tokens_here)


@triton.jit(do_not_specialize=["tiles"])
def scan_kernel(counts_ptr, totals_ptr, tiles, bins, TILES: tl.constexpr, BINS: tl.constexpr):
    """Replace the counts of every tile by the sum over the tiles before it. Grid (ceil(bins / BINS),).

    counts_ptr (tiles, bins) int32; totals_ptr (bins,) int32. Counts 2 0 3 of one bin become 0 2 2, and its total 5.
    """
    column = tl.program_id(0) * BINS + tl.arange(0, BINS)
    before = tl.zeros((BINS,), dtype=tl.int32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        inside = (tile < tiles)[:, None] & (column < bins)[None, :]
        place = counts_ptr + tile.to(tl.int64)[:, None] * bins + column[None, :]
        count = tl.load(place, mask=inside, other=0)
        tl.store(place, tl.cumsum(count, axis=0) - count + before[None, :], mask=inside)
        before += tl.sum(count, axis=0)
    tl.store(totals_ptr + column, before, mask=column < bins)


@triton.jit(do_not_specialize=["capacity", "tiles_per_rank", "row_capacity"])
def place_kernel(
    expert_ids_ptr,
    before_ptr,
    totals_ptr,
    row_of_slot_ptr,
    slot_of_row_ptr,
    packed_of_token_ptr,
    rank,
    capacity,
    tiles_per_rank,
    num_experts,
    experts_per_rank,
    world_size,
    row_capacity,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    COMPARED: tl.constexpr,
):
    """Row of every slot of one tile, and packed place of every token. Grid (tiles,).

    before_ptr, totals_ptr: what ``scan_kernel`` left. The other pointers are fields of ``RoutingPlan``.

    The row of a slot is the owner's first row of its expert, plus the slots of that expert in tiles before, plus those
    before it in its tile. Four slots of a tile with experts 1 0 1 0 have 0 0 1 1 before them.
    """
    tile = tl.program_id(0)
    source = tile // tiles_per_rank
    first_token = (tile % tiles_per_rank) * TOKENS
    bin_of = tl.arange(0, EXPERTS_PADDED)
    known = bin_of < num_experts
    total = tl.load(totals_ptr + bin_of, mask=known, other=0)
    slots_before = tl.cumsum(total, axis=0) - total
    first_of_owner = tl.minimum(bin_of // experts_per_rank * experts_per_rank, num_experts)
    next_row = slots_before - tl.gather(slots_before, first_of_owner, 0)
    before_ptr += tile.to(tl.int64) * (num_experts + world_size)
    next_row += tl.load(before_ptr + bin_of, mask=known, other=0)
    mine = rank * experts_per_rank
    rows_here = tl.sum(tl.where((bin_of >= mine) & (bin_of < mine + experts_per_rank), total, 0), axis=0)

    # Slots are int32 by contract: W*C*K is at most ``plan.MOST_SLOTS``.
    first_slot = (source * capacity + first_token) * K
    last_slot = (source * capacity + tl.minimum(first_token + TOKENS, capacity)) * K
    lane = tl.arange(0, COMPARED)
    for done in range(0, last_slot - first_slot, COMPARED):
        inside = done + lane < last_slot - first_slot
        slot = first_slot + done + lane
        expert = tl.load(expert_ids_ptr + slot, mask=inside, other=-1)
        earlier_alike = (expert[:, None] == expert[None, :]) & (lane[None, :] < lane[:, None])
        row = tl.gather(next_row, tl.maximum(expert, 0), 0) + tl.sum(earlier_alike.to(tl.int32), axis=1)
        tl.store(row_of_slot_ptr + slot, tl.where(expert >= 0, row, -1), mask=inside)
        here = (expert >= mine) & (expert < mine + experts_per_rank) & (row < row_capacity)
        tl.store(slot_of_row_ptr + row, slot, mask=here)
        # There are at least as many slots as rows: each slot's number also stands for one row that may be free.
        tl.store(
            slot_of_row_ptr + slot,
            tl.full((COMPARED,), -1, tl.int32),
            mask=_free(slot, inside, rows_here, row_capacity),
        )
        next_row += tl.histogram(tl.where(expert < 0, num_experts, expert), EXPERTS_PADDED)

    token = first_token + tl.arange(0, TOKENS)
    k = tl.arange(0, K_PADDED)
    slot = (source * capacity + token)[:, None] * K + k[None, :]
    expert = tl.load(expert_ids_ptr + slot, mask=(token < capacity)[:, None] & (k < K)[None, :], other=-1)
    present = tl.max(((expert >= mine) & (expert < mine + experts_per_rank)).to(tl.int32), axis=1)
    packed = tl.load(before_ptr + num_experts + rank) + tl.cumsum(present, axis=0) - present
    packed = tl.where(present == 1, packed, -1)
    tl.store(packed_of_token_ptr + source * capacity + token, packed, mask=token < capacity)


@triton.jit
def _free(row, inside, rows_here, row_capacity):
    return inside & (row >= rows_here) & (row < row_capacity)


@triton.jit(do_not_specialize=["tiles_per_rank", "max_rows"])
def totals_kernel(
    before_ptr,
    totals_ptr,
    group_ends_ptr,
    pair_tokens_ptr,
    verdict_ptr,
    rank,
    tiles_per_rank,
    num_experts,
    experts_per_rank,
    world_size,
    max_rows,
    EXPERTS_PADDED: tl.constexpr,
    RANKS_PADDED: tl.constexpr,
):
    """The small fields of the plan. Grid (W,): program p writes row p of pair_tokens, program 0 also the others.

    verdict_ptr: see ``Verdict``; the rank with most rows, plus one, and its rows, where they pass ``max_rows``.
    Tiles that begin with 0 3 tokens before them, and a total of 5, hold 3 2.
    """
    source = tl.program_id(0)
    bins = num_experts + world_size
    rank_of = tl.arange(0, RANKS_PADDED)
    exists = rank_of < world_size
    column = num_experts + rank_of
    tile = source.to(tl.int64) * tiles_per_rank
    begin = tl.load(before_ptr + tile * bins + column, mask=exists, other=0)
    total_tokens = tl.load(totals_ptr + column, mask=exists, other=0)
    is_last = source == world_size - 1
    next_tile = tile + tiles_per_rank
    next_begin = tl.load(before_ptr + next_tile * bins + column, mask=exists & (not is_last), other=0)
    tl.store(
        pair_tokens_ptr + source * world_size + rank_of,
        tl.where(is_last, total_tokens, next_begin) - begin,
        mask=exists,
    )
    if source == 0:
        bin_of = tl.arange(0, EXPERTS_PADDED)
        total = tl.load(totals_ptr + bin_of, mask=bin_of < num_experts, other=0)
        slots_before = tl.cumsum(total, axis=0) - total
        mine = rank * experts_per_rank
        mine_before = tl.sum(tl.where(bin_of < mine, total, 0), axis=0)
        here = (bin_of >= mine) & (bin_of < mine + experts_per_rank)
        tl.store(group_ends_ptr + bin_of - mine, slots_before + total - mine_before, mask=here)
        most_rows = tl.full((), 0, tl.int32)
        fullest = tl.full((), 0, tl.int32)
        for other in range(world_size):
            first = other * experts_per_rank
            held = (bin_of >= first) & (bin_of < first + experts_per_rank)
            rows = tl.sum(tl.where(held, total, 0), axis=0)
            fullest = tl.where(rows > most_rows, other, fullest)
            most_rows = tl.maximum(rows, most_rows)
        if most_rows > max_rows:
            tl.store(verdict_ptr + 1, fullest + 1)
            tl.store(verdict_ptr + 2, most_rows)
