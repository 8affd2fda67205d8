"""The activation between an expert's two GEMMs, and its gradient. Rows past ``plan.group_ends[-1]`` are unspecified."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sonic_ep.activation import ACTIVATIONS, Activation, GateLayout, Swiglu
from sonic_ep.fast.device_functions import push_value, rounded, valid_rows
from sonic_ep.fast.experts import rows_at_once
from sonic_ep.fast.launch import LAUNCHERS_KEPT, ROW_WARPS, Launcher, programs_over, triton_kernel
from sonic_ep.plan import RoutingPlan


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def pointwise(x, POINTWISE: tl.constexpr, ALPHA: tl.constexpr):
    """The activation of x, NaN for NaN. gelu is the tanh approximation: x * sigmoid(2u), u as in ``slope``.

    ALPHA: of scaled_silu only, x * sigmoid(ALPHA * x).
    """
    if POINTWISE == "silu":
        return x * sigmoid(x)
    elif POINTWISE == "scaled_silu":
        return x * sigmoid(ALPHA * x)
    elif POINTWISE == "gelu":
        return x * sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    elif POINTWISE == "relu":
        return tl.where(x <= 0, 0.0, x)
    else:
        tl.static_assert(POINTWISE == "relu_sq")
        positive = tl.where(x <= 0, 0.0, x)
        return positive * positive


@triton.jit
def slope(x, POINTWISE: tl.constexpr, ALPHA: tl.constexpr):
    """The derivative of ``pointwise`` at x."""
    if POINTWISE == "silu":
        gate = sigmoid(x)
        return gate * (1.0 + x * (1.0 - gate))
    elif POINTWISE == "scaled_silu":
        gate = sigmoid(ALPHA * x)
        # Times ALPHA last, since ALPHA * x may be infinite where the gate is exactly 0 or 1.
        return gate + ALPHA * (x * (gate * (1.0 - gate)))
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
def limited(gate, up, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr):
    """``min(gate, LIMIT)`` and ``clamp(up, -LIMIT, LIMIT) + UP_OFFSET``, NaN for NaN. LIMIT 0: no limit."""
    if LIMIT > 0.0:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if UP_OFFSET != 0.0:
        up = up + UP_OFFSET
    return gate, up


@triton.jit
def load_split(
    row_ptr,
    up_row_ptr,
    there,
    first,
    I,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gate and up, (ROWS, COLUMNS) of type WIDE, of columns first, first + 1, ... of rows; zeros outside.

    row_ptr, up_row_ptr (ROWS,): where the rows' gates and ups start; if not gated both are the gate. there (ROWS,):
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
            up = tl.load(up_row_ptr[:, None] + column[None, :], mask=inside, other=0.0).to(WIDE)
    return gate, up


@triton.jit
def store_split(
    row_ptr,
    up_row_ptr,
    there,
    first,
    I,
    gate,
    up,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    COLUMNS: tl.constexpr,
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
            tl.store(up_row_ptr[:, None] + column[None, :], rounded(up.to(tl.float32), row_ptr), mask=inside)


@triton_kernel
def activate_kernel(
    hidden_ptr,
    up_ptr,
    out_ptr,
    group_ends_ptr,
    experts_per_rank,
    row_capacity,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    POINTWISE: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    I: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store round(act(h)). Any grid: of P programs, p takes tiles p, p + P, ... of ROWS rows.

    hidden_ptr: rows of gates, or interleaved, or of h if not GATED; up_ptr: rows of ups if GATED and not INTERLEAVED.
    Rows of both are STRIDE elements apart. out_ptr (R, I). ALPHA: see ``pointwise``; LIMIT, UP_OFFSET: ``limited``.
    """
    WIDE: tl.constexpr = tl.float64 if hidden_ptr.dtype.element_ty == tl.float32 else tl.float32
    rows = valid_rows(group_ends_ptr, experts_per_rank, row_capacity)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        there = row < rows
        row_ptr = hidden_ptr + row.to(tl.int64) * STRIDE
        up_row_ptr = up_ptr + row.to(tl.int64) * STRIDE
        for first in range(0, I, COLUMNS):
            gate, up = load_split(row_ptr, up_row_ptr, there, first, I, GATED, INTERLEAVED, COLUMNS, WIDE)
            gate, up = limited(gate, up, LIMIT, UP_OFFSET)
            value = pointwise(gate, POINTWISE, ALPHA)
            if GATED:
                value = up * value
            column = first + tl.arange(0, COLUMNS)
            place = row.to(tl.int64)[:, None] * I + column[None, :]
            inside = there[:, None] & (column < I)[None, :]
            tl.store(out_ptr + place, rounded(value.to(tl.float32), out_ptr), mask=inside)


