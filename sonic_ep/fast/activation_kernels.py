"""Kernels between the two projections: the activation, and in backward all gradients in one pass.

Both take the pre-activation h (R, F), F = 2I for gated activations and I for others. All arithmetic is fp32, of fp32
rows fp64: there the GPU's exponential would be the largest error of all. What is stored is rounded once. Rows behind
the valid ones are neither read nor written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sonic_ep.fast.device import rounded, valid_rows


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def pointwise(x, POINTWISE: tl.constexpr):
    """The activation of x (fp32), NaN for NaN; gelu by its tanh approximation, x * sigmoid(2u) in other words."""
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
    """The derivative of ``pointwise`` at x (fp32)."""
    if POINTWISE == "silu":
        gate = sigmoid(x)
        return gate * (1.0 + x * (1.0 - gate))
    elif POINTWISE == "gelu":
        gate = sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        # Twice the derivative of u = sqrt(2/pi) * (x + 0.044715 x^3).
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        # Where the gate is open or closed altogether, the square of x may be infinite.
        curved = gate * (1.0 - gate)
        return gate + tl.where(curved == 0, 0.0, x * curved * inner)
    elif POINTWISE == "relu":
        return tl.where(x <= 0, 0.0, 1.0)
    else:
        tl.static_assert(POINTWISE == "relu_sq")
        return tl.where(x <= 0, 0.0, 2.0 * x)


@triton.jit
def load_split(
    row_ptr,
    there,
    first,
    width,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gate and up, (ROWS, COLUMNS) of type WIDE, of columns first, first + 1, ... of rows; zeros where there is none.

    row_ptr (ROWS,): where each row of 2 * width begins, or of ``width`` if not gated: then it is the gate, twice.
    there (ROWS,): which rows exist. Interleaved, they are loaded as they lie and taken apart after: columns 0 and 1 of
    the row g0 u0 g1 u1 are g0 g1 and u0 u1.
    """
    if GATED and INTERLEAVED:
        both = 2 * first + tl.arange(0, 2 * COLUMNS)
        inside = there[:, None] & (both < 2 * width)[None, :]
        pairs = tl.load(row_ptr[:, None] + both[None, :], mask=inside, other=0.0).to(WIDE)
        gate, up = tl.split(tl.reshape(pairs, (row_ptr.shape[0], COLUMNS, 2)))
    else:
        column = first + tl.arange(0, COLUMNS)
        inside = there[:, None] & (column < width)[None, :]
        place_ptr = row_ptr[:, None] + column[None, :]
        gate = tl.load(place_ptr, mask=inside, other=0.0).to(WIDE)
        up = gate
        if GATED:
            up = tl.load(place_ptr + width, mask=inside, other=0.0).to(WIDE)
    return gate, up


@triton.jit
def store_split(
    row_ptr, there, first, width, gate, up, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, COLUMNS: tl.constexpr
):
    """The inverse of ``load_split``, rounded."""
    if GATED and INTERLEAVED:
        both = 2 * first + tl.arange(0, 2 * COLUMNS)
        inside = there[:, None] & (both < 2 * width)[None, :]
        pairs = tl.reshape(tl.join(gate, up), (row_ptr.shape[0], 2 * COLUMNS))
        tl.store(row_ptr[:, None] + both[None, :], rounded(pairs.to(tl.float32), row_ptr), mask=inside)
    else:
        column = first + tl.arange(0, COLUMNS)
        inside = there[:, None] & (column < width)[None, :]
        place_ptr = row_ptr[:, None] + column[None, :]
        tl.store(place_ptr, rounded(gate.to(tl.float32), row_ptr), mask=inside)
        if GATED:
            tl.store(place_ptr + width, rounded(up.to(tl.float32), row_ptr), mask=inside)


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

    hidden_ptr (R, F), out_ptr (R, I).
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
            tl.store(
                out_ptr + place, rounded(value.to(tl.float32), out_ptr), mask=there[:, None] & (column < I)[None, :]
            )


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
    """All there is between the GEMMs of backward, in one pass. Any grid, as above.

    hidden_ptr (R, F). grad_ptr (R, I): dA = d(out) . w2 of each row, not yet weighted, and on return
    in its place A' = round(score * A), what the gradient of w2 is made of. hidden_grad_ptr (R, F): dH = round(score *
    dA * d(act)/dh). dots_ptr (R,) fp32: the sum over I of dA * A, the gradient of the row's score.
    scores_ptr (W*C*K,) fp32. The activation A is computed again, in fp32.
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
