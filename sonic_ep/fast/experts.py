"""Between an expert's GEMMs: activation, gradients, biases. Rows past ``plan.group_ends[-1]`` are unspecified."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.backend import Experts
from sonic_ep.fast.device_functions import rounded, valid_rows
from sonic_ep.fast.launch import ROW_WARPS, column_constants, launch, programs_over
from sonic_ep.plan import RoutingPlan


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def pointwise(x, POINTWISE: tl.constexpr):
    """The activation of x, NaN for NaN. gelu is the tanh approximation: x * sigmoid(2u), u as in ``slope``."""
    if POINTWISE == "silu":
        return x * sigmoid(x)
    elif POINTWISE == "gelu":
        return x * sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    elif POINTWISE == "relu":
        return tl.where(x <= 0, 0.0, x)
    else:
        tl.static_assert(POINTWISE == "relu_sq")
        positive = tl.where(x <= 0, 0.0, x)
        return positive * positive


@triton.jit
def slope(x, POINTWISE: tl.constexpr):
    """The derivative of ``pointwise`` at x."""
    if POINTWISE == "silu":
        gate = sigmoid(x)
        return gate * (1.0 + x * (1.0 - gate))
    elif POINTWISE == "gelu":
        gate = sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        # Twice the derivative of u = sqrt(2/pi) * (x + 0.044715 x^3).
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        # Where the gate is exactly 0 or 1, x * x may be infinite.
        curved = gate * (1.0 - gate)
        return gate + tl.where(curved == 0, 0.0, x * curved * inner)
    elif POINTWISE == "relu":
        return tl.where(x <= 0, 0.0, 1.0)
    else:
        tl.static_assert(POINTWISE == "relu_sq")
        return tl.where(x <= 0, 0.0, 2.0 * x)


@triton.jit
def load_split(
    row_ptr, there, first, I, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr
):
    """Gate and up, (ROWS, COLUMNS) of type WIDE, of columns first, first + 1, ... of rows; zeros outside.

    row_ptr (ROWS,): the rows' starts, of 2I elements, or of I if not gated: then both are the gate. there (ROWS,):
    which rows exist. An interleaved row g0 u0 g1 u1 is loaded as it is, then split to g0 g1 and u0 u1.
    """
    if GATED and INTERLEAVED:
        both = 2 * first + tl.arange(0, 2 * COLUMNS)
        inside = there[:, None] & (both < 2 * I)[None, :]
        pairs = tl.load(row_ptr[:, None] + both[None, :], mask=inside, other=0.0).to(WIDE)
        gate, up = tl.split(tl.reshape(pairs, (row_ptr.shape[0], COLUMNS, 2)))
    else:
        column = first + tl.arange(0, COLUMNS)
        inside = there[:, None] & (column < I)[None, :]
        place_ptr = row_ptr[:, None] + column[None, :]
        gate = tl.load(place_ptr, mask=inside, other=0.0).to(WIDE)
        up = gate
        if GATED:
            up = tl.load(place_ptr + I, mask=inside, other=0.0).to(WIDE)
    return gate, up


@triton.jit
def store_split(
    row_ptr, there, first, I, gate, up, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, COLUMNS: tl.constexpr
):
    """The inverse of ``load_split``, rounded."""
    if GATED and INTERLEAVED:
        both = 2 * first + tl.arange(0, 2 * COLUMNS)
        inside = there[:, None] & (both < 2 * I)[None, :]
        pairs = tl.reshape(tl.join(gate, up), (row_ptr.shape[0], 2 * COLUMNS))
        tl.store(row_ptr[:, None] + both[None, :], rounded(pairs.to(tl.float32), row_ptr), mask=inside)
    else:
        column = first + tl.arange(0, COLUMNS)
        inside = there[:, None] & (column < I)[None, :]
        place_ptr = row_ptr[:, None] + column[None, :]
        tl.store(place_ptr, rounded(gate.to(tl.float32), row_ptr), mask=inside)
        if GATED:
            tl.store(place_ptr + I, rounded(up.to(tl.float32), row_ptr), mask=inside)


@triton.jit(do_not_specialize=["row_capacity"])
def activate_kernel(
    hidden_ptr,
    out_ptr,
    group_ends_ptr,
    experts_per_rank,
    row_capacity,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    POINTWISE: tl.constexpr,
    I: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store round(act(h)). Any grid: of P programs, p takes tiles p, p + P, ... of ROWS rows.

    hidden_ptr (R, F), F = 2I if GATED, else I; out_ptr (R, I).
    """
    WIDE: tl.constexpr = tl.float64 if hidden_ptr.dtype.element_ty == tl.float32 else tl.float32
    rows = valid_rows(group_ends_ptr, experts_per_rank, row_capacity)
    WIDTH: tl.constexpr = 2 * I if GATED else I
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        there = row < rows
        row_ptr = hidden_ptr + row.to(tl.int64) * WIDTH
        for first in range(0, I, COLUMNS):
            gate, up = load_split(row_ptr, there, first, I, GATED, INTERLEAVED, COLUMNS, WIDE)
            value = pointwise(gate, POINTWISE)
            if GATED:
                value = up * value
            column = first + tl.arange(0, COLUMNS)
            place = row.to(tl.int64)[:, None] * I + column[None, :]
            inside = there[:, None] & (column < I)[None, :]
            tl.store(out_ptr + place, rounded(value.to(tl.float32), out_ptr), mask=inside)


