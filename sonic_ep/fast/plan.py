"""The routing plan in Triton: a stable counting sort over all slots of the group, with no read on the host.

Every rank stages its ids (and scores) in shared memory and reads those of all. One kernel counts each tile of slots by
expert and its tokens by rank, one sums the counts of the tiles before each, one gives every slot its row. A tile holds
whole tokens of one rank, in slot order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.fast.collectives import FP32_BYTES, SCORES, gather_staged_scores, stage_scores
from sonic_ep.fast.device_functions import peer_pointer
from sonic_ep.fast.launch import launch, triton_kernel
from sonic_ep.fast.workspace import Workspace
from sonic_ep.plan import INDEX_BYTES, INDEX_DTYPE, RoutingPlan

# Staged in place of an id out of range; the plan counts it as dropped.
OUT_OF_RANGE: tl.constexpr = tl.constexpr(-2)


@triton_kernel
def stage_ids_kernel(ids_ptr, staged_ptr, given, room, num_experts, BLOCK: tl.constexpr):
    """Copy this rank's ids, int32 or int64, to shared memory as int32. Grid (ceil(room / BLOCK),).

    ids_ptr (T*K,); staged_ptr (C*K,) int32: -1 past the ``given`` = T*K ids, ``OUT_OF_RANGE`` for an id that is neither
    -1 nor an expert.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids_ptr + place, mask=place < given, other=-1)
    known = (expert >= -1) & (expert < num_experts)
    staged = tl.where(known, expert, OUT_OF_RANGE).to(tl.int32)
    tl.store(staged_ptr + place, staged, mask=place < room)


