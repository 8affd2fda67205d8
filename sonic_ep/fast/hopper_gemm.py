"""Grouped products by Hopper's own instructions, in Gluon: Triton's language in which memory is placed by hand.

One program a multiprocessor takes tile after tile. One of its warps copies operands to shared memory by the tensor
memory accelerator (TMA), ``STAGES`` steps ahead, also of the next tile; the others multiply.

No tile needs a mask, since TMA itself ends a block with its group, see ``within_groups``. Sums over rows load zeros
past the group. Products of rows may load rows past it, of the next group or unspecified ones: a row reaches only its
own row of the result, which is not stored.

Each result is summed in fp32 by one tile, along the depth in ascending order: the size of tiles changes no bit. In bf16
without a bias the bits are those of PyTorch's grouped products.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from sonic_ep.fast.hopper_tiles import (
    MOST_ROWS,
    add_product,
    begin_copy,
    check_rows,
    end_products,
    gluon_kernel,
    group_of_tile,
    load_by_tma,
    of_matrices,
    of_rows,
    place_of_tile,
    rows_of_group,
    shared_stages,
    store_tile,
    within_groups,
)
from sonic_ep.fast.launch import LAUNCHERS_KEPT, Launcher, multiprocessors

# Warps that multiply. Registers of a thread of the warp that copies: the others get what it leaves.
WARPS: gl.constexpr = gl.constexpr(8)
COPY_REGISTERS: gl.constexpr = gl.constexpr(24)
ITEM_BYTES: gl.constexpr = gl.constexpr(2)


@gluon.jit
def copy_rows(
    descs,
    stages,
    groups,
    K: gl.constexpr,
    COLUMN_TILES: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    HEIGHT: gl.constexpr,
    WIDTH: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copy the operands of ``hopper_rows_kernel``: of its tiles, step by step."""
    a_desc, b_desc, _ = descs
    a_stages, b_stages, full, empty = stages
    step = 0
    group = 0
    before = 0
    tile = gl.program_id(0)
    group, before, begin, end = group_of_tile(tile, group, before, groups, HEIGHT, COLUMN_TILES)
    while group < groups[1]:
        row_tile, column_tile = place_of_tile(tile - before, gl.cdiv(end - begin, HEIGHT), COLUMN_TILES)
        row = begin + row_tile * HEIGHT
        column = column_tile * WIDTH
        for depth in range(0, K, DEPTH):
            stage, arrived = begin_copy(step, full, empty, (HEIGHT + WIDTH) * DEPTH * ITEM_BYTES, STAGES)
            load_by_tma(a_desc, [row, depth], arrived, a_stages.index(stage))
            if TRANSPOSED:
                load_by_tma(b_desc, [group, column, depth], arrived, b_stages.index(stage))
            else:
                load_by_tma(b_desc, [group, depth, column], arrived, b_stages.index(stage))
            step += 1
        tile += gl.num_programs(0)
        group, before, begin, end = group_of_tile(tile, group, before, groups, HEIGHT, COLUMN_TILES)


