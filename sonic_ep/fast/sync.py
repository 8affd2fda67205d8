"""Flags between ranks in kernels: signals, the barrier, and the flag of a rank that leaves."""

from __future__ import annotations

import time

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from sonic_ep.fast.launch import INTERPRETED

# Sleep of an interpreted kernel between two reads of a flag.
REST_SECONDS = 1e-3
# Why a wait ended in an error: it timed out, or the peer is in another call.
TIME_UP: tl.constexpr = tl.constexpr(1)
ELSEWHERE: tl.constexpr = tl.constexpr(2)


def rest() -> None:
    """Yield the processor: an interpreted kernel shares it with the ranks that it waits for."""
    time.sleep(REST_SECONDS)


def now() -> int:
    """Nanoseconds of the host's clock, as ``globaltimer`` is on a GPU."""
    return time.monotonic_ns()


# Triton's compiler, which never calls them, accepts only names that look like its own.
rest.__triton_builtin__ = now.__triton_builtin__ = True  # type: ignore[attr-defined]


@triton.jit
def signal(flag_ptr, tag):
    """Raise a flag (int64) to ``tag``. Everything this program wrote before is visible to the rank that takes it.

    A flag that is up already is of a call that ended in an error, and is overwritten.
    """
    tl.debug_barrier()
    tl.atomic_xchg(flag_ptr, tl.full((), 0, tl.int64) + tag, sem="release", scope="sys")


@triton.jit
def take_signal(flag_ptr, wait_errors_ptr, peer, tag, limit):
    """Wait until the flag is ``tag``, and lower it to 0. Everything that ``peer`` wrote before it is visible after."""
    up = tl.full((), 0, tl.int64) + tag
    _set_in_time(flag_ptr, up, up - up, "acquire", wait_errors_ptr, peer, tag, limit, False)
    tl.debug_barrier()


@triton.jit
def _set_in_time(flag_ptr, old, new, SEM: tl.constexpr, wait_errors_ptr, peer, tag, limit, SHOWS_TAG: tl.constexpr):
    """Set a flag from ``old`` to ``new``, once it is ``old``.

    wait_errors_ptr (4,) int64: receives the reason, peer + 1, tag and flag after ``limit`` nanoseconds; on a GPU the
    program then traps. SHOWS_TAG: a flag that is neither 0 nor ``old`` is the tag of a peer in another call, and ends
    the wait.
    """
    if INTERPRETED:
        # Nothing traps there: after one timeout the other waits end at once.
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
    # Host memory is slow to read: only after a failed wait. (Triton's "and" would evaluate both sides.)
    if seen != old:  # noqa: SIM102
        # Only the first failed wait is recorded: later ones may be its consequence.
        if tl.load(wait_errors_ptr) == 0:
            tl.store(wait_errors_ptr + 1, peer + 1)
            tl.store(wait_errors_ptr + 2, tag)
            tl.store(wait_errors_ptr + 3, seen.to(tl.int64))
            tl.store(wait_errors_ptr, tl.where((seen != 0) & SHOWS_TAG, ELSEWHERE, TIME_UP))
    tl.device_assert(seen == old, "sonic_ep: a wait for another rank failed; the host names the rank")


@triton.jit(do_not_specialize=["tag", "limit"])
def barrier_kernel(flags_ptr, world_size, wait_errors_ptr, rank, tag, limit):
    """The barrier ``tag`` of all ranks: what each wrote before is visible to all after. Grid (W,), one a peer.

    flags_ptr (W,) int64: addresses of each rank's W flags, int64, all 0 before and after; flag p of a rank is raised by
    rank p, to its tag, and lowered by its owner, which traps if the tag is not its own.

    Under the interpreter, where programs run one after the other, the grid is (2 * W,): the first W raise the flags,
    the others wait. So no rank waits for one that waits for a third before raising its flags.
    """
    program = tl.program_id(0)
    peer = program % world_size
    if peer != rank:
        here = tl.full((), 0, tl.int64) + tag
        down = here - here
        if program < world_size:
            theirs = tl.load(flags_ptr + peer).to(tl.pointer_type(tl.int64)) + rank
            # The peer may not have lowered the flag of the last barrier yet.
            _set_in_time(theirs, down, here, "release", wait_errors_ptr, peer, here, limit, False)
        if (program >= world_size) | (not INTERPRETED):
            mine = tl.load(flags_ptr + rank).to(tl.pointer_type(tl.int64)) + peer
            _set_in_time(mine, here, down, "acquire", wait_errors_ptr, peer, here, limit, True)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["tag", "limit"])
def leave_kernel(flags_ptr, world_size, rank, tag, limit):
    """Set this rank's flag on every peer to ``tag``, of ``Phase.LEFT``. Grid (W,), one program a peer.

    flags_ptr: see ``barrier_kernel``. Waits at most ``limit`` nanoseconds for the owner to lower a flag that is still
    up, then overwrites it.
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
