"""What every kernel of this backend is made of: peer pointers, rows, rounding, signals. And the way to launch one.

Numbers that change from call to call (R with exact sizes, steps, chunks) are not specialized: a kernel would be
compiled again when one of them happens to be a multiple of 16, on one rank, while the others wait.

Kernels find a peer's memory through a table of addresses, one int64 a rank, so neither the number of ranks nor the
transport is compiled in. Rows that are only moved are moved as integer words, so their dtype is not compiled in either.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.language.extra.cuda import globaltimer

from sonic_ep.fast.interpreter import alone_in_this_process, hasten

# Whether kernels run under Triton's interpreter, on the CPU; Triton itself decides when it is imported.
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
if INTERPRETED.value:
    hasten()

# What a waiting kernel sleeps between two looks at a flag, under the interpreter.
REST_SECONDS = 1e-3

# Why a wait was given up: its time was up, or the peer came to another meeting.
TIME_UP: tl.constexpr = tl.constexpr(1)
ELSEWHERE: tl.constexpr = tl.constexpr(2)

# A row is moved in pieces of this many bytes: one piece is 16 bytes for each of 4 warps, four times over.
PIECE_BYTES = 8192
ROW_WARPS = 4
# Programs of ROW_WARPS warps that fill a multiprocessor.
PROGRAMS_PER_MULTIPROCESSOR = 16


def rest() -> None:
    """Leave the processor to another rank: an interpreted kernel that waits shares it with those it waits for."""
    time.sleep(REST_SECONDS)


def now() -> int:
    """Nanoseconds since some time, of the host's clock: what ``globaltimer`` is on a GPU."""
    return time.monotonic_ns()


# To Triton's compiler, which never gets to call them, the names have to look like some of its own.
rest.__triton_builtin__ = now.__triton_builtin__ = True  # type: ignore[attr-defined]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, **constants: Any) -> None:
    """Run ``kernel`` over ``grid`` on the current stream of ``device``; an empty grid is no launch.

    Products and sums are rounded one by one, as in plain PyTorch: no fused multiply-add.
    """
    if min(grid) == 0:
        return
    if INTERPRETED.value:
        scope: Any = alone_in_this_process()
    elif torch.cuda.current_device() != device.index:
        scope = torch.cuda.device(device)
    else:
        scope = nullcontext()
    with scope:
        kernel[grid](*arguments, enable_fp_fusion=False, **constants)


def power_of_two(count: int) -> int:
    """The least power of two that is at least ``count``: block sizes of Triton are such powers."""
    return 1 << max(count - 1, 0).bit_length()


