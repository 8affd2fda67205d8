"""The routing plan in Triton: a stable counting sort over all slots of the group, with no read on the host.

Every rank has staged its ids (and scores) in shared memory and reads those of all. One kernel counts each tile of slots
by expert and its tokens by rank, one sums the counts of the tiles before each, one gives every slot its row. A tile
holds whole tokens of one rank, in slot order.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.fast.device_functions import peer_pointer
from sonic_ep.fast.launch import LAUNCHERS_KEPT, Launcher, triton_kernel
from sonic_ep.fast.staging import StagedCall
from sonic_ep.fast.sync import staged_at
from sonic_ep.fast.workspace import Workspace
from sonic_ep.plan import INDEX_DTYPE, RoutingPlan


@triton_kernel
def count_kernel(
    ids_table_ptr,
    scores_table_ptr,
    epoch_ptr,
    expert_ids_ptr,
    scores_ptr,
    counts_ptr,
    errors_ptr,
    max_tokens,
    tiles_per_rank,
    num_experts,
    experts_per_rank,
    world_size,
    HAS_SCORES: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
):
    """Gather the ids of one tile, and their scores if HAS_SCORES, and count the ids. Grid (tiles,).

    The tables are of the ``Staging``s of ids, (C, K) int32, and scores, (C, K) fp32, of every rank. expert_ids_ptr
    (W, C, K) int32; scores_ptr (W, C, K) fp32, unspecified for tokens that do not exist. counts_ptr (tiles, E + W)
    int32: slots of each expert, then tokens with a slot on each rank. errors_ptr: see ``DeviceErrors``; its first entry
    becomes p + 1 where rank p has an id out of range.

    Two tokens with the experts 0 2 and 1 0 of four, on two ranks, count 2 1 1 0, then 2 1.
    """
    tile = tl.program_id(0)
    source = tile // tiles_per_rank
    token = (tile % tiles_per_rank) * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, K_PADDED)
    inside = (token < max_tokens)[:, None] & (k < K)[None, :]
    slot = token[:, None] * K + k[None, :]
    half = staged_at(epoch_ptr, world_size, True)
    expert = tl.load(peer_pointer(ids_table_ptr + half, source, expert_ids_ptr) + slot, mask=inside, other=-1)
    if HAS_SCORES:
        score = tl.load(peer_pointer(scores_table_ptr + half, source, scores_ptr) + slot, mask=inside)
        tl.store(scores_ptr + source * max_tokens * K + slot, score, mask=inside)
    if tl.min(tl.min(expert, axis=1), axis=0) < -1:
        tl.store(errors_ptr, source + 1)
    expert = tl.maximum(expert, -1)
    tl.store(expert_ids_ptr + source * max_tokens * K + slot, expert, mask=inside)
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


@triton_kernel
def scan_kernel(counts_ptr, tiles, bins, TILES: tl.constexpr, BINS: tl.constexpr):
    """Replace the counts of every tile by the sum over the tiles before it. Grid (ceil(bins / BINS),).

    counts_ptr (tiles + 1, bins) int32; the last row gets the totals. Counts 2 0 3 of one bin become 0 2 2, and 5.
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
    tl.store(counts_ptr + tiles.to(tl.int64) * bins + column, before, mask=column < bins)


@triton.jit
def sums_over_tiles(counts_ptr, column, inside, tile, tiles, bins, scanned):
    """Sums of columns of the counts over the tiles before ``tile``, and over all ``tiles``.

    scanned: ``scan_kernel`` has left them; else they are added up here, as for few tiles.
    """
    before = tl.zeros(column.shape, dtype=tl.int32)
    total = tl.zeros(column.shape, dtype=tl.int32)
    if scanned != 0:
        before = tl.load(counts_ptr + tile.to(tl.int64) * bins + column, mask=inside, other=0)
        total = tl.load(counts_ptr + tiles.to(tl.int64) * bins + column, mask=inside, other=0)
    else:
        for other in range(tiles):
            count = tl.load(counts_ptr + other * bins + column, mask=inside, other=0)
            total += count
            before += tl.where(other < tile, count, 0)
    return before, total


