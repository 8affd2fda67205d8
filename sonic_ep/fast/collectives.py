"""Collectives over shared memory: scores to all ranks, one number of each slot home, one word of each rank to all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.fast.device_functions import peer_pointer
from sonic_ep.fast.launch import launch
from sonic_ep.fast.symmetric_memory import SharedBuffer
from sonic_ep.fast.workspace import Workspace
from sonic_ep.plan import RoutingPlan

BLOCK = 1024
TOKENS = "tokens"
SCORES = "scores"
VALUES = "values_of_slots"


@triton.jit(do_not_specialize=["numbers"])
def gather_kernel(staged_ptr, gathered_ptr, numbers, BLOCK: tl.constexpr):
    """``numbers`` words of every rank, one behind the other. Grid (ceil(numbers / BLOCK), W).

    staged_ptr (W,) int64: addresses of what each rank staged. gathered_ptr (W, numbers).
    """
    source = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # The mask covers whole groups of 4 words, so loads stay 16 bytes wide; shared buffers are padded to 512 bytes.
    word = tl.load(peer_pointer(staged_ptr, source, gathered_ptr) + place, mask=place // 4 * 4 < numbers)
    tl.store(gathered_ptr + source.to(tl.int64) * numbers + place, word, mask=place < numbers)


def gather_scores(scores_TK: Tensor, plan: RoutingPlan, workspace: Workspace) -> Tensor:
    """Collective. The scores of the group, (W, C, K) fp32; those of tokens that do not exist are unspecified."""
    staged = reserve_scores(plan.max_tokens, plan.top_k, workspace)
    workspace.barrier_before_write()
    stage_scores(scores_TK, staged)
    workspace.barrier_after_write()
    return gather_staged_scores(staged, plan.expert_ids)


def stage_scores(scores_TK: Tensor, staged: SharedBuffer) -> None:
    """This rank's scores (T, K), any float, to where all can read them, between a fence and a publish."""
    staged.rows(staged.rank, tuple(scores_TK.shape), torch.float32).copy_(scores_TK)


def gather_staged_scores(staged: SharedBuffer, expert_ids_WCK: Tensor) -> Tensor:
    """What every rank has staged, (W, C, K) fp32 as the ids are; unspecified for tokens that do not exist."""
    scores_WCK = torch.empty_like(expert_ids_WCK, dtype=torch.float32)
    world_size, numbers = scores_WCK.shape[0], scores_WCK[0].numel()
    grid = (triton.cdiv(numbers, BLOCK), world_size)
    launch(gather_kernel, grid, staged.addresses, scores_WCK, numbers, device=scores_WCK.device, BLOCK=BLOCK)
    return scores_WCK


def reserve_scores(max_tokens: int, top_k: int, workspace: Workspace) -> SharedBuffer:
    """Collective. Shared memory for one fp32 number of each slot of a rank, on their way to the experts."""
    return workspace.reserve(SCORES, slots_bytes(max_tokens, top_k))


def reserve_values(plan: RoutingPlan, workspace: Workspace) -> SharedBuffer:
    """Collective. Shared memory for one fp32 number of each slot of a rank, on their way home."""
    return workspace.reserve(VALUES, slots_bytes(plan.max_tokens, plan.top_k))


def slots_bytes(max_tokens: int, top_k: int) -> int:
    """Bytes of one fp32 number for each slot of a rank."""
    return max_tokens * top_k * torch.float32.itemsize


@triton.jit(do_not_specialize=["slots_per_rank", "rows"])
def return_to_origin_kernel(
    values_ptr,
    expert_ids_ptr,
    row_of_slot_ptr,
    origins_ptr,
    rank,
    slots_per_rank,
    experts_per_rank,
    rows,
    BLOCK: tl.constexpr,
):
    """The value of each row to its slot's place in the memory of its home. Grid (ceil(C*K / BLOCK), W).

    values_ptr (R,) fp32; homes_ptr (W,) int64: addresses of C*K fp32 on each rank. This rank's own slots are left out.
    """
    home = tl.program_id(1)
    if home != rank:
        slot_at_home = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = slot_at_home < slots_per_rank
        slot = home.to(tl.int64) * slots_per_rank + slot_at_home
        expert = tl.load(expert_ids_ptr + slot, mask=inside, other=-1)
        row = tl.load(row_of_slot_ptr + slot, mask=inside, other=-1)
        mine = (expert >= rank * experts_per_rank) & (expert < (rank + 1) * experts_per_rank) & (row < rows)
        value = tl.load(values_ptr + row, mask=mine)
        tl.store(peer_pointer(origins_ptr, home, values_ptr) + slot_at_home, value, mask=mine)


@triton.jit(do_not_specialize=["first_slot", "slots", "rows"])
def collect_kernel(
    arrived_ptr,
    values_ptr,
    expert_ids_ptr,
    row_of_slot_ptr,
    out_ptr,
    first_slot,
    slots,
    experts_per_rank,
    rows,
    rank,
    BLOCK: tl.constexpr,
):
    """The value of each of this rank's slots: its own row's, or what arrived; zero if dropped. Grid (ceil(T*K/BLOCK),).

    expert_ids_ptr, row_of_slot_ptr (W, C, K), this rank's slots beginning at ``first_slot``; out_ptr (T*K,) fp32.
    """
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    expert = tl.load(expert_ids_ptr + first_slot + slot, mask=inside, other=-1)
    row = tl.load(row_of_slot_ptr + first_slot + slot, mask=inside, other=-1)
    first = rank * experts_per_rank
    owner_is_me = (expert >= first) & (expert < first + experts_per_rank)
    remote = ((expert >= 0) & (expert < first)) | (expert >= first + experts_per_rank)
    own = tl.load(values_ptr + row, mask=owner_is_me & (row < rows), other=0.0)
    # Peers wrote it while kernels of this rank ran: past the first-level cache, which knows nothing of them.
    arrived = tl.load(arrived_ptr + slot, mask=inside & remote, other=0.0, cache_modifier=".cg")
    tl.store(out_ptr + slot, tl.where(owner_is_me, own, arrived), mask=inside)


