"""Kernels of the grouped products: each row times its own group's matrix, and sums of products of a group's rows."""

from __future__ import annotations

import triton
import triton.language as tl

from sonic_ep.fast.device import INTERPRETED, rounded

# Tiles of rows that take their turns together: neighbours in time then share rows and weights in the second cache.
BAND: tl.constexpr = tl.constexpr(8)


@triton.jit
def tile_in_bands(program, row_tiles, column_tiles):
    """Row and column of the tile that a program takes, of ``row_tiles`` times ``column_tiles``: down, then right.

    But no further down than ``BAND`` tiles. With 9 and 2, programs 0 to 7 take column 0 of rows 0 to 7, programs 8 to
    15 column 1 of those, and programs 16 and 17 both columns of row 8.
    """
    first = program // (BAND * column_tiles) * BAND
    height = tl.minimum(row_tiles - first, BAND)
    within = program % (BAND * column_tiles)
    return first + within % height, within // height


@triton.jit
def group_of_tile(tile, group_ends_ptr, experts, rows, EXPERTS: tl.constexpr, HEIGHT: tl.constexpr):
    """Group of a tile of ``HEIGHT`` rows, its first row, and the row where its group ends.

    Every group begins a tile of its own; a tile past the last has no group: at least ``experts``. Groups that end at
    rows 20 20 25, in tiles of 16: tiles 0 and 1 begin at rows 0 and 16 of group 0, tile 2 at row 20 of group 2.
    """
    group = tl.arange(0, EXPERTS)
    held = group < experts
    end = tl.minimum(tl.load(group_ends_ptr + group, mask=held, other=0), rows)
    begin = tl.minimum(tl.load(group_ends_ptr + group - 1, mask=held & (group > 0), other=0), rows)
    tiles = tl.where(held, (end - begin + HEIGHT - 1) // HEIGHT, 0)
    # A tile belongs to the first group with which more tiles have begun than are before it.
    mine = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    before = tl.sum(tl.where(group < mine, tiles, 0), axis=0)
    first = tl.sum(tl.where(group == mine, begin, 0), axis=0) + (tile - before) * HEIGHT
    return mine, first, tl.sum(tl.where(group == mine, end, 0), axis=0)


@triton.jit
def add_product(a, b, total):
    """``total + a . b``, products and sums in the type of total: fp32, or fp64, where products of fp32 are exact.

    The interpreter would take bf16 for integers, and sum fp16 as fp16.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if total.dtype == tl.float64:
        return tl.dot(a.to(tl.float64), b.to(tl.float64), total, out_dtype=tl.float64)
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit(do_not_specialize=["rows", "row_tiles"])
def rows_kernel(
    a_ptr,
    b_ptr,
    bias_ptr,
    out_ptr,
    group_ends_ptr,
    experts,
    rows,
    row_tiles,
    K: tl.constexpr,
    N: tl.constexpr,
    STRIDE_E: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXPERTS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows times the matrix of their group. Grid (row_tiles * ceil(N / WIDTH),); tiles past the last do nothing.

    a_ptr (R, K); b_ptr (e, K, N) of the strides given; bias_ptr (e, N) if HAS_BIAS; out_ptr (R, N); group_ends_ptr (e,)
    int32, cut at ``rows`` = R.
    Rows past the last group are left as they are.
    """
    tile, column_tile = tile_in_bands(tl.program_id(0), row_tiles, tl.cdiv(N, WIDTH))
    group, first, end = group_of_tile(tile, group_ends_ptr, experts, rows, EXPERTS, HEIGHT)
    if group < experts:
        row = tl.arange(0, HEIGHT)
        column = tl.arange(0, WIDTH)
        step = tl.arange(0, DEPTH)
        row_inside = first + row < end
        column_inside = column_tile * WIDTH + column < N
        # Offsets inside a tile fit in int32 (``validation.MOST_WIDTH``); the offset of the tile itself is int64.
        first_row = tl.cast(first, tl.int64)
        first_column = tl.cast(column_tile, tl.int64) * WIDTH
        a_ptr += first_row * K
        b_ptr += tl.cast(group, tl.int64) * STRIDE_E + first_column * STRIDE_N
        # Long sums of fp32 in fp32 would be less exact than PyTorch's, which are cut up as well.
        total = tl.zeros((HEIGHT, WIDTH), dtype=tl.float64 if a_ptr.dtype.element_ty == tl.float32 else tl.float32)
        for k in tl.range(0, K, DEPTH, num_stages=STAGES):
            inside = k + step < K
            a_tile = a_ptr + k + row[:, None] * K + step[None, :]
            b_tile = b_ptr + tl.cast(k, tl.int64) * STRIDE_K + step[:, None] * STRIDE_K + column[None, :] * STRIDE_N
            a = tl.load(a_tile, mask=row_inside[:, None] & inside[None, :], other=0.0)
            b = tl.load(b_tile, mask=inside[:, None] & column_inside[None, :], other=0.0)
            total = add_product(a, b, total)
        if HAS_BIAS:
            bias_tile = bias_ptr + tl.cast(group, tl.int64) * N + first_column + column
            total += tl.load(bias_tile, mask=column_inside, other=0.0).to(total.dtype)[None, :]
        out_tile = out_ptr + first_row * N + first_column + row[:, None] * N + column[None, :]
        tl.store(out_tile, rounded(total.to(tl.float32), out_ptr), mask=row_inside[:, None] & column_inside[None, :])


@triton.jit(do_not_specialize=["rows"])
def weights_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    group_ends_ptr,
    rows,
    M: tl.constexpr,
    N: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of each group the sum of products of its rows. Grid (e * ceil(M / HEIGHT) * ceil(N / WIDTH),).

    a_ptr (R, M); b_ptr (R, N); out_ptr (e, M, N); group_ends_ptr (e,) int32, cut at ``rows`` = R. Groups in their
    order, the tiles of each in bands.
    """
    row_tiles = tl.cdiv(M, HEIGHT)
    column_tiles = tl.cdiv(N, WIDTH)
    group = tl.program_id(0) // (row_tiles * column_tiles)
    tile, column_tile = tile_in_bands(tl.program_id(0) % (row_tiles * column_tiles), row_tiles, column_tiles)
    begin = tl.load(group_ends_ptr + group - 1, mask=group > 0, other=0)
    end = tl.minimum(tl.load(group_ends_ptr + group), rows)
    row = tl.arange(0, HEIGHT)
    column = tl.arange(0, WIDTH)
    step = tl.arange(0, DEPTH)
    row_inside = tile * HEIGHT + row < M
    column_inside = column_tile * WIDTH + column < N
    first_row = tl.cast(tile, tl.int64) * HEIGHT
    first_column = tl.cast(column_tile, tl.int64) * WIDTH
    total = tl.zeros((HEIGHT, WIDTH), dtype=tl.float64 if a_ptr.dtype.element_ty == tl.float32 else tl.float32)
    for r in tl.range(begin, end, DEPTH, num_stages=STAGES):
        # Not a number times nothing would still be none, so both sides are zero past the group.
        inside = r + step < end
        a_tile = a_ptr + tl.cast(r, tl.int64) * M + first_row + step[None, :] * M + row[:, None]
        b_tile = b_ptr + tl.cast(r, tl.int64) * N + first_column + step[:, None] * N + column[None, :]
        a = tl.load(a_tile, mask=row_inside[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_tile, mask=inside[:, None] & column_inside[None, :], other=0.0)
        total = add_product(a, b, total)
    out_tile = out_ptr + (tl.cast(group, tl.int64) * M + first_row) * N + first_column
    out_tile += row[:, None] * N + column[None, :]
    tl.store(out_tile, rounded(total.to(tl.float32), out_ptr), mask=row_inside[:, None] & column_inside[None, :])
