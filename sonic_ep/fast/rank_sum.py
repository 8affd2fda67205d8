"""The sum of one fp32 tensor over the ranks, in their order, so that all of them get the same bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.fast.device import launch, peer_pointer, pieces
from sonic_ep.fast.workspace import SharedBuffer, Workspace

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
    workspace.fence()
    staged.rows(group.rank, tuple(values.shape), torch.float32).copy_(values)
    workspace.publish()
    total = torch.empty_like(values)
    grid = (pieces(values.numel(), BLOCK),)
    sizes = (values.numel(), group.world_size)
    launch(sum_ranks_kernel, grid, staged.addresses, total, *sizes, device=values.device, BLOCK=BLOCK)
    return total
