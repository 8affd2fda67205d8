"""The routing plan in Triton: a stable counting sort over all slots of the group, with no read on the host.

Every rank has staged its ids (and scores) in shared memory and reads those of all. One kernel counts each tile of slots
by expert and its tokens by rank, one sums the counts of the tiles before each, one gives every slot its row. A tile
holds whole tokens of one rank, in slot order.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import triton
from torch import Tensor

from sonic_ep.fast.counting_sort import count_kernel, place_kernel, scan_kernel
from sonic_ep.fast.launch import LAUNCHERS_KEPT, Launcher
from sonic_ep.fast.staging import StagedCall
from sonic_ep.fast.workspace import Workspace
from sonic_ep.plan import INDEX_DTYPE, RoutingPlan

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
