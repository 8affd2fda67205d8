"""Kernels over the rows of one rank: into canonical order, gradients of the weighted sum, NaN after an overflow."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.fast.device_functions import copy_row, push_value, rounded, valid_rows
from sonic_ep.fast.launch import (
    LAUNCHERS_KEPT,
    Launcher,
    column_constants,
    copy_constants,
    launch,
    programs_over,
    triton_kernel,
)
from sonic_ep.plan import RoutingPlan


@triton_kernel
def gather_rows_kernel(
    received_ptr,
    source_ptr,
    out_ptr,
    group_ends_ptr,
    experts_per_rank,
    row_capacity,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row i of the result is row ``source[i]`` of what was received. Any grid: of P programs, p takes p, p + P, ...

    source_ptr (R,) int32; rows past the valid ones are not written. Sources 2 0 of two valid rows take rows 2 and 0.
    """
    rows = valid_rows(group_ends_ptr, experts_per_rank, row_capacity)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        source = tl.load(source_ptr + row).to(tl.int64)
        copy_row(received_ptr + source * WIDTH, out_ptr + row * WIDTH, WIDTH, BLOCK)


@lru_cache(LAUNCHERS_KEPT)
def _gather_rows(device: torch.device, width: int, dtype: torch.dtype) -> Launcher:
    return Launcher(gather_rows_kernel, device, copy_constants(width, dtype.itemsize))


def gather_rows(received_NH: Tensor, source_R: Tensor, group_ends_e: Tensor) -> Tensor:
    """(R, H): the received row of each canonical row; unspecified past ``group_ends_e[-1]``."""
    rows, width, device = source_R.shape[0], received_NH.shape[1], received_NH.device
    rows_RH = received_NH.new_empty((rows, width))
    run = _gather_rows(device, width, rows_RH.dtype)
    run((programs_over(rows, device),), received_NH, source_R, rows_RH, group_ends_e, group_ends_e.shape[0], rows)
    return rows_RH


def token_of_row(plan: RoutingPlan) -> Tensor:
    """(R,) int32: the row's token among the group's W*C, -1 past the valid rows. With K=2, slot 5 is of token 2."""
    return torch.div(plan.slot_of_row, plan.top_k, rounding_mode="floor")


@triton_kernel
def weigh_rows_kernel(
    out_grad_ptr,
    rows_ptr,
    scores_ptr,
    slot_of_row_ptr,
    grad_ptr,
    dots_ptr,
    origins_ptr,
    group_ends_ptr,
    rank,
    slots_per_rank,
    experts_per_rank,
    row_capacity,
    given_rows,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradient of a weighted row, and of its weight. Any grid: of P programs, p takes rows p, p + P, ...

    out_grad_ptr (R, H): d(out) of each row's token; rows_ptr (N, H), N = ``given_rows``: the rows that were weighted;
    scores_ptr (W*C*K,) fp32. grad_ptr (N, H) = round(score * d(out)), zeros past the valid rows, since autograd passes
    on all N. dots_ptr (R,) fp32 = sum over H of d(out) * row, NaN for valid rows from N on, not written past the valid;
    pushed to their slots' origins, see ``push_values``.
    """
    rows = valid_rows(group_ends_ptr, experts_per_rank, row_capacity)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        slot = tl.load(slot_of_row_ptr + row)
        score = tl.load(scores_ptr + slot)
        dot = tl.zeros((COLUMNS,), dtype=tl.float32)
        for first in range(0, H, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            inside = column < H
            given = column < tl.where(index < given_rows, H, 0)
            out_grad = tl.load(out_grad_ptr + row * H + column, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(rows_ptr + row * H + column, mask=given, other=0.0).to(tl.float32)
            tl.store(grad_ptr + row * H + column, rounded(out_grad * score, grad_ptr), mask=given)
            dot += out_grad * value
        total = tl.where(index < given_rows, tl.sum(dot, axis=0), float("nan"))
        tl.store(dots_ptr + row, total)
        push_value(total, slot, origins_ptr, rank, slots_per_rank)
    for index in range(rows + tl.program_id(0), given_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        for first in range(0, H, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            tl.store(grad_ptr + row * H + column, tl.zeros((COLUMNS,), grad_ptr.dtype.element_ty), mask=column < H)


def weigh_rows(
    out_grad_RH: Tensor, rows_NH: Tensor, scores_WCK: Tensor, plan: RoutingPlan, origins_W: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows (N, H), zeros past the valid ones, and of each row's score (R,) fp32, unspecified there.

    The scores' gradients are also pushed to ``origins_W``, see ``push_value``.
    """
    grad_NH = out_grad_RH.new_empty(rows_NH.shape)
    dots_R = out_grad_RH.new_empty(out_grad_RH.shape[0], dtype=torch.float32)
    pointers = (out_grad_RH, rows_NH, scores_WCK, plan.slot_of_row, grad_NH, dots_R, origins_W, plan.group_ends)
    slots = (plan.rank, plan.max_tokens * plan.top_k)
    sizes = (*slots, plan.experts_per_rank, plan.row_capacity, rows_NH.shape[0])
    grid, constants = (programs_over(plan.row_capacity, grad_NH.device),), column_constants(grad_NH.shape[1])
    launch(weigh_rows_kernel, grid, *pointers, *sizes, device=grad_NH.device, **constants)
    return grad_NH, dots_R


@triton_kernel
def poison_kernel(
    rows_ptr,
    counts_ptr,
    rows,
    bound,
    num_experts,
    experts_per_rank,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """NaN over all rows (rows, H), if any rank of the group is routed more than ``bound``.

    Any grid: of P programs, p takes rows p, p + P, ... counts_ptr (E,) int32: see ``RoutingPlan``.
    """
    most = tl.full((), 0, tl.int32)
    expert = tl.arange(0, EXPERTS)
    for first in range(0, num_experts, experts_per_rank):
        inside = expert < experts_per_rank
        held = tl.sum(tl.load(counts_ptr + first + expert, mask=inside, other=0), axis=0)
        most = tl.maximum(most, held)
    if most > bound:
        for index in range(tl.program_id(0), rows, tl.num_programs(0)):
            row = tl.cast(index, tl.int64)
            for first in range(0, H, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                nan = tl.full((COLUMNS,), float("nan"), tl.float32)
                tl.store(rows_ptr + row * H + column, rounded(nan, rows_ptr), mask=column < H)


def poison_if_overflowed(rows_NH: Tensor, plan: RoutingPlan, max_rows: int) -> Tensor:
    """``rows_NH`` (N, H), all NaN if a rank of the plan is routed more than ``max_rows``. No read on the host."""
    grid = (programs_over(rows_NH.shape[0], rows_NH.device),)
    sizes = (rows_NH.shape[0], max_rows, plan.num_experts, plan.experts_per_rank)
    constants = column_constants(rows_NH.shape[1]) | {"EXPERTS": triton.next_power_of_2(plan.experts_per_rank)}
    launch(poison_kernel, grid, rows_NH, plan.counts, *sizes, device=rows_NH.device, **constants)
    return rows_NH