@triton_kernel
def count_kernel(
    staged_ptr,
    expert_ids_ptr,
    counts_ptr,
    errors_ptr,
    max_tokens,
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
    counts_ptr (tiles, E + W) int32: slots of each expert, then tokens with a slot on each rank. errors_ptr: see
    ``DeviceErrors``; its first entry becomes p + 1 where rank p has an id out of range.

    Two tokens with the experts 0 2 and 1 0 of four, on two ranks, count 2 1 1 0, then 2 1.
    """
    tile = tl.program_id(0)
    source = tile // tiles_per_rank
    token = (tile % tiles_per_rank) * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, K_PADDED)
    inside = (token < max_tokens)[:, None] & (k < K)[None, :]
    slot = token[:, None] * K + k[None, :]
    expert = tl.load(peer_pointer(staged_ptr, source, expert_ids_ptr) + slot, mask=inside, other=-1)
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


@triton_kernel
def place_kernel(
    expert_ids_ptr,
    before_ptr,
    totals_ptr,
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
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    COMPARED: tl.constexpr,
):
    """Row of every slot of one tile, and packed place of every token. Grid (tiles,).

    before_ptr, totals_ptr: results of ``scan_kernel``. The other pointers are fields of ``RoutingPlan``.

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
    packed = tl.load(before_ptr + num_experts + rank) + tl.cumsum(present, axis=0) - present
    packed = tl.where(present == 1, packed, -1)
    tl.store(packed_of_token_ptr + source * max_tokens + token, packed, mask=token < max_tokens)


@triton_kernel
def totals_kernel(
    before_ptr,
    totals_ptr,
    group_ends_ptr,
    pair_tokens_ptr,
    errors_ptr,
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

    errors_ptr: see ``DeviceErrors``; the rank with most rows, plus one, and its rows, where they pass ``max_rows``.
    With 5 tokens on rank q in all, 0 and 3 of them before the first tiles of ranks 0 and 1, row q has 3 and 2.
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
    tokens_ptr = pair_tokens_ptr + source * world_size + rank_of
    tl.store(tokens_ptr, tl.where(is_last, total_tokens, next_begin) - begin, mask=exists)
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
            tl.store(errors_ptr + 1, fullest + 1)
            tl.store(errors_ptr + 2, most_rows)


# Placing is a chain of short steps, one warp wide: more lanes would compare more pairs, more warps would wait.
TILE_SLOTS, COMPARED_SLOTS, PLACE_WARPS = 512, 32, 1
SCAN_TILES, SCAN_BINS, STAGE_BLOCK = 512, 4, 1024


@dataclass(frozen=True, kw_only=True)
class PlanShape:
    """The sizes that every kernel of the plan needs: W, C, K, E and this rank r, and what follows from them."""

    rank: int
    world_size: int
    max_tokens: int
    top_k: int
    num_experts: int

    @property
    def experts_per_rank(self) -> int:
        """Experts of one rank, e."""
        return self.num_experts // self.world_size

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile, a power of two."""
        return max(1, TILE_SLOTS // triton.next_power_of_2(self.top_k))

    @property
    def tiles_per_rank(self) -> int:
        """Tiles that hold the C tokens of a rank."""
        return triton.cdiv(self.max_tokens, self.tile_tokens)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """What the kernels take alike: tiles of a rank, E, e and W."""
        return self.tiles_per_rank, self.num_experts, self.experts_per_rank, self.world_size

    def tile_constants(self) -> dict[str, int]:
        """Constants of the kernels that go over tiles."""
        # Room for E bins and one for dropped slots.
        padded_k, experts = triton.next_power_of_2(self.top_k), triton.next_power_of_2(self.num_experts + 1)
        return {"K": self.top_k, "K_PADDED": padded_k, "TOKENS": self.tile_tokens, "EXPERTS_PADDED": experts}


@dataclass(frozen=True, kw_only=True, eq=False)
class TileCounts:
    """Ids of the group (W, C, K), counts of the tiles before each tile (tiles, E + W) and of all (E + W,), and scores.

    scores: (W, C, K) fp32, if they came with the ids; unspecified for tokens that do not exist.
    """

    expert_ids: Tensor
    before: Tensor
    totals: Tensor
    scores: Tensor | None


def gathered_counts(
    topk_idx_TK: Tensor, shape: PlanShape, workspace: Workspace, device_errors: Tensor, scores_TK: Tensor | None = None
) -> TileCounts:
    """Collective. Exchange the ids, and scores if given, and run the kernels up to the totals."""
    room, device = shape.max_tokens * shape.top_k, topk_idx_TK.device
    staged = workspace.reserve("ids", room * INDEX_BYTES)
    staged_scores = None if scores_TK is None else workspace.reserve(SCORES, room * FP32_BYTES)
    workspace.barrier_before_write()
    pointers = (topk_idx_TK.contiguous(), staged.rows(shape.rank, (room,), INDEX_DTYPE))
    grid, sizes = (triton.cdiv(room, STAGE_BLOCK),), (topk_idx_TK.numel(), room, shape.num_experts)
    launch(stage_ids_kernel, grid, *pointers, *sizes, device=device, BLOCK=STAGE_BLOCK)
    if scores_TK is not None and staged_scores is not None:
        stage_scores(scores_TK, staged_scores)
    workspace.barrier_after_write()
    expert_ids_WCK = torch.empty((shape.world_size, shape.max_tokens, shape.top_k), dtype=INDEX_DTYPE, device=device)
    tiles, bins = shape.world_size * shape.tiles_per_rank, shape.num_experts + shape.world_size
    before = torch.empty((tiles, bins), dtype=INDEX_DTYPE, device=device)
    totals = torch.empty(bins, dtype=INDEX_DTYPE, device=device)
    of_tiles = (staged.addresses, expert_ids_WCK, before, device_errors, shape.max_tokens, *shape.sizes)
    launch(count_kernel, (tiles,), *of_tiles, device=device, **shape.tile_constants())
    grid, constants = (triton.cdiv(bins, SCAN_BINS),), {"TILES": SCAN_TILES, "BINS": SCAN_BINS}
    launch(scan_kernel, grid, before, totals, tiles, bins, device=device, **constants)
    scores_WCK = None if staged_scores is None else gather_staged_scores(staged_scores, expert_ids_WCK)
    return TileCounts(expert_ids=expert_ids_WCK, before=before, totals=totals, scores=scores_WCK)


def new_plan(
    counts: TileCounts, shape: PlanShape, *, num_tokens: int, row_capacity: int, new: Callable[..., Tensor]
) -> RoutingPlan:
    """This rank's plan with the ids and counts of ``counts``, and its other fields made by ``new``."""

    def field(*sizes: int) -> Tensor:
        return new(sizes, dtype=INDEX_DTYPE, device=counts.totals.device)

    return RoutingPlan(
        rank=shape.rank,
        num_tokens=num_tokens,
        expert_ids=counts.expert_ids,
        counts=counts.totals[: shape.num_experts],
        row_of_slot=field(*counts.expert_ids.shape),
        group_ends=field(shape.experts_per_rank),
        slot_of_row=field(row_capacity),
        pair_tokens=field(shape.world_size, shape.world_size),
        packed_of_token=field(shape.world_size, shape.max_tokens),
    )


def placed_plan(
    counts: TileCounts, shape: PlanShape, *, num_tokens: int, row_capacity: int, max_rows: int, device_errors: Tensor
) -> RoutingPlan:
    """This rank's plan with R = ``row_capacity``. max_rows: the rows of a rank above which ``device_errors`` is set."""
    plan = new_plan(counts, shape, num_tokens=num_tokens, row_capacity=row_capacity, new=torch.empty)
    scanned, device = (counts.before, counts.totals), counts.totals.device
    pointers = (plan.expert_ids, *scanned, plan.row_of_slot, plan.slot_of_row, plan.packed_of_token)
    sizes = (shape.rank, shape.max_tokens, *shape.sizes, row_capacity)
    constants = shape.tile_constants() | {"COMPARED": COMPARED_SLOTS, "num_warps": PLACE_WARPS}
    launch(place_kernel, (counts.before.shape[0],), *pointers, *sizes, device=device, **constants)
    small = (*scanned, plan.group_ends, plan.pair_tokens, device_errors)
    padded = {"RANKS_PADDED": triton.next_power_of_2(shape.world_size), "EXPERTS_PADDED": constants["EXPERTS_PADDED"]}
    launch(totals_kernel, (shape.world_size,), *small, shape.rank, *shape.sizes, max_rows, device=device, **padded)
    return plan


def empty_plan(shape: PlanShape, device: torch.device) -> RoutingPlan:
    """The plan of a group in which no rank has a token."""
    none_WCK = torch.zeros((shape.world_size, 0, shape.top_k), dtype=INDEX_DTYPE, device=device)
    totals = torch.zeros(shape.num_experts + shape.world_size, dtype=INDEX_DTYPE, device=device)
    counts = TileCounts(expert_ids=none_WCK, before=totals.new_zeros((0, len(totals))), totals=totals, scores=None)
    return new_plan(counts, shape, num_tokens=0, row_capacity=0, new=torch.zeros)
