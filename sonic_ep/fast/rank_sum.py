"""Sums over the ranks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.fast.device_functions import peer_pointer
from sonic_ep.fast.launch import launch, triton_kernel
from sonic_ep.fast.symmetric_memory import SharedBuffer
from sonic_ep.fast.workspace import Workspace

BLOCK = 1024
FP32_BYTES = torch.float32.itemsize
SUMMANDS = "summands"


@triton_kernel
def sum_ranks_kernel(staged_ptr, sum_ptr, width, world_size, BLOCK: tl.constexpr):
    """``width`` sums over the ranks, added in ascending order of rank. Grid (ceil(width / BLOCK),).

    staged_ptr (W,) int64: addresses of what each rank staged, (width,) fp32. sum_ptr (width,) fp32.
    Three ranks that staged 1e8, 1 and -1e8 have the sum 0: 1e8 + 1 rounds to 1e8.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    # Past the first-level cache: it does not see what peers wrote while kernels of this rank ran.
    total = tl.load(peer_pointer(staged_ptr, 0, sum_ptr) + place, mask=inside, cache_modifier=".cg")
    for rank in range(1, world_size):
        total += tl.load(peer_pointer(staged_ptr, rank, sum_ptr) + place, mask=inside, cache_modifier=".cg")
    tl.store(sum_ptr + place, total, mask=inside)


def reserve_sum(workspace: Workspace, numel: int) -> SharedBuffer | None:
    """Collective. Shared memory for ``sum_over_ranks`` of ``numel`` numbers; None for one rank, which needs none."""
    return None if workspace.group.world_size == 1 else workspace.reserve(SUMMANDS, numel * FP32_BYTES)


def sum_over_ranks(values: Tensor, workspace: Workspace) -> Tensor:
    """Collective. The sum of all ranks' ``values`` (fp32, contiguous, of one shape), see ``sum_ranks_kernel``."""
    group = workspace.group
    staged = reserve_sum(workspace, values.numel())
    if staged is None:
        return values
    workspace.barrier_before_write()
    staged.rows(group.rank, tuple(values.shape), torch.float32).copy_(values)
    workspace.barrier_after_write()
    total = torch.empty_like(values)
    grid, sizes = (triton.cdiv(values.numel(), BLOCK),), (values.numel(), group.world_size)
    launch(sum_ranks_kernel, grid, staged.addresses, total, *sizes, device=values.device, BLOCK=BLOCK)
    return total
