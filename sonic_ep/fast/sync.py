"""Flags between ranks in kernels: signals, the barrier, and the flag of a rank that leaves."""

from __future__ import annotations

import time

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from sonic_ep.fast.launch import INTERPRETED

# What a waiting kernel sleeps between two looks at a flag, under the interpreter.
REST_SECONDS = 1e-3
# Why a wait was given up: its time was up, or the peer came to another meeting.
TIME_UP: tl.constexpr = tl.constexpr(1)
ELSEWHERE: tl.constexpr = tl.constexpr(2)


def rest() -> None:
    """Leave the processor to another rank: an interpreted kernel that waits shares it with those it waits for."""
    time.sleep(REST_SECONDS)


def now() -> int:
    """Nanoseconds since some time, of the host's clock: what ``globaltimer`` is on a GPU."""
    return time.monotonic_ns()


# To Triton's compiler, which never gets to call them, the names have to look like some of its own.
rest.__triton_builtin__ = now.__triton_builtin__ = True  # type: ignore[attr-defined]


@triton.jit
def signal(flag_ptr, tag):
    """Raise a flag (int64) to the ``tag`` of this meeting. Everything this program wrote before is visible
    to its taker. A flag that is up is of a meeting that was left by an error, and nobody takes it any more.
    """
    tl.debug_barrier()
    tl.atomic_xchg(flag_ptr, tl.full((), 0, tl.int64) + tag, sem="release", scope="sys")


@triton.jit
def take_signal(flag_ptr, wait_errors_ptr, peer, tag, limit):
    """Wait until the flag is up to ``tag``, and lower it. Everything its raiser wrote before is visible after."""
    up = tl.full((), 0, tl.int64) + tag
    _turn_in_time(flag_ptr, up, up - up, "acquire", wait_errors_ptr, peer, tag, limit, False)
    tl.debug_barrier()


@triton.jit
def _turn_in_time(flag_ptr, old, new, SEM: tl.constexpr, wait_errors_ptr, peer, tag, limit, SHOWS_TAG: tl.constexpr):
    """Turn a flag from ``old`` to ``new``, once it is ``old``.

    expiry_ptr (4,) int64: after ``limit`` nanoseconds in vain it says why, peer + 1, tag and what the flag was,
    and on a GPU the program traps. SHOWS_TAG: a flag that is neither down nor ``old`` is the tag
    of a peer at another meeting, and is not waited for.
    """
    if INTERPRETED:
        # Nothing traps there: after one wait in vain the others are not to take their time as well.
        limit = tl.where(tl.load(wait_errors_ptr) == 0, limit, 0)
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
        if tl.load(wait_errors_ptr) == 0:
            tl.store(wait_errors_ptr + 1, peer + 1)
            tl.store(wait_errors_ptr + 2, tag)
            tl.store(wait_errors_ptr + 3, seen.to(tl.int64))
            tl.store(wait_errors_ptr, tl.where((seen != 0) & SHOWS_TAG, ELSEWHERE, TIME_UP))
    tl.device_assert(seen == old, "sonic_ep: a rank waited for another in vain; who it was is told on the host")


@triton.jit(do_not_specialize=["tag", "limit"])
def barrier_kernel(flags_ptr, world_size, wait_errors_ptr, rank, tag, limit):
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
            _turn_in_time(theirs, down, here, "release", wait_errors_ptr, peer, here, limit, False)
        if (program >= world_size) | (not INTERPRETED):
            mine = tl.load(flags_ptr + rank).to(tl.pointer_type(tl.int64)) + peer
            _turn_in_time(mine, here, down, "acquire", wait_errors_ptr, peer, here, limit, True)
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