def return_to_origin(value_of_row_R: Tensor, plan: RoutingPlan, workspace: Workspace) -> Tensor:
    """Collective. One fp32 value of each valid row to its slot's home, (T, K); zero for dropped slots.

    What crosses the link is one float for each remote slot. Values past the valid rows are not read.
    """
    home = reserve_values(plan, workspace)
    slots_per_rank = plan.max_tokens * plan.top_k
    out_TK = value_of_row_R.new_empty((plan.num_tokens, plan.top_k))
    device = out_TK.device
    sizes = (slots_per_rank, plan.experts_per_rank, plan.row_capacity)
    if plan.world_size > 1:
        workspace.barrier_before_write()
        grid = (triton.cdiv(slots_per_rank, BLOCK), plan.world_size)
        routing = (plan.expert_ids, plan.row_of_slot)
        launch(
            return_to_origin_kernel,
            grid,
            value_of_row_R,
            *routing,
            home.addresses,
            plan.rank,
            *sizes,
            device=device,
            BLOCK=BLOCK,
        )
        workspace.barrier_after_write()
    launch(
        collect_kernel,
        (triton.cdiv(out_TK.numel(), BLOCK),),
        home.rows(plan.rank, (slots_per_rank,), torch.float32),
        value_of_row_R,
        plan.expert_ids,
        plan.row_of_slot,
        out_TK,
        plan.rank * slots_per_rank,
        out_TK.numel(),
        plan.experts_per_rank,
        plan.row_capacity,
        plan.rank,
        device=device,
        BLOCK=BLOCK,
    )
    return out_TK


BLOCK = 1024
SUMMANDS = "summands"


@triton.jit
def sum_ranks_kernel(staged_ptr, sum_ptr, width, world_size, BLOCK: tl.constexpr):
    """``width`` sums over the ranks, added in ascending order of rank. Grid (ceil(width / BLOCK),).

    staged_ptr (W,) int64: addresses of what each rank staged, (width,) fp32. sum_ptr (width,) fp32.

    Three ranks that staged 1e8, 1 and -1e8 have the sum 0: 1e8 swallows the 1 before it is taken away.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    # Peers wrote it while kernels of this rank ran: past the first-level cache, which knows nothing of them.
    total = tl.load(peer_pointer(staged_ptr, 0, sum_ptr) + place, mask=inside, cache_modifier=".cg")
    for rank in range(1, world_size):
        total += tl.load(peer_pointer(staged_ptr, rank, sum_ptr) + place, mask=inside, cache_modifier=".cg")
    tl.store(sum_ptr + place, total, mask=inside)


def reserve_sum(workspace: Workspace, numel: int) -> SharedBuffer | None:
    """Collective. Shared memory for ``sum_over_ranks`` of ``numel`` numbers; None for one rank, which needs none."""
    if workspace.group.world_size == 1:
        return None
    return workspace.reserve(SUMMANDS, numel * torch.float32.itemsize)


def sum_over_ranks(values: Tensor, workspace: Workspace) -> Tensor:
    """Collective. ``values`` of all ranks, fp32, contiguous and of one shape, summed in ascending order of rank.

    1e8, 1 and -1e8 of ranks 0 1 2 give (1e8 + 1) - 1e8 = 0 on each of them. The values themselves for one rank.
    """
    group = workspace.group
    staged = reserve_sum(workspace, values.numel())
    if staged is None:
        return values
    workspace.barrier_before_write()
    staged.rows(group.rank, tuple(values.shape), torch.float32).copy_(values)
    workspace.barrier_after_write()
    total = torch.empty_like(values)
    grid = (triton.cdiv(values.numel(), BLOCK),)
    sizes = (values.numel(), group.world_size)
    launch(sum_ranks_kernel, grid, staged.addresses, total, *sizes, device=values.device, BLOCK=BLOCK)
    return total


def reserve_tokens(workspace: Workspace, max_tokens: int, row_bytes: int, name: str = TOKENS) -> SharedBuffer:
    """Collective. Shared memory for the C tokens of each rank; none to speak of where there is nobody to read it."""
    return workspace.reserve(name, max_tokens * row_bytes if workspace.group.world_size > 1 else 0)


def stage_tokens(x_TH: Tensor, max_tokens: int, workspace: Workspace, name: str = TOKENS) -> SharedBuffer:
    """Collective. x (T, H) of every rank where all can read it, until the next call stages there."""
    staged = reserve_tokens(workspace, max_tokens, x_TH.shape[1] * x_TH.element_size(), name)
    group = workspace.group
    if group.world_size > 1:
        workspace.barrier_before_write()
        staged.rows(group.rank, tuple(x_TH.shape), x_TH.dtype).copy_(x_TH)
        workspace.barrier_after_write()
    return staged