def host_words(count: int, device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """Zeros on the host, for kernels on ``device`` to write and the host to read: pinned for a GPU."""
    # What is made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


def pieces(count: int, size: int) -> int:
    """How many pieces of ``size`` hold ``count``."""
    return -(-count // size)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def programs_over(rows: int, device: torch.device) -> int:
    """Programs that share ``rows`` rows, of which few may be valid: as many as a GPU has room for, at most one a row.

    A program for each row would cost more where most of them find nothing to do: with W ranks, a rank has room for up
    to W times the rows that it receives on average.
    """
    return min(rows, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device))


def words(rows: Tensor) -> Tensor:
    """The same memory as integers of 4 bytes, or of 2 where a row (N, H) has no whole number of 4."""
    whole = rows.shape[-1] * rows.element_size() % 4 == 0
    return rows.view(torch.int32 if whole else torch.int16)


def movable(rows_NH: Tensor) -> Tensor:
    """The same rows, one behind the other, and beginning where ``words`` can begin: a view may begin at any element.

    Of one row or none any strides count as contiguous; ``words`` minds them all the same.
    """
    rows_NH = rows_NH.contiguous().flatten().view(rows_NH.shape)
    return rows_NH.clone() if rows_NH.data_ptr() % 4 else rows_NH


def piece(words_per_row: int, word_bytes: int) -> int:
    """Words of a row that one program moves at a time: a power of two, at most ``PIECE_BYTES``."""
    return min(power_of_two(words_per_row), PIECE_BYTES // word_bytes)


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


@triton.jit
def signal(flag_ptr, tag):
    """Raise a flag (int64) to the ``tag`` of this meeting. Everything this program wrote before is visible
    to its taker. A flag that is up is of a meeting that was left by an error, and nobody takes it any more.
    """
    tl.debug_barrier()
    tl.atomic_xchg(flag_ptr, tl.full((), 0, tl.int64) + tag, sem="release", scope="sys")


@triton.jit
def take_signal(flag_ptr, expiry_ptr, peer, tag, limit):
    """Wait until the flag is up to ``tag``, and lower it. Everything its raiser wrote before is visible after."""
    up = tl.full((), 0, tl.int64) + tag
    _turn_in_time(flag_ptr, up, up - up, "acquire", expiry_ptr, peer, tag, limit, False)
    tl.debug_barrier()


@triton.jit
def _turn_in_time(flag_ptr, old, new, SEM: tl.constexpr, expiry_ptr, peer, tag, limit, SHOWS_TAG: tl.constexpr):
    """Turn a flag from ``old`` to ``new``, once it is ``old``.

    expiry_ptr (4,) int64: after ``limit`` nanoseconds in vain it says why, peer + 1, tag and what the flag was,
    and on a GPU the program traps. SHOWS_TAG: a flag that is neither down nor ``old`` is the tag
    of a peer at another meeting, and is not waited for.
    """
    if INTERPRETED:
        # Nothing traps there: after one wait in vain the others are not to take their time as well.
        limit = tl.where(tl.load(expiry_ptr) == 0, limit, 0)
    seen = tl.atomic_cas(flag_ptr, old, new, sem=SEM, scope="sys")
    if seen != old:
        spent = tl.full((), 0, tl.int64)
        began = now() if INTERPRETED else globaltimer()
        while (seen != old) & (spent < limit) & ((seen == 0) | (not SHOWS_TAG)):
            if INTERPRETED:
                rest()
            seen = tl.atomic_cas(flag_ptr, old, new, sem=SEM, scope="sys")
            spent = (now() if INTERPRETED else globaltimer()) - began
    # The host's memory is far: nothing of it is read where the wait was not in vain. ("and" looks at both its sides.)
    if seen != old:  # noqa: SIM102
        # The first to give up is who tells: others may only have waited for what it would have done.
        if tl.load(expiry_ptr) == 0:
            tl.store(expiry_ptr + 1, peer + 1)
            tl.store(expiry_ptr + 2, tag)
            tl.store(expiry_ptr + 3, seen.to(tl.int64))
            tl.store(expiry_ptr, tl.where((seen != 0) & SHOWS_TAG, ELSEWHERE, TIME_UP))
    tl.device_assert(seen == old, "sonic_ep: a rank waited for another in vain; who it was is told on the host")


@triton.jit(do_not_specialize=["tag", "limit"])
def barrier_kernel(flags_ptr, world_size, expiry_ptr, rank, tag, limit):
    """All ranks meet, at the meeting ``tag``: what each wrote before is visible to all after. Grid (W,), one a peer.

    flags_ptr (W,) int64: addresses of each rank's W flags, int64, all down (0) before and after; flag p of a rank is
    raised by rank p, to its tag, and lowered by its owner, who traps if it is another tag than its own.

    Under the interpreter, where programs run one after the other, the grid is (2 * W,): the first W raise a flag each,
    the others wait. So nobody is kept waiting by a rank that itself waits for a third.
    """
    program = tl.program_id(0)
    peer = program % world_size
    if peer != rank:
        here = tl.full((), 0, tl.int64) + tag
        down = here - here
        if program < world_size:
            theirs = tl.load(flags_ptr + peer).to(tl.pointer_type(tl.int64)) + rank
            # The peer may still be about to lower the flag of the last meeting.
            _turn_in_time(theirs, down, here, "release", expiry_ptr, peer, here, limit, False)
        if (program >= world_size) | (not INTERPRETED):
            mine = tl.load(flags_ptr + rank).to(tl.pointer_type(tl.int64)) + peer
            _turn_in_time(mine, here, down, "acquire", expiry_ptr, peer, here, limit, True)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["tag", "limit"])
def leave_kernel(flags_ptr, world_size, rank, tag, limit):
    """Set this rank's flag on every peer to ``tag``, of ``Phase.LEFT``. Grid (W,), one program a peer.

    flags_ptr: see ``barrier_kernel``. A flag that is still up is waited for, ``limit`` nanoseconds at most, so that its
    owner can lower it; then it is overwritten.
    """
    peer = tl.program_id(0)
    if peer != rank:
        left = tl.full((), 0, tl.int64) + tag
        theirs = tl.load(flags_ptr + peer).to(tl.pointer_type(tl.int64)) + rank
        seen = tl.atomic_cas(theirs, left - left, left, sem="release", scope="sys")
        spent = left - left
        began = now() if INTERPRETED else globaltimer()
        while (seen != 0) & (spent < limit):
            if INTERPRETED:
                rest()
            seen = tl.atomic_cas(theirs, left - left, left, sem="release", scope="sys")
            spent = (now() if INTERPRETED else globaltimer()) - began
        if seen != 0:
            tl.atomic_xchg(theirs, left, sem="release", scope="sys")