@gluon.jit
def multiply_rows(
    descs,
    stages,
    staged,
    bias_ptr,
    groups,
    K: gl.constexpr,
    N: gl.constexpr,
    COLUMN_TILES: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HEIGHT: gl.constexpr,
    WIDTH: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Multiply what ``copy_rows`` copies, and store it."""
    out_desc = descs[2]
    a_stages, b_stages, full, empty = stages
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH, 16])
    step = 0
    group = 0
    before = 0
    tile = gl.program_id(0)
    group, before, begin, end = group_of_tile(tile, group, before, groups, HEIGHT, COLUMN_TILES)
    while group < groups[1]:
        row_tile, column_tile = place_of_tile(tile - before, gl.cdiv(end - begin, HEIGHT), COLUMN_TILES)
        total = gl.zeros([HEIGHT, WIDTH], gl.float32, layout)
        for depth in range(0, K, DEPTH):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            if TRANSPOSED:
                b = b_stages.index(stage).reshape([WIDTH, DEPTH]).permute((1, 0))
            else:
                b = b_stages.index(stage).reshape([DEPTH, WIDTH])
            total = add_product(a_stages.index(stage), b, total, step, depth > 0, empty, STAGES)
            step += 1
        total = end_products(total, step, K > 0, empty, STAGES)
        if HAS_BIAS:
            column = column_tile * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
            bias = gl.load(bias_ptr + group.to(gl.int64) * N + column, mask=column < N, other=0.0)
            total += bias.to(gl.float32)[None, :]
        # Row ``begin + row_tile * HEIGHT``, and what follows up to ``end``: see ``within_groups``.
        within = MOST_ROWS - end + begin + row_tile * HEIGHT
        store_tile(total, out_desc, staged, [MOST_ROWS, end, within, column_tile * WIDTH])
        tile += gl.num_programs(0)
        group, before, begin, end = group_of_tile(tile, group, before, groups, HEIGHT, COLUMN_TILES)
    tma.store_wait(0)


@gluon_kernel
def hopper_rows_kernel(
    bias_ptr,
    group_ends_ptr,
    a_desc,
    b_desc,
    out_desc,
    experts,
    rows,
    K: gl.constexpr,
    N: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HEIGHT: gl.constexpr,
    WIDTH: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Rows times the matrix of their group. Any grid: of P programs, p takes tiles p, p + P, ...

    a_desc (R, K), R = ``rows``; b_desc (e, K, N), or (e, N, K) if TRANSPOSED; bias_ptr (e, N) if HAS_BIAS;
    group_ends_ptr (e,) int32, clamped to R; out_desc (R, N), see ``within_groups``: not written past the last group. A
    group without rows has no tile.
    """
    COLUMN_TILES: gl.constexpr = (N + WIDTH - 1) // WIDTH
    B_SHAPE: gl.constexpr = [STAGES, 1, WIDTH, DEPTH] if TRANSPOSED else [STAGES, 1, DEPTH, WIDTH]
    stages = shared_stages(a_desc, b_desc, [STAGES, HEIGHT, DEPTH], B_SHAPE, STAGES)
    staged = gl.allocate_shared_memory(out_desc.dtype, [1, 1, HEIGHT, WIDTH], out_desc.layout)
    descs = (a_desc, b_desc, out_desc)
    groups = (group_ends_ptr, experts, rows)
    gl.warp_specialize(
        [
            (
                multiply_rows,
                (
                    descs,
                    stages,
                    staged,
                    bias_ptr,
                    groups,
                    K,
                    N,
                    COLUMN_TILES,
                    TRANSPOSED,
                    HAS_BIAS,
                    HEIGHT,
                    WIDTH,
                    DEPTH,
                    STAGES,
                ),
            ),
            (copy_rows, (descs, stages, groups, K, COLUMN_TILES, TRANSPOSED, HEIGHT, WIDTH, DEPTH, STAGES)),
        ],
        [1],
        [COPY_REGISTERS],
    )


@gluon.jit
def copy_summed_rows(
    descs,
    stages,
    groups,
    ROW_TILES: gl.constexpr,
    COLUMN_TILES: gl.constexpr,
    HEIGHT: gl.constexpr,
    WIDTH: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copy the operands of ``hopper_weights_kernel``: of its tiles, step by step."""
    a_desc, b_desc, _ = descs
    a_stages, b_stages, full, empty = stages
    TILES: gl.constexpr = ROW_TILES * COLUMN_TILES
    step = 0
    for tile in range(gl.program_id(0), groups[1] * TILES, gl.num_programs(0)):
        begin, end = rows_of_group(tile // TILES, groups)
        row_tile, column_tile = place_of_tile(tile % TILES, ROW_TILES, COLUMN_TILES)
        for row in range(begin, end, DEPTH):
            stage, arrived = begin_copy(step, full, empty, (HEIGHT + WIDTH) * DEPTH * ITEM_BYTES, STAGES)
            # Row ``row``, and what follows up to ``end``: see ``within_groups``.
            within = MOST_ROWS - end + row
            load_by_tma(a_desc, [MOST_ROWS, end, within, row_tile * HEIGHT], arrived, a_stages.index(stage))
            load_by_tma(b_desc, [MOST_ROWS, end, within, column_tile * WIDTH], arrived, b_stages.index(stage))
            step += 1


@gluon.jit
def multiply_summed_rows(
    descs,
    stages,
    staged,
    groups,
    ROW_TILES: gl.constexpr,
    COLUMN_TILES: gl.constexpr,
    HEIGHT: gl.constexpr,
    WIDTH: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Multiply what ``copy_summed_rows`` copies, and store it."""
    out_desc = descs[2]
    a_stages, b_stages, full, empty = stages
    TILES: gl.constexpr = ROW_TILES * COLUMN_TILES
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH, 16])
    step = 0
    for tile in range(gl.program_id(0), groups[1] * TILES, gl.num_programs(0)):
        begin, end = rows_of_group(tile // TILES, groups)
        row_tile, column_tile = place_of_tile(tile % TILES, ROW_TILES, COLUMN_TILES)
        total = gl.zeros([HEIGHT, WIDTH], gl.float32, layout)
        for row in range(begin, end, DEPTH):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            a = a_stages.index(stage).reshape([DEPTH, HEIGHT]).permute((1, 0))
            b = b_stages.index(stage).reshape([DEPTH, WIDTH])
            total = add_product(a, b, total, step, row > begin, empty, STAGES)
            step += 1
        total = end_products(total, step, end > begin, empty, STAGES)
        store_tile(total, out_desc, staged, [tile // TILES, row_tile * HEIGHT, column_tile * WIDTH])
    tma.store_wait(0)


@gluon_kernel
def hopper_weights_kernel(
    group_ends_ptr,
    a_desc,
    b_desc,
    out_desc,
    experts,
    rows,
    M: gl.constexpr,
    N: gl.constexpr,
    HEIGHT: gl.constexpr,
    WIDTH: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Of each group the sum of products of its rows. Any grid: of P programs, p takes tiles p, p + P, ...

    a_desc (R, M) and b_desc (R, N), R = ``rows``: see ``within_groups``. group_ends_ptr (e,) int32, clamped to R.
    out_desc (e, M, N). A group without rows has tiles but no step: nothing is copied, and zeros are stored.
    """
    ROW_TILES: gl.constexpr = (M + HEIGHT - 1) // HEIGHT
    COLUMN_TILES: gl.constexpr = (N + WIDTH - 1) // WIDTH
    stages = shared_stages(a_desc, b_desc, [STAGES, 1, 1, DEPTH, HEIGHT], [STAGES, 1, 1, DEPTH, WIDTH], STAGES)
    staged = gl.allocate_shared_memory(out_desc.dtype, [1, HEIGHT, WIDTH], out_desc.layout)
    descs = (a_desc, b_desc, out_desc)
    groups = (group_ends_ptr, experts, rows)
    gl.warp_specialize(
        [
            (
                multiply_summed_rows,
                (descs, stages, staged, groups, ROW_TILES, COLUMN_TILES, HEIGHT, WIDTH, DEPTH, STAGES),
            ),
            (copy_summed_rows, (descs, stages, groups, ROW_TILES, COLUMN_TILES, HEIGHT, WIDTH, DEPTH, STAGES)),
        ],
        [1],
        [COPY_REGISTERS],
    )


# Height and depth of a tile, steps in flight, and the widest and the narrowest tile. Three steps are 144 KiB of shared
# memory, of 227, and a tile on its way out is 64. Four steps, with room for half a tile, were slower in long runs.
HEIGHT, DEPTH, STAGES, WIDEST_TILE, NARROWEST_TILE = 128, 64, 3, 256, 64


def tile_width(width: int) -> int:
    """Columns of a tile of a matrix with ``width``."""
    return min(max(1 << (width - 1).bit_length(), NARROWEST_TILE), WIDEST_TILE)


@dataclass(frozen=True, kw_only=True)
class HopperGemm:
    """These kernels, for bf16 and fp16 on Hopper, in the forms that ``library_serves`` accepts."""

    def rows(self, a_RK: Tensor, b_eKN: Tensor, group_ends_e: Tensor, bias_eN: Tensor | None = None) -> Tensor:
        """See ``GroupedGemm``. Group ends past R count as R."""
        (rows, depth), (experts, _, width), device = a_RK.shape, b_eKN.shape, a_RK.device
        out_RN = a_RK.new_empty((rows, width))
        if rows == 0:
            return out_RN
        check_rows(rows)
        transposed, columns = b_eKN.stride(2) != 1, tile_width(width)
        matrices = b_eKN.transpose(1, 2) if transposed else b_eKN
        block = (1, columns, DEPTH) if transposed else (1, DEPTH, columns)
        dtype = a_RK.dtype
        a = of_rows(a_RK.data_ptr(), dtype, rows, depth, (HEIGHT, DEPTH))
        b = of_matrices(matrices.data_ptr(), dtype, matrices.shape, matrices.stride(), block)
        out = within_groups(out_RN.data_ptr(), dtype, width, HEIGHT, columns)
        run = _rows(device, dtype, depth, width, transposed, bias_eN is not None)
        # Without a bias its pointer is not read.
        pointers = (group_ends_e if bias_eN is None else bias_eN, group_ends_e)
        run((multiprocessors(device),), *pointers, a, b, out, experts, rows)
        return out_RN

    def weights(self, a_RM: Tensor, b_RN: Tensor, group_ends_e: Tensor) -> Tensor:
        """See ``GroupedGemm``. Group ends past R count as R."""
        (rows, height), width, experts = a_RM.shape, b_RN.shape[1], group_ends_e.shape[0]
        if rows == 0:
            return a_RM.new_zeros((experts, height, width))
        check_rows(rows)
        out_eMN, columns = a_RM.new_empty((experts, height, width)), tile_width(width)
        device, dtype = a_RM.device, a_RM.dtype
        a = within_groups(a_RM.data_ptr(), dtype, height, DEPTH, HEIGHT)
        b = within_groups(b_RN.data_ptr(), dtype, width, DEPTH, columns)
        strides = (height * width, width, 1)
        out = of_matrices(out_eMN.data_ptr(), dtype, out_eMN.shape, strides, (1, HEIGHT, columns))
        run = _weights(device, dtype, height, width)
        run((multiprocessors(device),), group_ends_e, a, b, out, experts, rows)
        return out_eMN


@lru_cache(LAUNCHERS_KEPT)
def _rows(
    device: torch.device, dtype: torch.dtype, depth: int, width: int, transposed: bool, has_bias: bool
) -> Launcher:
    """For operands of ``dtype``, which tells kernels apart."""
    sizes = {"K": depth, "N": width, "TRANSPOSED": transposed, "HAS_BIAS": has_bias}
    return Launcher(hopper_rows_kernel, device, sizes | _tile(width))


@lru_cache(LAUNCHERS_KEPT)
def _weights(device: torch.device, dtype: torch.dtype, height: int, width: int) -> Launcher:
    """For operands of ``dtype``, which tells kernels apart."""
    return Launcher(hopper_weights_kernel, device, {"M": height, "N": width} | _tile(width))


def _tile(width: int) -> dict[str, int]:
    sizes = {"HEIGHT": HEIGHT, "WIDTH": tile_width(width), "DEPTH": DEPTH, "STAGES": STAGES}
    return {**sizes, "num_warps": WARPS.value}
