"""Parts of Hopper's kernels in Gluon: the order of tiles, the pipeline of copies and products, TMA descriptors.

Shared memory has room for the operands of some steps. One warp copies a step's operands there by the tensor memory
accelerator (TMA) while the others multiply those of the step before, of the same tile or of the one before.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sonic_ep.fast.device_functions import tile_in_bands
from sonic_ep.fast.launch import numbers_of

# A barrier of the warps that run the calling part of a program, and copies by TMA from and to global memory. Triton has
# renamed them since 3.6.
part_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
load_by_tma = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_by_tma = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
# The most rows R, and a number that ``within_groups`` counts from.
MOST_ROWS: gl.constexpr = gl.constexpr(2**30)
# Descriptors of each kind that are remembered.
DESCRIPTORS_KEPT = 4096
# Of a TMA descriptor.
MOST_EXTENT = 2**31 - 1
# In shared memory: rows of 128 bytes, swizzled, as TMA writes and tensor cores read them.
LAYOUTS = {rank: gl.NVMMASharedLayout(128, 16, rank=rank) for rank in (2, 3, 4)}


def gluon_kernel(function: Callable[..., None]) -> Any:
    """``gluon.jit`` of a kernel, compiled once for all values of its numbers: see ``launch.triton_kernel``."""
    return gluon.jit(function, do_not_specialize=numbers_of(function))


@gluon.jit
def rows_of_group(group, groups):
    """A group's first row, and the row where it ends. groups: group_ends_ptr, how many groups and how many rows."""
    group_ends_ptr, experts, rows = groups
    begin = gl.load(group_ends_ptr + group - 1, mask=(group > 0) & (group < experts), other=0)
    end = gl.load(group_ends_ptr + group, mask=group < experts, other=0)
    return gl.minimum(begin, rows), gl.minimum(end, rows)


@gluon.jit
def group_of_tile(tile, group, before, groups, HEIGHT: gl.constexpr, COLUMN_TILES: gl.constexpr):
    """Group of a tile, how many tiles are before that group, its first row, and the row where it ends.

    ``group``, ``before``: of an earlier tile, or 0. Past the last tile the group is ``experts``. Groups that end at
    rows 20 20 25, in tiles of 16 rows and two of columns: tiles 0 to 3 are of group 0, 4 and 5 of group 2, with 4
    before it.
    """
    begin, end = rows_of_group(group, groups)
    tiles = (end - begin + HEIGHT - 1) // HEIGHT * COLUMN_TILES
    while (group < groups[1]) & (before + tiles <= tile):
        before += tiles
        group += 1
        begin, end = rows_of_group(group, groups)
        tiles = (end - begin + HEIGHT - 1) // HEIGHT * COLUMN_TILES
    return group, before, begin, end


# The same order of tiles as in Triton's kernels, compiled as Gluon.
place_of_tile = gluon.jit(tile_in_bands.fn)


@gluon.jit
def begin_copy(step, full, empty, BYTES: gl.constexpr, STAGES: gl.constexpr):
    """Wait until the stage of a step is free. The stage, and its barrier, which completes when BYTES have come."""
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), BYTES)
    return stage, full.index(stage)


@gluon.jit
def add_product(a, b, total, step, follows, empty, STAGES: gl.constexpr):
    """``total + a . b``, which goes on. If it ``follows`` a step of its tile, that has ended, and its stage is free."""
    total = warpgroup_mma(a, b, total, is_async=True)
    total = warpgroup_mma_wait(num_outstanding=1, deps=[total])
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=follows)
    return total


@gluon.jit
def end_products(total, step, follows, empty, STAGES: gl.constexpr):
    """The sum of a tile's products. If it ``follows`` a step of its tile, the stage of that is free."""
    total = warpgroup_mma_wait(num_outstanding=0, deps=[total])
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=follows)
    return total


@gluon.jit
def store_tile(total, out_desc, staged, place):
    """Round a tile to ``staged`` and begin to store it by TMA, once the store of the tile before has read ``staged``.

    Only the thread that issued a store can wait for it, so a barrier follows. The fence shows TMA what all threads have
    written, and the second barrier comes before one of them issues the store, which runs beside the next tile.
    """
    tma.store_wait(0)
    part_barrier()
    staged.reshape(total.shape).store(total.to(staged.dtype))
    fence_async_shared()
    part_barrier()
    store_by_tma(out_desc, place, staged)