@triton.jit
def place_tile(
    tile,
    expert_ids_ptr,
    counts_ptr,
    row_of_slot_ptr,
    slot_of_row_ptr,
    packed_of_token_ptr,
    rank,
    max_tokens,
    tiles_per_rank,
    num_experts,
    experts_per_rank,
    world_size,
    row_capacity,
    scanned,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    COMPARED: tl.constexpr,
    RANKS_PADDED: tl.constexpr,
):
    """Row of every slot of one tile, and packed place of every token. The pointers are those of ``place_kernel``.

    The row of a slot is the owner's first row of its expert, plus the slots of that expert in tiles before, plus those
    before it in its tile. Four slots of a tile with experts 1 0 1 0 have 0 0 1 1 before them.
    """
    source = tile // tiles_per_rank
    first_token = (tile % tiles_per_rank) * TOKENS
    bin_of = tl.arange(0, EXPERTS_PADDED)
    tiles, bins = world_size * tiles_per_rank, num_experts + world_size
    before, total = sums_over_tiles(counts_ptr, bin_of, bin_of < num_experts, tile, tiles, bins, scanned)
    slots_before = tl.cumsum(total, axis=0) - total
    first_of_owner = tl.minimum(bin_of // experts_per_rank * experts_per_rank, num_experts)
    next_row = slots_before - tl.gather(slots_before, first_of_owner, 0) + before
    mine = rank * experts_per_rank
    rows_here = tl.sum(tl.where((bin_of >= mine) & (bin_of < mine + experts_per_rank), total, 0), axis=0)

    # Slots are int32 by contract: W*C*K is at most ``plan.MOST_SLOTS``.
    first_slot = (source * max_tokens + first_token) * K
    last_slot = (source * max_tokens + tl.minimum(first_token + TOKENS, max_tokens)) * K
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
        none = tl.full((COMPARED,), -1, tl.int32)
        tl.store(slot_of_row_ptr + slot, none, mask=inside & (slot >= rows_here) & (slot < row_capacity))
        next_row += tl.histogram(tl.where(expert < 0, num_experts, expert), EXPERTS_PADDED)

    token = first_token + tl.arange(0, TOKENS)
    k = tl.arange(0, K_PADDED)
    slot = (source * max_tokens + token)[:, None] * K + k[None, :]
    expert = tl.load(expert_ids_ptr + slot, mask=(token < max_tokens)[:, None] & (k < K)[None, :], other=-1)
    present = tl.max(((expert >= mine) & (expert < mine + experts_per_rank)).to(tl.int32), axis=1)
    rank_of = tl.arange(0, RANKS_PADDED)
    column, exists = num_experts + rank_of, rank_of < world_size
    tokens_before, _ = sums_over_tiles(counts_ptr, column, exists, tile, tiles, bins, scanned)
    packed = tl.sum(tl.where(rank_of == rank, tokens_before, 0), axis=0) + tl.cumsum(present, axis=0) - present
    packed = tl.where(present == 1, packed, -1)
    tl.store(packed_of_token_ptr + source * max_tokens + token, packed, mask=token < max_tokens)


@triton.jit
def store_totals(
    source,
    counts_ptr,
    totals_ptr,
    totals_copy_ptr,
    group_ends_ptr,
    pair_tokens_ptr,
    errors_ptr,
    rank,
    tiles_per_rank,
    num_experts,
    experts_per_rank,
    world_size,
    max_rows,
    scanned,
    EXPERTS_PADDED: tl.constexpr,
    RANKS_PADDED: tl.constexpr,
):
    """Row ``source`` of pair_tokens; source 0 also stores the other small fields. Pointers: of ``place_kernel``.

    With 5 tokens on rank q in all, 0 and 3 of them before the first tiles of ranks 0 and 1, row q has 3 and 2.
    """
    tiles, bins = world_size * tiles_per_rank, num_experts + world_size
    rank_of = tl.arange(0, RANKS_PADDED)
    column, exists = num_experts + rank_of, rank_of < world_size
    tile = source * tiles_per_rank
    begin, _ = sums_over_tiles(counts_ptr, column, exists, tile, tiles, bins, scanned)
    end, _ = sums_over_tiles(counts_ptr, column, exists, tile + tiles_per_rank, tiles, bins, scanned)
    tl.store(pair_tokens_ptr + source * world_size + rank_of, end - begin, mask=exists)
    if source == 0:
        bin_of = tl.arange(0, EXPERTS_PADDED)
        known = bin_of < num_experts
        _before, total = sums_over_tiles(counts_ptr, bin_of, known, tile, tiles, bins, scanned)
        tl.store(totals_ptr + bin_of, total, mask=known)
        tl.store(totals_copy_ptr + bin_of, total, mask=known)
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
            tl.store(errors_ptr + 1, fullest + 1)
            tl.store(errors_ptr + 2, most_rows)


@triton_kernel
def place_kernel(
    expert_ids_ptr,
    counts_ptr,
    row_of_slot_ptr,
    slot_of_row_ptr,
    packed_of_token_ptr,
    totals_ptr,
    totals_copy_ptr,
    group_ends_ptr,
    pair_tokens_ptr,
    errors_ptr,
    rank,
    max_tokens,
    tiles_per_rank,
    num_experts,
    experts_per_rank,
    world_size,
    row_capacity,
    max_rows,
    scanned,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    COMPARED: tl.constexpr,
    RANKS_PADDED: tl.constexpr,
):
    """All fields of the plan but the ids. Grid (tiles + W,): a program for each tile, then one for each rank.

    counts_ptr: of ``count_kernel``, or what ``scan_kernel`` left if ``scanned``. totals_ptr: ``counts`` of the plan,
    (E,) int32, and totals_copy_ptr the same again. The other pointers are fields of ``RoutingPlan``, and errors_ptr,
    see ``DeviceErrors``: the rank with most rows, plus one, and its rows, where they pass ``max_rows``.
    """
    program = tl.program_id(0)
    tiles = world_size * tiles_per_rank
    if program < tiles:
        place_tile(
            program,
            expert_ids_ptr,
            counts_ptr,
            row_of_slot_ptr,
            slot_of_row_ptr,
            packed_of_token_ptr,
            rank,
            max_tokens,
            tiles_per_rank,
            num_experts,
            experts_per_rank,
            world_size,
            row_capacity,
            scanned,
            K,
            K_PADDED,
            TOKENS,
            EXPERTS_PADDED,
            COMPARED,
            RANKS_PADDED,
        )
    else:
        store_totals(
            program - tiles,
            counts_ptr,
            totals_ptr,
            totals_copy_ptr,
            group_ends_ptr,
            pair_tokens_ptr,
            errors_ptr,
            rank,
            tiles_per_rank,
            num_experts,
            experts_per_rank,
            world_size,
            max_rows,
            scanned,
            EXPERTS_PADDED,
            RANKS_PADDED,
        )


# Placing is a chain of short steps, one warp wide: more lanes would compare more pairs, more warps would wait.
TILE_SLOTS, COMPARED_SLOTS, PLACE_WARPS = 512, 32, 1
SCAN_TILES, SCAN_BINS = 512, 4
# Up to so many tiles, every program of the last kernel adds up their counts, in less time than a launch takes.
FEW_TILES = 16


@dataclass(frozen=True, kw_only=True)
class PlanShape:
    """The sizes of a plan: W, C, K, E and this rank r, and what follows from them."""

    rank: int
    world_size: int
    max_tokens: int
    top_k: int
    num_experts: int

    @cached_property
    def experts_per_rank(self) -> int:
        """Experts of one rank, e."""
        return self.num_experts // self.world_size

    @cached_property
    def tiles_per_rank(self) -> int:
        """Tiles that hold the C tokens of a rank."""
        return triton.cdiv(self.max_tokens, tile_tokens(self.top_k))


def tile_tokens(top_k: int) -> int:
    """Tokens of a tile, a power of two."""
    return max(1, TILE_SLOTS // triton.next_power_of_2(top_k))


@lru_cache(LAUNCHERS_KEPT)
def _kernels(device: torch.device, world_size: int, top_k: int, num_experts: int, scored: bool) -> tuple[Launcher, ...]:
    """Count, scan, place."""
    # Room for E bins and one for dropped slots.
    experts, padded_k = triton.next_power_of_2(num_experts + 1), triton.next_power_of_2(top_k)
    tile = {"K": top_k, "K_PADDED": padded_k, "TOKENS": tile_tokens(top_k), "EXPERTS_PADDED": experts}
    ranks = triton.next_power_of_2(world_size)
    of_place = {"COMPARED": COMPARED_SLOTS, "RANKS_PADDED": ranks, "num_warps": PLACE_WARPS}
    return (
        Launcher(count_kernel, device, {"HAS_SCORES": scored, **tile}),
        Launcher(scan_kernel, device, {"TILES": SCAN_TILES, "BINS": SCAN_BINS}),
        Launcher(place_kernel, device, tile | of_place),
    )


@dataclass(kw_only=True, eq=False)
class TileCounts:
    """What the kernels before the last find. A tile holds whole tokens of one rank.

    expert_ids (W, C, K); scores (W, C, K) fp32 if they came with the ids, unspecified for tokens that do not exist;
    counts (tiles + 1, E + W): slots of each expert, then tokens with a slot on each rank, of each tile; if ``scanned``,
    of the tiles before it, and in the last row of all tiles.
    """

    expert_ids: Tensor
    scores: Tensor | None
    counts: Tensor
    scanned: bool


def gathered_counts(staged: StagedCall, shape: PlanShape, workspace: Workspace, device_errors: Tensor) -> TileCounts:
    """Read what all ranks have staged, and run the kernels up to the totals."""
    device, ids_table = workspace.device, staged.ids.addresses
    world_size, max_tokens, experts = shape.world_size, shape.max_tokens, shape.num_experts
    count, scan, _ = _kernels(device, world_size, shape.top_k, experts, staged.scores is not None)
    tiles_per_rank, bins = shape.tiles_per_rank, experts + world_size
    tiles, sizes = world_size * tiles_per_rank, (world_size, max_tokens, shape.top_k)
    expert_ids_WCK = torch.empty(sizes, dtype=INDEX_DTYPE, device=device)
    counts = torch.empty((tiles + 1, bins), dtype=INDEX_DTYPE, device=device)
    scores_WCK, scores_table = None, ids_table
    if staged.scores is not None:
        scores_WCK, scores_table = torch.empty(sizes, dtype=torch.float32, device=device), staged.scores.addresses
    pointers = (ids_table, scores_table, workspace.epoch, expert_ids_WCK)
    # Without scores their pointer is not read.
    more = (expert_ids_WCK if scores_WCK is None else scores_WCK, counts, device_errors)
    numbers = (max_tokens, tiles_per_rank, experts, shape.experts_per_rank, world_size)
    count((tiles,), *pointers, *more, *numbers)
    # The first call compiles it, so that no later one does, of however many tokens.
    scanned = tiles > FEW_TILES or not scan.is_ready
    if scanned:
        scan((-(-bins // SCAN_BINS),), counts, tiles, bins)
    return TileCounts(expert_ids=expert_ids_WCK, scores=scores_WCK, counts=counts, scanned=scanned)


def new_plan(
    expert_ids_WCK: Tensor, counts_E: Tensor, shape: PlanShape, *, num_tokens: int, row_capacity: int
) -> RoutingPlan:
    """This rank's plan with these ids and counts; its other fields are to be filled."""
    world_size, new = shape.world_size, expert_ids_WCK.new_empty
    return RoutingPlan.of(
        rank=shape.rank,
        num_tokens=num_tokens,
        expert_ids=expert_ids_WCK,
        counts=counts_E,
        row_of_slot=new(expert_ids_WCK.shape),
        group_ends=new(shape.experts_per_rank),
        slot_of_row=new(row_capacity),
        pair_tokens=new((world_size, world_size)),
        packed_of_token=new((world_size, shape.max_tokens)),
    )


def placed_plan(
    found: TileCounts,
    shape: PlanShape,
    *,
    num_tokens: int,
    row_capacity: int,
    max_rows: int,
    device_errors: Tensor,
    copied: bool = False,
) -> tuple[RoutingPlan, Tensor]:
    """This rank's plan with R = ``row_capacity``, and its counts, if ``copied`` in memory of their own.

    max_rows: the rows of a rank above which ``device_errors`` is set.
    """
    device, world_size, experts = found.counts.device, shape.world_size, shape.num_experts
    counts_E = found.counts.new_empty(experts)
    copy_E = found.counts.new_empty(experts) if copied else counts_E
    plan = new_plan(found.expert_ids, counts_E, shape, num_tokens=num_tokens, row_capacity=row_capacity)
    place = _kernels(device, world_size, shape.top_k, experts, found.scores is not None)[2]
    pointers = (found.expert_ids, found.counts, plan.row_of_slot, plan.slot_of_row, plan.packed_of_token)
    small = (counts_E, copy_E, plan.group_ends, plan.pair_tokens, device_errors)
    tiles_per_rank = shape.tiles_per_rank
    sizes = (shape.rank, shape.max_tokens, tiles_per_rank, experts, shape.experts_per_rank, world_size)
    place((world_size * (tiles_per_rank + 1),), *pointers, *small, *sizes, row_capacity, max_rows, int(found.scanned))
    return plan, copy_E


def empty_plan(shape: PlanShape, device: torch.device) -> RoutingPlan:
    """The plan of a group in which no rank has a token."""
    none_WCK = torch.zeros((shape.world_size, 0, shape.top_k), dtype=INDEX_DTYPE, device=device)
    counts_E = torch.zeros(shape.num_experts, dtype=INDEX_DTYPE, device=device)
    plan = new_plan(none_WCK, counts_E, shape, num_tokens=0, row_capacity=0)
    plan.group_ends.zero_()
    plan.pair_tokens.zero_()
    return plan
