"""Sums over ranks, added in ascending order of rank: of gradients that come in parts and in the dtypes of weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.fast.device_functions import peer_pointer, rounded
from sonic_ep.fast.launch import launch, triton_kernel
from sonic_ep.fast.symmetric_memory import Staging
from sonic_ep.fast.sync import staged_at
from sonic_ep.fast.workspace import Workspace

BLOCK = 1024
FP32_BYTES = torch.float32.itemsize
# Name of the shared buffer.
SUMMANDS = "summands"


@dataclass(frozen=True, kw_only=True, eq=False)
class Summand:
    """What this rank adds to one sum: its own sum of ``parts`` (P, numel) fp32, contiguous, in any shape.

    shape, dtype: of the result.
    """

    parts: Tensor
    shape: torch.Size
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """P."""
        return self.parts.numel() // self.shape.numel()

    def new_result(self) -> Tensor:
        """Memory for the result."""
        return self.parts.new_empty(self.shape, dtype=self.dtype)


@triton.jit
def sum_of_parts(parts_ptr, place, numel, inside, PARTS: tl.constexpr):
    """The sum of PARTS (numel,) fp32 at ``place``, in ascending order from 0, as ``torch.sum`` adds so few."""
    total = tl.zeros(place.shape, tl.float32)
    for _ in tl.static_range(PARTS):
        total += tl.load(parts_ptr + place, mask=inside, other=0.0)
        parts_ptr += numel
    return total


@triton_kernel
def sum_parts_kernel(parts_ptr, sum_ptr, numel, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of parts_ptr (PARTS, numel) fp32, rounded to the type of sum_ptr (numel,). Grid (ceil(numel / BLOCK),).

    Parts 1, 2^-9 and 2^-20 in fp32 are 1 + 2^-9 + 2^-20; in bf16, 1.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numel
    total = sum_of_parts(parts_ptr, place, numel, inside, PARTS)
    tl.store(sum_ptr + place, rounded(total, sum_ptr), mask=inside)


@triton_kernel
def stage_sums_kernel(
    first_ptr,
    second_ptr,
    staged_ptr,
    epoch_ptr,
    first,
    second,
    rank,
    world_size,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stage this rank's sums for its peers: those of first_ptr (PARTS, first), then second_ptr (second,), all fp32.

    Grid (ceil((first + second) / BLOCK),). staged_ptr (2 * W,) int64 and epoch_ptr () int32: see ``staged_at``.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < first + second
    total = sum_of_parts(first_ptr, place, first, place < first, PARTS)
    total += tl.load(second_ptr + place - first, mask=inside & (place >= first), other=0.0)
    mine = peer_pointer(staged_ptr, staged_at(epoch_ptr, world_size, False) + rank, first_ptr)
    tl.store(mine + place, total, mask=inside)


@triton_kernel
def sum_ranks_kernel(
    staged_ptr, epoch_ptr, like_ptr, first_ptr, second_ptr, first, second, world_size, BLOCK: tl.constexpr
):
    """Sums over the ranks of what each has staged, added in ascending order of rank. Grid as ``stage_sums_kernel``.

    first_ptr (first,), second_ptr (second,): the sums, rounded to their types. like_ptr: any fp32.
    Three ranks that staged 1e8, 1 and -1e8 have the sum 0: 1e8 + 1 rounds to 1e8.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < first + second
    staged_ptr += staged_at(epoch_ptr, world_size, True)
    # Past the first-level cache: it does not see what peers wrote while kernels of this rank ran.
    total = tl.load(peer_pointer(staged_ptr, 0, like_ptr) + place, mask=inside, cache_modifier=".cg")
    for rank in range(1, world_size):
        total += tl.load(peer_pointer(staged_ptr, rank, like_ptr) + place, mask=inside, cache_modifier=".cg")
    tl.store(first_ptr + place, rounded(total, first_ptr), mask=place < first)
    tl.store(second_ptr + place - first, rounded(total, second_ptr), mask=inside & (place >= first))


def reserve_sum(workspace: Workspace, numel: int) -> Staging | None:
    """Collective. Shared memory for ``sum_over_ranks`` of ``numel`` numbers; None for one rank, which needs none."""
    return None if workspace.group.world_size == 1 else workspace.staging(SUMMANDS, numel * FP32_BYTES)


def sum_parts(summand: Summand) -> Tensor:
    """This rank's sum. Not collective."""
    if summand.parts.shape == summand.shape and summand.dtype == torch.float32:
        return summand.parts
    total, numel, device = summand.new_result(), summand.shape.numel(), summand.parts.device
    grid, constants = (triton.cdiv(numel, BLOCK),), {"PARTS": summand.count, "BLOCK": BLOCK}
    launch(sum_parts_kernel, grid, summand.parts, total, numel, device=device, **constants)
    return total


def sum_over_ranks(summands: Sequence[Summand], workspace: Workspace) -> list[Tensor]:
    """Collective. The sums over ranks of one summand, or of two, of which the second comes in one part."""
    first, second = summands[0], summands[-1]
    sizes = [summand.shape.numel() for summand in summands]
    staging = reserve_sum(workspace, sum(sizes))
    if staging is None:
        return [sum_parts(summand) for summand in summands]
    numbers, device = (sizes[0], sum(sizes[1:])), first.parts.device
    grid, world_size = (triton.cdiv(sum(sizes), BLOCK),), workspace.group.world_size
    halves = (staging.addresses, workspace.epoch)
    stage = (first.parts, second.parts, *halves, *numbers, workspace.group.rank, world_size)
    launch(stage_sums_kernel, grid, *stage, device=device, PARTS=first.count, BLOCK=BLOCK)
    workspace.barrier_after_write()
    totals = [summand.new_result() for summand in summands]
    of_ranks = (*halves, first.parts, totals[0], totals[-1], *numbers, world_size)
    launch(sum_ranks_kernel, grid, *of_ranks, device=device, BLOCK=BLOCK)
    return totals