@gluon.jit
def shared_stages(a_desc, b_desc, A_SHAPE: gl.constexpr, B_SHAPE: gl.constexpr, STAGES: gl.constexpr):
    """Room for the operands of each step in flight, and two barriers a stage: ``full`` and ``empty``.

    Step s uses stage s % STAGES for the (s // STAGES)-th time; whether that number is odd is the phase to wait for.
    Both parts of a program count the same steps across tiles, so they agree on stage and phase.
    full: the warp that copies arrives as it announces the bytes, and TMA counts them down; the others wait.
    empty: those arrive as one, since Triton has them meet first; the warp that copies waits, for the other phase, so
    that its first waits pass. A stage is freed by the next step, once its own product has ended; a tile's last by
    ``end_products``.

    A_SHAPE, B_SHAPE: (STAGES, ...), of the blocks that TMA copies.
    """
    # A step's stage is freed by the step after it.
    gl.static_assert(STAGES >= 2)
    a_stages = gl.allocate_shared_memory(a_desc.dtype, A_SHAPE, a_desc.layout)
    b_stages = gl.allocate_shared_memory(b_desc.dtype, B_SHAPE, b_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    return a_stages, b_stages, full, empty


class DescribedMemory:
    """Memory that a TMA descriptor describes: what Triton asks a tensor for."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        """The address of its first element."""
        return self.address


def descriptor(place: DescribedMemory, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]) -> Any:
    """Describes memory to TMA, in blocks. CUDA refuses addresses and strides that are no multiples of 16 bytes."""
    made: Any = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = place, list(shape), list(strides), list(block)
    made.layout, made.padding = LAYOUTS[len(block)], "zero"
    return made


# Making a descriptor takes the host as long as launching a kernel, and allocators give the same addresses again.
@lru_cache(DESCRIPTORS_KEPT)
def of_rows(address: int, dtype: torch.dtype, rows: int, columns: int, block: tuple[int, ...]) -> Any:
    """Describes contiguous rows (rows, columns) to TMA."""
    return descriptor(DescribedMemory(address, dtype), (rows, columns), (columns, 1), block)


@lru_cache(DESCRIPTORS_KEPT)
def of_matrices(
    address: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]
) -> Any:
    """Describes matrices (e, height, width) to TMA, whose last stride is 1."""
    return descriptor(DescribedMemory(address, dtype), shape, strides, block)


@lru_cache(DESCRIPTORS_KEPT)
def within_groups(address: int, dtype: torch.dtype, columns: int, height: int, width: int) -> Any:
    """Describes contiguous rows to TMA in blocks of (height, width) that end with a group.

    TMA bounds each coordinate by itself, but where a group ends only the kernel knows. So a row has two coordinates,
    which both count rows: the row where its group ends, and 2^30 less the rows from here to that end, which is out of
    bounds, 2^30, from the end on. Their sum is 2^30 rows too many. Another, first of all and always 2^30, takes those
    away: its stride is 2^35 bytes less one row, and 2^30 times 2^35 bytes are 0 in an address of 64 bits. Row 3 of a
    group that ends at row 5 is (2^30, 5, 2^30 - 2); row 5 would be (2^30, 5, 2^30).

    TMA touches ``address`` even for blocks that are out of bounds, so it has to be that of memory.
    """
    most, wrap = MOST_ROWS.value, 2**35 // dtype.itemsize
    shape, strides = (most + 1, MOST_EXTENT, most, columns), (wrap - columns, columns, columns, 1)
    return descriptor(DescribedMemory(address, dtype), shape, strides, (1, 1, height, width))


def check_rows(rows: int) -> None:
    """Raise ``ValueError`` for more rows R than ``within_groups`` describes."""
    if rows > MOST_ROWS.value:
        most = MOST_ROWS.value
        raise ValueError(f"grouped product: got {rows} rows, expected at most {most} (call with fewer tokens)")
