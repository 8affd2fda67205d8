"""The routing plan in Triton: a stable counting sort over all slots of the group, with no read on the host.

Ids, and scores where the caller has them by then, travel in one exchange: every rank stages its own in shared memory,
all meet, and every rank reads those of all.
Then three kernels: one counts each tile of slots by expert (and its tokens by rank), one sums the counts of the tiles
before each tile, one gives every slot its row. A tile holds whole tokens of one rank, in the order of their slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sonic_ep.fast.collectives import gather_staged_scores, reserve_scores, stage_scores
from sonic_ep.fast.device import launch, pieces, power_of_two
from sonic_ep.fast.plan_kernels import count_kernel, place_kernel, scan_kernel, stage_ids_kernel, totals_kernel
from sonic_ep.fast.workspace import SharedBuffer, Workspace
from sonic_ep.plan import INDEX_DTYPE, NO_ROW, RoutingPlan

# Slots of a tile, those compared with each other at a time, and tiles and bins that the scan takes at a time. Placing
# is a chain of short steps, one warp wide: more lanes would compare more pairs, more warps would wait for each other.
TILE_SLOTS = 512
COMPARED_SLOTS = 32
PLACE_WARPS = 1
SCAN_TILES = 512
SCAN_BINS = 4
STAGE_BLOCK = 1024


@dataclass(frozen=True, kw_only=True)
class PlanShape:
    """The sizes that every kernel of the plan needs: W, C, K, E and this rank r, and what follows from them."""

    rank: int
    world_size: int
    capacity: int
    top_k: int
    num_experts: int

    @property
    def experts_per_rank(self) -> int:
        """Experts of one rank, e."""
        return self.num_experts // self.world_size

    @property
    def padded_k(self) -> int:
        """K, to a power of two."""
        return power_of_two(self.top_k)

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile, a power of two."""
        return max(1, TILE_SLOTS // self.padded_k)

    @property
    def tiles_per_rank(self) -> int:
        """Tiles that hold the C tokens of a rank."""
        return pieces(self.capacity, self.tile_tokens)

    @property
    def tiles(self) -> int:
        """Tiles of the group."""
        return self.world_size * self.tiles_per_rank

    @property
    def bins(self) -> int:
        """What is counted in each tile: slots of E experts, then tokens of W ranks."""
        return self.num_experts + self.world_size

    @property
    def padded_experts(self) -> int:
        """A power of two with room for E and one more, where dropped slots are counted."""
        return power_of_two(self.num_experts + 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class TileCounts:
    """Ids of the group (W, C, K), counts of the tiles before each tile (tiles, E + W), and of all tiles (E + W,).

    scores: (W, C, K) fp32, if they came with the ids; unspecified for tokens that do not exist.
    """

    expert_ids: Tensor
    before: Tensor
    totals: Tensor
    scores: Tensor | None


def gathered_counts(
    topk_idx_TK: Tensor, shape: PlanShape, workspace: Workspace, verdict: Tensor, scores_TK: Tensor | None = None
) -> TileCounts:
    """Collective. Exchange the ids, and scores if there are any, and count, up to the totals of experts and pairs."""
    device = topk_idx_TK.device
    staged = workspace.reserve("ids", shape.capacity * shape.top_k * INDEX_DTYPE.itemsize)
    staged_scores = None if scores_TK is None else reserve_scores(shape.capacity, shape.top_k, workspace)
    workspace.fence()
    _stage(topk_idx_TK.contiguous(), shape, staged)
    if scores_TK is not None and staged_scores is not None:
        stage_scores(scores_TK, staged_scores)
    workspace.publish()
    expert_ids_WCK = torch.empty((shape.world_size, shape.capacity, shape.top_k), dtype=INDEX_DTYPE, device=device)
    before = torch.empty((shape.tiles, shape.bins), dtype=INDEX_DTYPE, device=device)
    totals = torch.empty(shape.bins, dtype=INDEX_DTYPE, device=device)
    launch(
        count_kernel,
        (shape.tiles,),
        staged.addresses,
        expert_ids_WCK,
        before,
        verdict,
        shape.capacity,
        shape.tiles_per_rank,
        shape.num_experts,
        shape.experts_per_rank,
        shape.world_size,
        device=device,
        **_tile_constants(shape),
    )
    scan_grid = (pieces(shape.bins, SCAN_BINS),)
    launch(
        scan_kernel, scan_grid, before, totals, shape.tiles, shape.bins, device=device, TILES=SCAN_TILES, BINS=SCAN_BINS
    )
    scores_WCK = None if staged_scores is None else gather_staged_scores(staged_scores, expert_ids_WCK)
    return TileCounts(expert_ids=expert_ids_WCK, before=before, totals=totals, scores=scores_WCK)


def placed_plan(
    counts: TileCounts, shape: PlanShape, *, num_tokens: int, row_capacity: int, max_rows: int, verdict: Tensor
) -> RoutingPlan:
    """This rank's plan with R = ``row_capacity``, from the counts. Not collective; no read on the host.

    max_rows: rows of one rank past which ``verdict`` says so.
    """
    device = counts.totals.device

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=INDEX_DTYPE, device=device)

    plan = RoutingPlan(
        rank=shape.rank,
        num_tokens=num_tokens,
        expert_ids=counts.expert_ids,
        counts=counts.totals[: shape.num_experts],
        row_of_slot=empty(*counts.expert_ids.shape),
        group_ends=empty(shape.experts_per_rank),
        slot_of_row=empty(row_capacity),
        pair_tokens=empty(shape.world_size, shape.world_size),
        packed_of_token=empty(shape.world_size, shape.capacity),
    )
    sizes = (shape.tiles_per_rank, shape.num_experts, shape.experts_per_rank, shape.world_size)
    launch(
        place_kernel,
        (shape.tiles,),
        plan.expert_ids,
        counts.before,
        counts.totals,
        plan.row_of_slot,
        plan.slot_of_row,
        plan.packed_of_token,
        shape.rank,
        shape.capacity,
        *sizes,
        row_capacity,
        device=device,
        COMPARED=COMPARED_SLOTS,
        num_warps=PLACE_WARPS,
        **_tile_constants(shape),
    )
    launch(
        totals_kernel,
        (shape.world_size,),
        counts.before,
        counts.totals,
        plan.group_ends,
        plan.pair_tokens,
        verdict,
        shape.rank,
        *sizes,
        max_rows,
        device=device,
        EXPERTS_PADDED=shape.padded_experts,
        RANKS_PADDED=power_of_two(shape.world_size),
    )
    return plan


def empty_plan(shape: PlanShape, topk_idx_TK: Tensor) -> RoutingPlan:
    """The plan of a group in which no rank has a token."""

    def filled(value: int, *sizes: int) -> Tensor:
        return torch.full(sizes, value, dtype=INDEX_DTYPE, device=topk_idx_TK.device)

    return RoutingPlan(
        rank=shape.rank,
        num_tokens=0,
        expert_ids=filled(NO_ROW, shape.world_size, 0, shape.top_k),
        counts=filled(0, shape.num_experts),
        row_of_slot=filled(NO_ROW, shape.world_size, 0, shape.top_k),
        group_ends=filled(0, shape.experts_per_rank),
        slot_of_row=filled(NO_ROW, 0),
        pair_tokens=filled(0, shape.world_size, shape.world_size),
        packed_of_token=filled(NO_ROW, shape.world_size, 0),
    )


def _tile_constants(shape: PlanShape) -> dict[str, int]:
    return {
        "K": shape.top_k,
        "K_PADDED": shape.padded_k,
        "TOKENS": shape.tile_tokens,
        "EXPERTS_PADDED": shape.padded_experts,
    }


def _stage(topk_idx_TK: Tensor, shape: PlanShape, staged: SharedBuffer) -> None:
    room = shape.capacity * shape.top_k
    launch(
        stage_ids_kernel,
        (pieces(room, STAGE_BLOCK),),
        topk_idx_TK,
        staged.rows(shape.rank, (room,), INDEX_DTYPE),
        topk_idx_TK.numel(),
        room,
        shape.num_experts,
        device=topk_idx_TK.device,
        BLOCK=STAGE_BLOCK,
    )
