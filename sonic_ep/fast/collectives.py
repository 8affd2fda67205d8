"""Collectives over shared memory: scores and tokens of every rank to all, and values of slots back."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.fast.device_functions import peer_pointer
from sonic_ep.fast.launch import launch, triton_kernel
from sonic_ep.fast.symmetric_memory import SharedBuffer
from sonic_ep.fast.workspace import Workspace
from sonic_ep.plan import RoutingPlan

BLOCK = 1024
FP32_BYTES = torch.float32.itemsize
# Names of shared buffers.
TOKENS, SCORES, VALUES = "tokens", "scores", "values_of_slots"


@triton_kernel
def gather_kernel(staged_ptr, gathered_ptr, numbers, BLOCK: tl.constexpr):
    """Gather the ``numbers`` that each rank has staged, by rank. Grid (ceil(numbers / BLOCK), W).

    staged_ptr (W,) int64: addresses of each rank's numbers, of 4 bytes each. gathered_ptr (W, numbers).
    """
    source = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # The mask covers whole groups of 4, so loads are 16 bytes wide; shared buffers are padded to 512 bytes.
    number = tl.load(peer_pointer(staged_ptr, source, gathered_ptr) + place, mask=place // 4 * 4 < numbers)
    tl.store(gathered_ptr + source.to(tl.int64) * numbers + place, number, mask=place < numbers)


def gather_scores(scores_TK: Tensor, plan: RoutingPlan, workspace: Workspace) -> Tensor:
    """Collective. The scores of the group, (W, C, K) fp32; unspecified for tokens that do not exist."""
    staged = workspace.reserve(SCORES, plan.max_tokens * plan.top_k * FP32_BYTES)
    workspace.barrier_before_write()
    stage_scores(scores_TK, staged)
    workspace.barrier_after_write()
    return gather_staged_scores(staged, plan.expert_ids)


def stage_scores(scores_TK: Tensor, staged: SharedBuffer) -> None:
    """Copy this rank's scores (T, K), any float, to shared memory as fp32; needs a barrier before and after."""
    staged.rows(staged.rank, tuple(scores_TK.shape), torch.float32).copy_(scores_TK)


def gather_staged_scores(staged: SharedBuffer, expert_ids_WCK: Tensor) -> Tensor:
    """The scores that every rank has staged, (W, C, K) fp32; unspecified for tokens that do not exist."""
    scores_WCK = torch.empty_like(expert_ids_WCK, dtype=torch.float32)
    world_size, numbers = scores_WCK.shape[0], scores_WCK[0].numel()
    grid = (triton.cdiv(numbers, BLOCK), world_size)
    launch(gather_kernel, grid, staged.addresses, scores_WCK, numbers, device=scores_WCK.device, BLOCK=BLOCK)
    return scores_WCK


@triton_kernel
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
    """Write the value of each row of a remote slot to that slot on its origin rank. Grid (ceil(C*K / BLOCK), W).

    values_ptr (R,) fp32; origins_ptr (W,) int64: addresses of C*K fp32 on each rank.
    """
    origin = tl.program_id(1)
    if origin != rank:
        slot_of_origin = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = slot_of_origin < slots_per_rank
        slot = origin.to(tl.int64) * slots_per_rank + slot_of_origin
        expert = tl.load(expert_ids_ptr + slot, mask=inside, other=-1)
        row = tl.load(row_of_slot_ptr + slot, mask=inside, other=-1)
        mine = (expert >= rank * experts_per_rank) & (expert < (rank + 1) * experts_per_rank) & (row < rows)
        value = tl.load(values_ptr + row, mask=mine)
        tl.store(peer_pointer(origins_ptr, origin, values_ptr) + slot_of_origin, value, mask=mine)


@triton_kernel
def collect_kernel(
    received_ptr,
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
    """The value of each of this rank's slots, from its own row or as received; 0 if dropped. Grid (ceil(T*K / BLOCK),).

    received_ptr (C*K,), out_ptr (T*K,) fp32. expert_ids_ptr, row_of_slot_ptr (W, C, K): own slots from ``first_slot``.
    """
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    expert = tl.load(expert_ids_ptr + first_slot + slot, mask=inside, other=-1)
    row = tl.load(row_of_slot_ptr + first_slot + slot, mask=inside, other=-1)
    first = rank * experts_per_rank
    owner_is_me = (expert >= first) & (expert < first + experts_per_rank)
    remote = ((expert >= 0) & (expert < first)) | (expert >= first + experts_per_rank)
    own = tl.load(values_ptr + row, mask=owner_is_me & (row < rows), other=0.0)
    # Past the first-level cache: it does not see what peers wrote while kernels of this rank ran.
    received = tl.load(received_ptr + slot, mask=inside & remote, other=0.0, cache_modifier=".cg")
    tl.store(out_ptr + slot, tl.where(owner_is_me, own, received), mask=inside)


def return_to_origin(value_of_row_R: Tensor, plan: RoutingPlan, workspace: Workspace) -> Tensor:
    """Collective. One fp32 value of each valid row to its slot's origin rank, (T, K); 0 for dropped slots."""
    slots_per_rank, device = plan.max_tokens * plan.top_k, value_of_row_R.device
    origin = workspace.reserve(VALUES, slots_per_rank * FP32_BYTES)
    out_TK = value_of_row_R.new_empty((plan.num_tokens, plan.top_k))
    routing, of_experts = (plan.expert_ids, plan.row_of_slot), (plan.experts_per_rank, plan.row_capacity)
    if plan.world_size > 1:
        workspace.barrier_before_write()
        sent = (value_of_row_R, *routing, origin.addresses, plan.rank, slots_per_rank, *of_experts)
        grid = (triton.cdiv(slots_per_rank, BLOCK), plan.world_size)
        launch(return_to_origin_kernel, grid, *sent, device=device, BLOCK=BLOCK)
        workspace.barrier_after_write()
    received = (origin.rows(plan.rank, (slots_per_rank,), torch.float32), value_of_row_R, *routing, out_TK)
    sizes = (plan.rank * slots_per_rank, out_TK.numel(), *of_experts, plan.rank)
    launch(collect_kernel, (triton.cdiv(out_TK.numel(), BLOCK),), *received, *sizes, device=device, BLOCK=BLOCK)
    return out_TK


def reserve_tokens(workspace: Workspace, max_tokens: int, row_bytes: int, name: str = TOKENS) -> SharedBuffer:
    """Collective. Shared memory for the C tokens of each rank; empty for one rank, which has no peer to read it."""
    return workspace.reserve(name, max_tokens * row_bytes if workspace.group.world_size > 1 else 0)


def stage_tokens(x_TH: Tensor, max_tokens: int, workspace: Workspace, name: str = TOKENS) -> SharedBuffer:
    """Collective. x (T, H) of every rank in shared memory, until the next call with this ``name``."""
    staged = reserve_tokens(workspace, max_tokens, x_TH.shape[1] * x_TH.element_size(), name)
    group = workspace.group
    if group.world_size > 1:
        workspace.barrier_before_write()
        staged.rows(group.rank, tuple(x_TH.shape), x_TH.dtype).copy_(x_TH)
        workspace.barrier_after_write()
    return staged
