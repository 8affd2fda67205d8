"""Around an expert's GEMMs: sums over rows, biases. Rows past ``plan.group_ends[-1]`` are unspecified."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.fast.device_functions import push_value, rounded, valid_rows
from sonic_ep.fast.launch import ROW_WARPS, column_constants, launch, programs_over, triton_kernel
from sonic_ep.plan import RoutingPlan


@triton.jit
def experts_of_rows(row, group_ends_ptr, experts_per_rank, EXPERTS_PADDED: tl.constexpr):
    """The rank's expert of each row (ROWS,): with ends 2 2 5, rows 1 and 2 are of experts 0 and 2."""
    expert = tl.arange(0, EXPERTS_PADDED)
    ends = tl.load(group_ends_ptr + expert, mask=expert < experts_per_rank, other=2147483647)
    return tl.sum((ends[None, :] <= row[:, None]).to(tl.int32), axis=1)


@triton_kernel
def add_bias_dots_kernel(
    rows_ptr,
    bias_ptr,
    dots_ptr,
    slot_of_row_ptr,
    origins_ptr,
    group_ends_ptr,
    rank,
    slots_per_rank,
    experts_per_rank,
    row_capacity,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
):
    """Add to each dot the sum over H of row * bias of its expert: the bias's share of the score's gradient.

    rows_ptr (R, H): d(out) of each row's token. bias_ptr (e, H). dots_ptr (R,) fp32; the sums are also pushed to their
    slots' origins, see ``push_value``. Any grid: of P programs, p takes tiles p, p + P, ... of ROWS rows.
    """
    # The type in which ``activate_backward_kernel`` sums the rest of that gradient.
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
        total = (before + tl.sum(dot, axis=1)).to(tl.float32)
        tl.store(dots_ptr + row, total, mask=there)
        slot = tl.load(slot_of_row_ptr + row, mask=there, other=-1)
        push_value(total, slot, origins_ptr, rank, slots_per_rank)


@triton_kernel
def sum_groups_kernel(
    rows_ptr,
    scores_ptr,
    slot_of_row_ptr,
    sums_ptr,
    group_ends_ptr,
    row_capacity,
    WIDTH: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sum of each expert's rows, each times its score if HAS_SCORES. Grid (e, ceil(WIDTH / COLUMNS)).

    rows_ptr (R, WIDTH); scores_ptr (W*C*K,) fp32; sums_ptr (e, WIDTH): rounded once, zeros for an expert without rows.
    ROWS at a time, so the order of summation is fixed.
    """
    group = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(group_ends_ptr + group - 1, mask=group > 0, other=0)
    end = tl.minimum(tl.load(group_ends_ptr + group), row_capacity)
    # An fp32 sum of fp32 rows would add an error as large as that of the rows themselves.
    ACCUMULATOR: tl.constexpr = tl.float64 if rows_ptr.dtype.element_ty == tl.float32 else tl.float32
    total = tl.zeros((ROWS, COLUMNS), dtype=ACCUMULATOR)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (column < WIDTH)[None, :]
        place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        value = tl.load(rows_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if HAS_SCORES:
            slot = tl.load(slot_of_row_ptr + row, mask=row < end, other=0)
            value = value * tl.load(scores_ptr + slot, mask=row < end, other=0.0)[:, None]
        total += value.to(ACCUMULATOR)
    out = tl.sum(total, axis=0).to(tl.float32)
    tl.store(sums_ptr + group.to(tl.int64) * WIDTH + column, rounded(out, sums_ptr), mask=column < WIDTH)


# Elements that an interpreted program takes at a time: it pays by the operation. On a GPU a program takes one row.
INTERPRETED_TILE = 4096
# A tile of ``sum_groups``: long enough in columns for whole sectors, in rows for loads in flight.
SUMMED_ROWS, SUMMED_COLUMNS = 64, 64


def add_bias_dots(out_grad_RH: Tensor, bias_eH: Tensor, dots_R: Tensor, plan: RoutingPlan, origins_W: Tensor) -> None:
    """Add ``<d(out), bias>``, bias of the row's expert, to each row's score gradient ``dots_R``, and push the sums."""
    (held, width), device = bias_eH.shape, bias_eH.device
    constants = column_constants(width) | {"EXPERTS_PADDED": triton.next_power_of_2(held)}
    constants["ROWS"] = rows_at_once(constants["COLUMNS"], device)
    pointers = (out_grad_RH, bias_eH, dots_R, plan.slot_of_row, origins_W, plan.group_ends)
    sizes = (plan.rank, plan.max_tokens * plan.top_k, plan.experts_per_rank, plan.row_capacity)
    grid = (programs_over(out_grad_RH.shape[0], device),)
    launch(add_bias_dots_kernel, grid, *pointers, *sizes, device=device, **constants)


def sum_groups(rows_RF: Tensor, scores_WCK: Tensor | None, plan: RoutingPlan) -> Tensor:
    """The sum of each expert's rows, (e, F), each times its score if there are scores; exact zeros without rows."""
    width = rows_RF.shape[1]
    sums_eF = rows_RF.new_empty((plan.experts_per_rank, width))
    # Without scores their pointer is not read.
    scores = rows_RF if scores_WCK is None else scores_WCK
    grid = (plan.experts_per_rank, triton.cdiv(width, SUMMED_COLUMNS))
    pointers = (rows_RF, scores, plan.slot_of_row, sums_eF, plan.group_ends)
    tile = {"ROWS": SUMMED_ROWS, "COLUMNS": SUMMED_COLUMNS, "HAS_SCORES": scores_WCK is not None, "WIDTH": width}
    launch(sum_groups_kernel, grid, *pointers, plan.row_capacity, device=rows_RF.device, num_warps=ROW_WARPS, **tile)
    return sums_eF


def rows_at_once(columns_at_once: int, device: torch.device) -> int:
    """Rows that a program takes at a time."""
    return 1 if device.type == "cuda" else max(1, INTERPRETED_TILE // columns_at_once)