@triton.jit(do_not_specialize=["row_capacity"])
def activate_backward_kernel(
    hidden_ptr,
    grad_ptr,
    scores_ptr,
    slot_of_row_ptr,
    hidden_grad_ptr,
    dots_ptr,
    group_ends_ptr,
    experts_per_rank,
    row_capacity,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    POINTWISE: tl.constexpr,
    I: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Everything between the GEMMs of backward, in one pass. Grid as of ``activate_kernel``.

    hidden_ptr (R, F); scores_ptr (W*C*K,) fp32. The activation A is computed again, in type WIDE.
    grad_ptr (R, I): dA = d(out) . w2 of each row, not yet weighted; overwritten by A' = round(score * A), from which
    the gradient of w2 is taken. hidden_grad_ptr (R, F): dH = round(score * dA * d(act)/dh). dots_ptr (R,) fp32: the
    sum over I of dA * A, the gradient of the row's score.
    """
    WIDE: tl.constexpr = tl.float64 if hidden_ptr.dtype.element_ty == tl.float32 else tl.float32
    rows = valid_rows(group_ends_ptr, experts_per_rank, row_capacity)
    WIDTH: tl.constexpr = 2 * I if GATED else I
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        there = row < rows
        row_ptr = hidden_ptr + row.to(tl.int64) * WIDTH
        row_grad_ptr = hidden_grad_ptr + row.to(tl.int64) * WIDTH
        slot = tl.load(slot_of_row_ptr + row, mask=there, other=0)
        score = tl.load(scores_ptr + slot, mask=there, other=0.0).to(WIDE)[:, None]
        dot = tl.zeros((ROWS, COLUMNS), dtype=WIDE)
        for first in range(0, I, COLUMNS):
            gate, up = load_split(row_ptr, there, first, I, GATED, INTERLEAVED, COLUMNS, WIDE)
            column = first + tl.arange(0, COLUMNS)
            inside = there[:, None] & (column < I)[None, :]
            place_ptr = grad_ptr + row.to(tl.int64)[:, None] * I + column[None, :]
            grad = tl.load(place_ptr, mask=inside, other=0.0).to(WIDE)
            value = pointwise(gate, POINTWISE)
            weighted = score * grad
            gate_grad = weighted * slope(gate, POINTWISE)
            up_grad = weighted * value
            if GATED:
                gate_grad = gate_grad * up
                value = up * value
            dot += grad * value
            tl.store(place_ptr, rounded((score * value).to(tl.float32), grad_ptr), mask=inside)
            store_split(row_grad_ptr, there, first, I, gate_grad, up_grad, GATED, INTERLEAVED, COLUMNS)
        tl.store(dots_ptr + row, tl.sum(dot, axis=1).to(tl.float32), mask=there)


@triton.jit
def experts_of_rows(row, group_ends_ptr, experts_per_rank, EXPERTS_PADDED: tl.constexpr):
    """The rank's expert of each row (ROWS,): with ends 2 2 5, rows 1 and 2 are of experts 0 and 2."""
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
    """Add to each dot the sum over H of row * bias of its expert: the bias's share of the score's gradient.

    rows_ptr (R, H): d(out) of each row's token. bias_ptr (e, H). dots_ptr (R,) fp32. Grid as of ``activate_kernel``.
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
    """The sum of each expert's rows, each times its score if HAS_SCORES. Grid (e, ceil(width / COLUMNS)).

    rows_ptr (R, width); scores_ptr (W*C*K,) fp32; sums_ptr (e, width): rounded once, zeros for an expert without rows.
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
        inside = (row < end)[:, None] & (column < width)[None, :]
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        value = tl.load(rows_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if HAS_SCORES:
            slot = tl.load(slot_of_row_ptr + row, mask=row < end, other=0)
            value = value * tl.load(scores_ptr + slot, mask=row < end, other=0.0)[:, None]
        total += value.to(ACCUMULATOR)
    out = tl.sum(total, axis=0).to(tl.float32)
    tl.store(sums_ptr + group.to(tl.int64) * width + column, rounded(out, sums_ptr), mask=column < width)


# Columns of an activation that a program takes at a time: 4 of each half a thread.
MOST_ACTIVATED = 512
# Elements that an interpreted program takes at a time: it pays by the operation. On a GPU a program takes one row.
INTERPRETED_TILE = 4096
# A tile of ``sum_groups``: long enough in columns for whole sectors, in rows for loads in flight.
SUMMED_ROWS, SUMMED_COLUMNS = 64, 64
# The pointwise part of each activation, as kernels name it.
POINTWISE = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"} | {n: n for n in ("silu", "gelu", "relu", "relu_sq")}


@dataclass(frozen=True, kw_only=True, eq=False)
class HiddenGradient:
    """hidden: dH (R, F). weighted: A' = score * A (R, I), in the memory of dA. dots: (R,) fp32, <dA, A>."""

    hidden: Tensor
    weighted: Tensor
    dots: Tensor


def activate(hidden_RF: Tensor, experts: Experts, plan: RoutingPlan) -> Tensor:
    """``act(h)``, (R, I), of the pre-activation (R, F)."""
    out_RI = hidden_RF.new_empty((hidden_RF.shape[0], experts.w2.shape[2]))
    _over_rows(activate_kernel, (hidden_RF, out_RI), plan, _activation_constants(experts, hidden_RF.device))
    return out_RI


def activate_backward(
    hidden_RF: Tensor, grad_RI: Tensor, scores_WCK: Tensor, experts: Experts, plan: RoutingPlan
) -> HiddenGradient:
    """Gradients through score and activation. ``grad_RI``, dA before its weight, is overwritten."""
    hidden_grad_RF = torch.empty_like(hidden_RF)
    dots_R = hidden_RF.new_empty(hidden_RF.shape[0], dtype=torch.float32)
    pointers = (hidden_RF, grad_RI, scores_WCK, plan.slot_of_row, hidden_grad_RF, dots_R)
    _over_rows(activate_backward_kernel, pointers, plan, _activation_constants(experts, hidden_RF.device))
    return HiddenGradient(hidden=hidden_grad_RF, weighted=grad_RI, dots=dots_R)


def add_bias_dots(out_grad_RH: Tensor, bias_eH: Tensor, dots_R: Tensor, plan: RoutingPlan) -> None:
    """Add ``<d(out), bias>``, bias of the row's expert, to each row's score gradient ``dots_R``, in place."""
    held, width = bias_eH.shape
    constants = column_constants(width) | {"EXPERTS_PADDED": triton.next_power_of_2(held)}
    constants["ROWS"] = _rows_at_once(constants["COLUMNS"], bias_eH.device)
    _over_rows(add_bias_dots_kernel, (out_grad_RH, bias_eH, dots_R), plan, constants)


def sum_groups(rows_RF: Tensor, scores_WCK: Tensor | None, plan: RoutingPlan) -> Tensor:
    """The sum of each expert's rows, (e, F), each times its score if there are scores; exact zeros without rows."""
    width = rows_RF.shape[1]
    sums_eF = rows_RF.new_empty((plan.experts_per_rank, width))
    # Without scores their pointer is not read.
    scores = rows_RF if scores_WCK is None else scores_WCK
    grid, sizes = (plan.experts_per_rank, triton.cdiv(width, SUMMED_COLUMNS)), (plan.row_capacity, width)
    pointers = (rows_RF, scores, plan.slot_of_row, sums_eF, plan.group_ends)
    tile = {"ROWS": SUMMED_ROWS, "COLUMNS": SUMMED_COLUMNS, "HAS_SCORES": scores_WCK is not None}
    launch(sum_groups_kernel, grid, *pointers, *sizes, device=rows_RF.device, num_warps=ROW_WARPS, **tile)
    return sums_eF


def _over_rows(kernel: Any, pointers: tuple[Tensor, ...], plan: RoutingPlan, constants: dict[str, Any]) -> None:
    """Launch ``kernel`` over R rows; its last arguments are those of ``valid_rows``."""
    (rows, *_), device = pointers[0].shape, pointers[0].device
    bounds = (plan.group_ends, plan.experts_per_rank, plan.row_capacity)
    launch(kernel, (programs_over(rows, device),), *pointers, *bounds, device=device, **constants)


def _rows_at_once(columns_at_once: int, device: torch.device) -> int:
    return 1 if device.type == "cuda" else max(1, INTERPRETED_TILE // columns_at_once)


def _activation_constants(experts: Experts, device: torch.device) -> dict[str, int | bool | str]:
    intermediate = experts.w2.shape[2]
    columns_at_once = min(triton.next_power_of_2(intermediate), MOST_ACTIVATED)
    activation = {"GATED": experts.activation.gated, "POINTWISE": POINTWISE[experts.activation.name]}
    tile = {"I": intermediate, "ROWS": _rows_at_once(columns_at_once, device), "COLUMNS": columns_at_once}
    return {**activation, **tile, "INTERLEAVED": experts.layout.name == "interleaved", "num_warps": ROW_WARPS}
