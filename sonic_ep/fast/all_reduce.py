"""Sums over ranks, added in ascending order of rank: of gradients that come in parts and in the dtypes of weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.fast.device_functions import peer_pointer, rounded
from sonic_ep.fast.launch import LAUNCHERS_KEPT, Launcher, triton_kernel
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
def sum_of_parts(parts_ptr, place, inside, NUMEL: tl.constexpr, PARTS: tl.constexpr):
    """The sum of PARTS (NUMEL,) fp32 at ``place``, in ascending order from 0, as ``torch.sum`` adds so few."""
    total = tl.zeros(place.shape, tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + part * NUMEL + place, mask=inside, other=0.0)
    return total


@triton_kernel
def sum_parts_kernel(parts_ptr, sum_ptr, NUMEL: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of parts_ptr (PARTS, NUMEL) fp32, rounded to the type of sum_ptr (NUMEL,). Grid (ceil(NUMEL / BLOCK),).

    Sizes of weights are constants, so that accesses are wide. Parts 1, 2^-9 and 2^-20 are 1 in bf16.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < NUMEL
    total = sum_of_parts(parts_ptr, place, inside, NUMEL, PARTS)
    tl.store(sum_ptr + place, rounded(total, sum_ptr), mask=inside)


@triton_kernel
def stage_sums_kernel(
    first_ptr,
    second_ptr,
    staged_ptr,
    epoch_ptr,
    rank,
    world_size,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stage this rank's sums for its peers: those of first_ptr (PARTS, FIRST), then second_ptr (SECOND,), all fp32.

    Grid (ceil((FIRST + SECOND) / BLOCK),). staged_ptr (2 * W,) int64 and epoch_ptr () int32: see ``staged_at``.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < FIRST + SECOND
    total = sum_of_parts(first_ptr, place, place < FIRST, FIRST, PARTS)
    if SECOND > 0:
        total += tl.load(second_ptr + place - FIRST, mask=inside & (place >= FIRST), other=0.0)
    mine = peer_pointer(staged_ptr, staged_at(epoch_ptr, world_size, False) + rank, first_ptr)
    tl.store(mine + place, total, mask=inside)


@triton_kernel
def sum_ranks_kernel(
    staged_ptr,
    epoch_ptr,
    like_ptr,
    first_ptr,
    second_ptr,
    world_size,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over the ranks of what each has staged, added in ascending order of rank. Grid as ``stage_sums_kernel``.

    first_ptr (FIRST,), second_ptr (SECOND,): the sums, rounded to their types. like_ptr: any fp32.
    Three ranks that staged 1e8, 1 and -1e8 have the sum 0: 1e8 + 1 rounds to 1e8.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < FIRST + SECOND
    staged_ptr += staged_at(epoch_ptr, world_size, True)
    # Past the first-level cache: it does not see what peers wrote while kernels of this rank ran.
    total = tl.load(peer_pointer(staged_ptr, 0, like_ptr) + place, mask=inside, cache_modifier=".cg")
    for rank in range(1, world_size):
        total += tl.load(peer_pointer(staged_ptr, rank, like_ptr) + place, mask=inside, cache_modifier=".cg")
    tl.store(first_ptr + place, rounded(total, first_ptr), mask=place < FIRST)
    if SECOND > 0:
        tl.store(second_ptr + place - FIRST, rounded(total, second_ptr), mask=inside & (place >= FIRST))


def reserve_sum(workspace: Workspace, numel: int) -> Staging | None:
    """Collective. Shared memory for ``sum_over_ranks`` of ``numel`` numbers; None for one rank, which needs none."""
    return None if workspace.group.world_size == 1 else workspace.staging(SUMMANDS, numel * FP32_BYTES)


def sum_parts(summand: Summand) -> Tensor:
    """This rank's sum. Not collective."""
    if summand.parts.shape == summand.shape and summand.dtype == torch.float32:
        return summand.parts
    total, numel = summand.new_result(), summand.shape.numel()
    run = _launcher(sum_parts_kernel, total.device, (total.dtype,), NUMEL=numel, PARTS=summand.count)
    run((-(-numel // BLOCK),), summand.parts, total)
    return total


def sum_over_ranks(summands: Sequence[Summand], workspace: Workspace) -> list[Tensor]:
    """Collective. The sums over ranks of one summand, or of two, of which the second comes in one part."""
    first, second = summands[0], summands[-1]
    numbers, numel = sum(summand.shape.numel() for summand in summands), first.shape.numel()
    staging = reserve_sum(workspace, numbers)
    if staging is None:
        return [sum_parts(summand) for summand in summands]
    group, grid, halves = workspace.group, (-(-numbers // BLOCK),), (staging.addresses, workspace.epoch)
    device, sizes = workspace.device, {"FIRST": numel, "SECOND": numbers - numel}
    stage = _launcher(stage_sums_kernel, device, (), PARTS=first.count, **sizes)
    stage(grid, first.parts, second.parts, *halves, group.rank, group.world_size)
    workspace.barrier_after_write()
    totals = [summand.new_result() for summand in summands]
    add = _launcher(sum_ranks_kernel, device, (first.dtype, second.dtype), **sizes)
    add(grid, *halves, first.parts, totals[0], totals[-1], group.world_size)
    return totals


@lru_cache(LAUNCHERS_KEPT)
def _launcher(kernel: Any, device: torch.device, results: tuple[torch.dtype, ...], **sizes: int) -> Launcher:
    """For sums of these ``sizes``. results: their dtypes, which tell launchers apart."""
    return Launcher(kernel, device, {**sizes, "BLOCK": BLOCK})
