"""Kernels for what biases add to gradients: to those of scores, and their own."""

from __future__ import annotations

import triton
import triton.language as tl

from sonic_ep.fast.device import rounded, valid_rows


@triton.jit
def experts_of_rows(row, group_ends_ptr, experts_per_rank, EXPERTS_PADDED: tl.constexpr):
    """Which of a rank's experts each of the rows (ROWS,) belongs to: with ends 2 2 5, rows 1 and 2 are of 0 and 2."""
    expert = tl.arange(0, EXPERTS_PADDED)
    ends = tl.load(group_ends_ptr + expert, mask=expert < experts_per_rank, other=2147483647)
    return tl.sum((ends[None, :] <= row[:, None]).to(tl.int32), axis=1)


@triton.jit(do_not_specialize=["row_capacity"])
def add_bias_dots_kernel(
    rows_ptr,
    bias_ptr,
    dots_ptr,
    group_ends_ptr,
    experts_per_rank,
    row_capacity,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
):
    """Add to dots the sum over H of row * bias of its expert: what the bias adds to the gradient of a score. Any grid.

    rows_ptr (R, H): d(out) of each row's token. bias_ptr (e, H). dots_ptr (R,) fp32.
    """
    # As the rest of the score's gradient is summed.
    WIDE: tl.constexpr = tl.float64 if rows_ptr.dtype.element_ty == tl.float32 else tl.float32
    rows = valid_rows(group_ends_ptr, experts_per_rank, row_capacity)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        there = row < rows
        expert = experts_of_rows(row, group_ends_ptr, experts_per_rank, EXPERTS_PADDED).to(tl.int64)
        dot = tl.zeros((ROWS, COLUMNS), dtype=WIDE)
        for first in range(0, H, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            inside = there[:, None] & (column < H)[None, :]
            place = row.to(tl.int64)[:, None] * H + column[None, :]
            value = tl.load(rows_ptr + place, mask=inside, other=0.0).to(WIDE)
            bias_place = expert[:, None] * H + column[None, :]
            dot += value * tl.load(bias_ptr + bias_place, mask=inside, other=0.0).to(WIDE)
        before = tl.load(dots_ptr + row, mask=there, other=0.0).to(WIDE)
        tl.store(dots_ptr + row, (before + tl.sum(dot, axis=1)).to(tl.float32), mask=there)


@triton.jit(do_not_specialize=["row_capacity"])
def sum_groups_kernel(
    rows_ptr,
    scores_ptr,
    slot_of_row_ptr,
    sums_ptr,
    group_ends_ptr,
    row_capacity,
    width,
    HAS_SCORES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sum of each expert's rows, weighted with their scores or not. Grid (e, ceil(width / COLUMNS)).

    rows_ptr (R, width); scores_ptr (W*C*K,) fp32; sums_ptr (e, width): rounded once, zeros where there is no row. Ends
    2 2 5 sum rows 0 1, none, and rows 2 3 4. Rows are taken ROWS at a time, so the order of summation is fixed.
    """
    group = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(group_ends_ptr + group - 1, mask=group > 0, other=0)
    end = tl.minimum(tl.load(group_ends_ptr + group), row_capacity)
    # A sum in fp32 of fp32 rows would add an error as large as that of the rows themselves.
    ACCUMULATOR: tl.constexpr = tl.float64 if rows_ptr.dtype.element_ty == tl.float32 else tl.float32
    total = tl.zeros((ROWS, COLUMNS), dtype=ACCUMULATOR)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (column < width)[None, :]
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        value = tl.load(rows_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if HAS_SCORES:
            slot = tl.load(slot_of_row_ptr + row, mask=row < end, other=0)
            value = value * tl.load(scores_ptr + slot, mask=row < end, other=0.0)[:, None]
        total += value.to(ACCUMULATOR)
    out = tl.sum(total, axis=0).to(tl.float32)
    tl.store(sums_ptr + group.to(tl.int64) * width + column, rounded(out, sums_ptr), mask=column < width)