@triton_kernel
def activate_backward_kernel(
    hidden_ptr,
    up_ptr,
    grad_ptr,
    scores_ptr,
    slot_of_row_ptr,
    hidden_grad_ptr,
    up_grad_ptr,
    dots_ptr,
    origins_ptr,
    group_ends_ptr,
    rank,
    slots_per_rank,
    experts_per_rank,
    row_capacity,
    PUSH: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    POINTWISE: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    I: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Everything between the GEMMs of backward, in one pass. Grid as of ``activate_kernel``.

    hidden_ptr, up_ptr: as of ``activate_kernel``; scores_ptr (W*C*K,) fp32. The activation A is computed again, in type
    WIDE. grad_ptr (R, I): dA = d(out) . w2 of each row, not yet weighted; overwritten by A' = round(score * A), from
    which the gradient of w2 is taken. hidden_grad_ptr, up_grad_ptr, which lie as h does: dH = round(score * dA *
    d(act)/dh). dots_ptr (R,) fp32: the sum over I of dA * A, the gradient of the row's score, pushed to its slot's
    origin if PUSH, see ``push_value``.
    """
    WIDE: tl.constexpr = tl.float64 if hidden_ptr.dtype.element_ty == tl.float32 else tl.float32
    rows = valid_rows(group_ends_ptr, experts_per_rank, row_capacity)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        there = row < rows
        row_ptr = hidden_ptr + row.to(tl.int64) * STRIDE
        up_row_ptr = up_ptr + row.to(tl.int64) * STRIDE
        row_grad_ptr = hidden_grad_ptr + row.to(tl.int64) * STRIDE
        up_row_grad_ptr = up_grad_ptr + row.to(tl.int64) * STRIDE
        slot = tl.load(slot_of_row_ptr + row, mask=there, other=-1)
        score = tl.load(scores_ptr + slot, mask=there, other=0.0).to(WIDE)[:, None]
        dot = tl.zeros((ROWS, COLUMNS), dtype=WIDE)
        for first in range(0, I, COLUMNS):
            gate, up = load_split(row_ptr, up_row_ptr, there, first, I, GATED, INTERLEAVED, COLUMNS, WIDE)
            near_gate, near_up = limited(gate, up, LIMIT, UP_OFFSET)
            column = first + tl.arange(0, COLUMNS)
            inside = there[:, None] & (column < I)[None, :]
            place_ptr = grad_ptr + row.to(tl.int64)[:, None] * I + column[None, :]
            grad = tl.load(place_ptr, mask=inside, other=0.0).to(WIDE)
            value = pointwise(near_gate, POINTWISE, ALPHA)
            weighted = score * grad
            gate_grad = weighted * slope(near_gate, POINTWISE, ALPHA)
            up_grad = weighted * value
            if GATED:
                gate_grad = gate_grad * near_up
                value = near_up * value
            if LIMIT > 0.0:
                gate_grad = tl.where(gate > LIMIT, 0.0, gate_grad)
                up_grad = tl.where(tl.abs(up) > LIMIT, 0.0, up_grad)
            dot += grad * value
            tl.store(place_ptr, rounded((score * value).to(tl.float32), grad_ptr), mask=inside)
            store_split(row_grad_ptr, up_row_grad_ptr, there, first, I, gate_grad, up_grad, GATED, INTERLEAVED, COLUMNS)
        total = tl.sum(dot, axis=1).to(tl.float32)
        tl.store(dots_ptr + row, total, mask=there)
        if PUSH:
            push_value(total, slot, origins_ptr, rank, slots_per_rank)


# Columns of an activation that a program takes at a time: 4 of each half a thread.
MOST_ACTIVATED = 512
# The pointwise part of each activation, as kernels name it.
POINTWISE = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"} | {n: n for n in ("silu", "gelu", "relu", "relu_sq")}


@dataclass(kw_only=True, eq=False)
class HiddenGradient:
    """hidden: dH, as h. weighted: A' = score * A (R, I), in the memory of dA. dots: (R,) fp32, <dA, A>."""

    hidden: tuple[Tensor, ...]
    weighted: Tensor
    dots: Tensor


def raise_without_kernel(where: object, activation: Activation) -> None:
    """Raise ``ValueError`` for an activation other than this library's own."""
    # Of a subclass of Swiglu, which may compute otherwise, only the reference knows how.
    if type(activation) is Swiglu or activation.is_builtin:
        return
    names = ", ".join(map(repr, ACTIVATIONS))
    expected = f"one that backend 'fast' has kernels for: {names}, or a sonic_ep.Swiglu (backend='reference' takes any)"
    raise ValueError(f"{where}: activation: got {activation.name!r}, a custom Activation, expected {expected}")


@dataclass(frozen=True, kw_only=True, eq=False)
class ActivationForm:
    """The kernels for one activation and layout of h. in_halves: gates and ups are the halves of a row."""

    intermediate: int
    in_halves: bool
    forward: Launcher
    backward: Launcher
    backward_and_push: Launcher

    def activate(self, hidden: Sequence[Tensor], plan: RoutingPlan) -> Tensor:
        """``act(h)``, (R, I), of the pre-activation (R, F), or of gate and up, each (R, I)."""
        first, ends_e = hidden[0], plan.group_ends
        rows = first.shape[0]
        out_RI = first.new_empty((rows, self.intermediate))
        grid = (programs_over(rows, first.device),)
        self.forward(grid, first, self._ups_of(hidden), out_RI, ends_e, ends_e.shape[0], plan.slot_of_row.shape[0])
        return out_RI

    def gradient(
        self,
        hidden: Sequence[Tensor],
        grad_RI: Tensor,
        scores_WCK: Tensor,
        plan: RoutingPlan,
        origins_W: Tensor | None = None,
    ) -> HiddenGradient:
        """Gradients through score and activation. ``grad_RI``, dA before its weight, is overwritten.

        origins_W: where the scores' gradients are pushed to, see ``push_value``; None: nowhere.
        """
        first, (_, max_tokens, top_k) = hidden[0], plan.expert_ids.shape
        rows = first.shape[0]
        hidden_grads = tuple(map(torch.empty_like, hidden))
        dots_R = first.new_empty(rows, dtype=torch.float32)
        run, origins = (self.backward, dots_R) if origins_W is None else (self.backward_and_push, origins_W)
        pointers = (first, self._ups_of(hidden), grad_RI, scores_WCK, plan.slot_of_row)
        grads = (hidden_grads[0], self._ups_of(hidden_grads), dots_R, origins, plan.group_ends)
        sizes = (plan.rank, max_tokens * top_k, plan.experts_per_rank, plan.row_capacity)
        run((programs_over(rows, first.device),), *pointers, *grads, *sizes)
        return HiddenGradient(hidden=hidden_grads, weighted=grad_RI, dots=dots_R)

    def _ups_of(self, hidden: Sequence[Tensor]) -> Tensor:
        """Where ups start. Interleaved or without a gate that is not read."""
        return hidden[0][:, self.intermediate :] if self.in_halves else hidden[-1]


@lru_cache(LAUNCHERS_KEPT)
def activation_form(
    device: torch.device, width: int, parts: int, activation: Activation, layout: GateLayout
) -> ActivationForm:
    """For h of ``parts`` tensors, each (R, width)."""
    split = parts == 2
    intermediate = width if split or not activation.gated else width // 2
    interleaved = not split and layout.name == "interleaved"
    columns_at_once = min(triton.next_power_of_2(intermediate), MOST_ACTIVATED)
    at_once = rows_at_once(columns_at_once, device)
    tile = {"I": intermediate, "ROWS": at_once, "COLUMNS": columns_at_once, "num_warps": ROW_WARPS}
    constants = {"GATED": activation.gated, "INTERLEAVED": interleaved, "STRIDE": width, **tile, **_numbers(activation)}
    return ActivationForm(
        intermediate=intermediate,
        in_halves=not split and activation.gated and not interleaved,
        forward=Launcher(activate_kernel, device, constants),
        backward=Launcher(activate_backward_kernel, device, {"PUSH": False, **constants}),
        backward_and_push=Launcher(activate_backward_kernel, device, {"PUSH": True, **constants}),
    )


def _numbers(activation: Activation) -> dict[str, float | str]:
    """The function of an activation, as kernels take it."""
    numbers: dict[str, float | str] = {"POINTWISE": POINTWISE[activation.name], "ALPHA": 1.0}
    numbers |= {"LIMIT": 0.0, "UP_OFFSET": 0.0}
    if isinstance(activation, Swiglu):
        if activation.alpha != 1:
            numbers |= {"POINTWISE": "scaled_silu", "ALPHA": activation.alpha}
        if activation.limit < math.inf:
            # As fp32 holds it: the reference compares in fp32, where these kernels compute in fp64.
            numbers["LIMIT"] = ctypes.c_float(activation.limit).value
        numbers["UP_OFFSET"] = activation.up_offset
    return numbers
