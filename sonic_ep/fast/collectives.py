"""Collectives over shared memory: tokens of every rank to all, and values of rows back to their slots."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.fast.device_functions import peer_pointer
from sonic_ep.fast.launch import LAUNCHERS_KEPT, Launcher, triton_kernel
from sonic_ep.fast.staging import stage_rows
from sonic_ep.fast.symmetric_memory import SharedBuffer, Staging
from sonic_ep.fast.workspace import Workspace
from sonic_ep.plan import RoutingPlan

BLOCK = 1024
FP32_BYTES = torch.float32.itemsize
# Names of shared buffers. Copy engines read a buffer of their own, whose addresses the host has to know.
TOKENS, SCORES, VALUES, COPIED_TOKENS = "tokens", "scores", "values_of_slots", "tokens_of_copy_engines"


@triton.jit
def returned_values(
    slot, own_slot, inside, origins_ptr, values_ptr, expert_ids_ptr, row_of_slot_ptr, rank, experts_per_rank, rows
):
    """The value of each of this rank's slots: of its own row, as received from the rank that has the row, or 0.

    slot: of the group; own_slot: among this rank's. origins_ptr: as of ``push_value``; values_ptr (R,) fp32.
    """
    first_expert = rank * experts_per_rank
    expert = tl.load(expert_ids_ptr + slot, mask=inside, other=-1)
    row = tl.load(row_of_slot_ptr + slot, mask=inside, other=-1)
    is_mine = (expert >= first_expert) & (expert < first_expert + experts_per_rank)
    own = tl.load(values_ptr + row, mask=is_mine & (row < rows), other=0.0)
    # Past the first-level cache: it does not see what peers wrote while kernels of this rank ran.
    received_ptr = peer_pointer(origins_ptr, rank, values_ptr)
    remote = inside & (expert >= 0) & (is_mine == 0)
    received = tl.load(received_ptr + own_slot, mask=remote, other=0.0, cache_modifier=".cg")
    return tl.where(is_mine, own, received)


@triton_kernel
def collect_kernel(
    origins_ptr,
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
    """``returned_values`` of all slots of this rank. Grid (ceil(T*K / BLOCK),).

    out_ptr (T*K,) fp32. expert_ids_ptr, row_of_slot_ptr (W, C, K): own slots from ``first_slot``.
    """
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    of_group = first_slot + slot
    value = returned_values(
        of_group, slot, inside, origins_ptr, values_ptr, expert_ids_ptr, row_of_slot_ptr, rank, experts_per_rank, rows
    )
    tl.store(out_ptr + slot, value, mask=inside)


@lru_cache(LAUNCHERS_KEPT)
def _collect(device: torch.device) -> Launcher:
    return Launcher(collect_kernel, device, {"BLOCK": BLOCK})


def reserve_values(workspace: Workspace, max_tokens: int, top_k: int) -> SharedBuffer:
    """Collective. Shared memory for a value of each of this rank's slots."""
    return workspace.reserve(VALUES, max_tokens * top_k * FP32_BYTES)


def collect_values(values_R: Tensor, plan: RoutingPlan, workspace: Workspace) -> Tensor:
    """Collective. The value of each slot's row, (T, K) fp32; 0 for dropped slots.

    All ranks have pushed those of other ranks' slots, see ``push_value``, since their last barrier.
    """
    received = reserve_values(workspace, plan.max_tokens, plan.top_k)
    out_TK = values_R.new_empty((plan.num_tokens, plan.top_k))
    workspace.barrier_after_write()
    slots, first_slot = out_TK.numel(), plan.rank * plan.max_tokens * plan.top_k
    pointers = (received.addresses, values_R, plan.expert_ids, plan.row_of_slot, out_TK)
    sizes = (first_slot, slots, plan.experts_per_rank, plan.row_capacity, plan.rank)
    _collect(values_R.device)((triton.cdiv(slots, BLOCK),), *pointers, *sizes)
    return out_TK


def reserve_tokens(
    workspace: Workspace, max_tokens: int, row_bytes: int, name: str = TOKENS, *, in_turn: bool = True
) -> Staging:
    """Collective. Shared memory for the C tokens of each rank; none for one rank, which has no peer to read it."""
    nbytes = max_tokens * row_bytes if workspace.group.world_size > 1 else 0
    return workspace.staging(name, nbytes, in_turn=in_turn)


def stage_tokens(
    x_TH: Tensor, max_tokens: int, workspace: Workspace, name: str = TOKENS, *, in_turn: bool = True
) -> Staging:
    """Collective. x (T, H) of every rank in shared memory, until the second call with this ``name``.

    in_turn: False for a buffer whose readers have to be done first, see ``Workspace.staging``.
    """
    staging = reserve_tokens(workspace, max_tokens, x_TH.shape[1] * x_TH.element_size(), name, in_turn=in_turn)
    if workspace.group.world_size > 1:
        if not in_turn:
            workspace.barrier_before_write()
        stage_rows(x_TH, staging, workspace)
        workspace.barrier_after_write()
    return staging
