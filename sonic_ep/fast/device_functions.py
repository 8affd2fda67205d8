"""Functions that kernels share: peer pointers, valid rows, the order of tiles, copies, rounding.

Integers that change from call to call (R, tags, chunks) are in a kernel's ``do_not_specialize``: else Triton compiles
again when one of them is first 1 or a multiple of 16, on one rank, while the others wait.

A kernel finds peers through a table of addresses, (W,) int64, so neither W nor the transport is compiled in.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from sonic_ep.fast.launch import INTERPRETED

# Tiles of rows that are computed together: neighbours in time then share rows and weights in the second-level cache.
BAND: tl.constexpr = tl.constexpr(8)


@triton.jit
def peer_pointer(addresses_ptr, rank, like_ptr):
    """Entry ``rank`` of the address table, as a pointer of the type of ``like_ptr``."""
    # Shared buffers are aligned to 16 bytes. Gathered tokens may not be, if a row is no multiple of 16 bytes; but then
    # no access is 16 bytes wide.
    return tl.multiple_of(tl.load(addresses_ptr + rank).to(like_ptr.dtype), 16)


@triton.jit
def rank_and_token(program, rank, world_size):
    """Source rank and token of a program of grid (W * C,): ranks rotate, this one first, so that all links are busy.

    With W=3 on rank 1, programs 0 1 2 3 take token 0 of ranks 1 2 0, then token 1 of rank 1.
    """
    return (rank + program) % world_size, program // world_size


@triton.jit
def valid_rows(group_ends_ptr, experts_per_rank, row_capacity):
    """Valid rows in a buffer: with ``group_ends`` 2 5 (e,) int32 they are 5, or 4 where R = ``row_capacity`` = 4."""
    return tl.minimum(tl.load(group_ends_ptr + experts_per_rank - 1), row_capacity)


@triton.jit
def tile_in_bands(program, row_tiles, column_tiles):
    """Row and column of a program's tile, of ``row_tiles`` times ``column_tiles``: down ``BAND`` tiles, then right.

    Of 9 times 2, programs 0 to 7 take column 0 of rows 0 to 7, 8 to 15 column 1 of those, 16 and 17 those of row 8.
    """
    first = program // (BAND * column_tiles) * BAND
    height = tl.minimum(row_tiles - first, BAND)
    within = program % (BAND * column_tiles)
    return first + within % height, within // height


@triton.jit
def copy_row(source_ptr, target_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Copy ``WIDTH`` elements from ``source_ptr`` to ``target_ptr``, ``BLOCK`` at a time."""
    for first in tl.static_range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < WIDTH
        tl.store(target_ptr + column, tl.load(source_ptr + column, mask=inside), mask=inside)


@triton.jit
def push_value(value, slot, origins_ptr, rank, slots_per_rank):
    """Store the value of a row at its slot on the rank that the slot is of, if that is another than this.

    slot: of the group, -1 for none; a number, or as many as values. origins_ptr (W,) int64: addresses of C*K fp32 on
    each rank, C*K being ``slots_per_rank``. Slots 3 and 9 with 8 slots a rank go to slots 3 of rank 0 and 1 of rank 1.
    """
    origin = slot // slots_per_rank
    remote = (slot >= 0) & (origin != rank)
    address = tl.load(origins_ptr + origin, mask=remote, other=0)
    tl.store(address.to(tl.pointer_type(tl.float32)) + slot % slots_per_rank, value, mask=remote)


@triton.jit
def rounded(value, like_ptr):
    """fp32 to the element type of ``like_ptr``, to the nearest, ties to even.

    Triton's interpreter truncates to bf16; there 0x7FFF, plus 1 where the last kept bit is odd, is added to the bits
    first, which carries into that bit exactly when it has to be rounded up.
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
    """The exponential of fp32 to a few units in the last place; the GPU's own is some 2^-22 off."""
    return tl.exp(x) if INTERPRETED else libdevice.exp(x)
