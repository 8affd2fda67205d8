"""What every kernel of this backend is made of: peer pointers, rows, rounding, signals. And the way to launch one.

Numbers that change from call to call (R with exact sizes, steps, chunks) are not specialized: a kernel would be
compiled again when one of them happens to be a multiple of 16, on one rank, while the others wait.

Kernels find a peer's memory through a table of addresses, one int64 a rank, so neither the number of ranks nor the
transport is compiled in. Rows that are only moved are moved as integer words, so their dtype is not compiled in either.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from sonic_ep.fast.launch import INTERPRETED


@triton.jit
def peer_pointer(addresses_ptr, rank, like_ptr):
    """Address ``rank`` of the table, as a pointer of the type of ``like_ptr``.

    Shared buffers start at 16 bytes; blocks of gathered tokens at what a row is a multiple of, up to 16 bytes, and no
    access relies on more.
    """
    return tl.multiple_of(tl.load(addresses_ptr + rank).to(like_ptr.dtype), 16)


@triton.jit
def turn_of(program, rank, world_size):
    """Rank and token that a program of grid (W * C,) takes: the ranks in turn, its own first.

    So all links are busy at once. With W=3 on rank 1, programs 0 1 2 3 take token 0 of ranks 1 2 0, then token 1 of
    rank 1.
    """
    return (rank + program) % world_size, program // world_size


@triton.jit
def valid_rows(group_ends_ptr, experts_per_rank, row_capacity):
    """How many of a rank's rows are valid, and there: ends 2 5 mean five, or four where there is room for four.

    group_ends_ptr (e,) int32: see ``RoutingPlan``.
    """
    return tl.minimum(tl.load(group_ends_ptr + experts_per_rank - 1), row_capacity)


@triton.jit
def copy_row(source_ptr, target_ptr, WORDS: tl.constexpr, PIECE: tl.constexpr):
    """``WORDS`` words from ``source_ptr`` to ``target_ptr``."""
    for first in tl.static_range(0, WORDS, PIECE):
        column = first + tl.arange(0, PIECE)
        inside = column < WORDS
        tl.store(target_ptr + column, tl.load(source_ptr + column, mask=inside), mask=inside)


@triton.jit
def rounded(value, like_ptr):
    """fp32 to the element type of ``like_ptr``, to the nearest, ties to even.

    Triton's interpreter cuts bf16 off instead of rounding, so there the bits are rounded by hand: adding 0x7FFF, and
    one more where the last kept bit is odd, carries into it exactly when the cut-off part is over half, or is half and
    the bit is odd.
    """
    element: tl.constexpr = like_ptr.dtype.element_ty
    if INTERPRETED and element == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # The carry would turn a NaN of low bits into infinity.
        nearest = tl.where(value != value, 0x7FC0, nearest)
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(element)


@triton.jit
def exact_exp(x):
    """The exponential of fp32 to a few units in the last place; the GPU's own exponential is some 2^-22 off."""
    return tl.exp(x) if INTERPRETED else libdevice.exp(x)
