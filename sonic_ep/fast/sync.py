"""Flags between ranks in kernels: signals, the barrier, and the flag of a rank that leaves."""

import time

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from sonic_ep.distributed.sync_tag import PHASE_BITS, STEP_BITS, Phase
from sonic_ep.fast.launch import INTERPRETED, triton_kernel

# Interpreted, a waiting kernel sleeps this long between two looks at a flag.
REST_SECONDS = 1e-3
# Why a wait has failed: its time was up, or the peer showed another tag.
TIME_UP: tl.constexpr = tl.constexpr(1)
ELSEWHERE: tl.constexpr = tl.constexpr(2)
# Where a tag has its phase, and the phase of a rank that has left: see ``sync_tag``.
PHASE_SHIFT: tl.constexpr = tl.constexpr(STEP_BITS)
PHASE_MASK: tl.constexpr = tl.constexpr((1 << PHASE_BITS) - 1)
LEFT: tl.constexpr = tl.constexpr(int(Phase.LEFT))


def rest() -> None:
    """Leave the processor to the other ranks while an interpreted kernel waits."""
    time.sleep(REST_SECONDS)


def now() -> int:
    """Nanoseconds of the host's clock: what ``globaltimer`` is on a GPU."""
    return time.monotonic_ns()


# Triton's compiler never calls them, but accepts only its own builtins by name.
rest.__triton_builtin__ = now.__triton_builtin__ = True  # type: ignore[attr-defined]


@triton.jit
def staged_at(epoch_ptr, world_size, PASSED: tl.constexpr):
    """Where in the table of a ``Staging`` (2 * W,) the half begins that this step stages in, or W if it is the second.

    epoch_ptr () int32: how many barriers this rank has passed, the same on all ranks; it may wrap. PASSED: the step has
    staged and passed its barrier, and reads. A step stages in the half of its epoch: after 0, 1, 2 barriers in half 0,
    1, 0. The step after the next overwrites a half that has been read by then: its readers come to the next barrier
    afterwards.
    """
    epoch = tl.load(epoch_ptr)
    # Not the remainder, which of a negative number is negative.
    return ((epoch + 1) & 1 if PASSED else epoch & 1) * world_size


@triton.jit
def signal(flag_ptr, tag):
    """Raise a flag (int64) to ``tag``. What this program wrote before is visible to the program that takes it."""
    tl.debug_barrier()
    tl.atomic_xchg(flag_ptr, tl.full((), 0, tl.int64) + tag, sem="release", scope="sys")


@triton.jit
def take_signal(flag_ptr, wait_errors_ptr, peer, tag, limit):
    """Wait until the flag is at ``tag``, and lower it. What its raiser wrote before is visible after.

    A peer that has left ends the wait. Any other tag may be of an earlier step, which an error has ended.
    """
    up = tl.full((), 0, tl.int64) + tag
    _swap_in_time(flag_ptr, up, up - up, "acquire", wait_errors_ptr, peer, tag, limit, False)
    tl.debug_barrier()


@triton.jit
def _is_elsewhere(flag, SHOWS_TAG: tl.constexpr):
    """Whether a flag that is not at the tag waited for says that its peer does not come: see ``_swap_in_time``."""
    return (flag != 0) if SHOWS_TAG else ((flag >> PHASE_SHIFT) & PHASE_MASK) == LEFT


@triton.jit
def _swap_in_time(flag_ptr, old, new, SEM: tl.constexpr, wait_errors_ptr, peer, tag, limit, SHOWS_TAG: tl.constexpr):
    """Set a flag to ``new`` once it is ``old``.

    wait_errors_ptr (4,) int64: after ``limit`` nanoseconds it gets why, peer + 1, tag and the flag, and on a GPU the
    program traps. SHOWS_TAG: a flag that is neither 0 nor ``old`` is another tag of the peer, and ends the wait; else
    only the tag of a peer that has left does.
    """
    if INTERPRETED:
        # Nothing traps there: after one wait has failed the others end at once.
        limit = tl.where(tl.load(wait_errors_ptr) == 0, limit, 0)
    seen = tl.atomic_cas(flag_ptr, old, new, sem=SEM, scope="sys")
    if seen != old:
        spent = tl.full((), 0, tl.int64)
        began = now() if INTERPRETED else globaltimer()
        while (seen != old) & (spent < limit) & (_is_elsewhere(seen, SHOWS_TAG) == 0):
            if INTERPRETED:
                rest()
            seen = tl.atomic_cas(flag_ptr, old, new, sem=SEM, scope="sys")
            spent = (now() if INTERPRETED else globaltimer()) - began
    # The host's memory is slow to read: only after a failed wait. ("and" would evaluate both sides.)
    if seen != old:  # noqa: SIM102
        # The first failure counts: others may have waited for what its program would have done.
        if tl.load(wait_errors_ptr) == 0:
            tl.store(wait_errors_ptr + 1, peer + 1)
            tl.store(wait_errors_ptr + 2, tag)
            tl.store(wait_errors_ptr + 3, seen.to(tl.int64))
            tl.store(wait_errors_ptr, tl.where(_is_elsewhere(seen, SHOWS_TAG), ELSEWHERE, TIME_UP))
    tl.device_assert(seen == old, "sonic_ep: a wait for another rank has failed; the host names the rank")


@triton_kernel
def barrier_kernel(flags_ptr, epoch_ptr, wait_errors_ptr, world_size, rank, tag: tl.int64, limit: tl.int64):
    """A barrier of all ranks at ``tag``: what each wrote before is visible to all after. Grid (W,), one program a peer.

    flags_ptr (W,) int64: addresses of each rank's W flags, int64, all 0 before and after. Rank p raises flag p
    of every rank to its tag; the flag's owner lowers it, and traps if that is not its own tag. epoch_ptr () int32: one
    more after each barrier, see ``staged_at``.

    Interpreted, programs run one after the other, and the grid is (2 * W,): the first W raise a flag each before the
    others wait, so that no rank is held up by one that waits for a third.
    """
    program = tl.program_id(0)
    peer = program % world_size
    if program == 0:
        # No program of a barrier reads it.
        tl.store(epoch_ptr, tl.load(epoch_ptr) + 1)
    if peer != rank:
        here = tl.full((), 0, tl.int64) + tag
        down = here - here
        if program < world_size:
            theirs = tl.load(flags_ptr + peer).to(tl.pointer_type(tl.int64)) + rank
            # The peer may still be about to lower the flag of the last barrier.
            _swap_in_time(theirs, down, here, "release", wait_errors_ptr, peer, here, limit, False)
        if (program >= world_size) | (not INTERPRETED):
            mine = tl.load(flags_ptr + rank).to(tl.pointer_type(tl.int64)) + peer
            _swap_in_time(mine, here, down, "acquire", wait_errors_ptr, peer, here, limit, True)
            tl.debug_barrier()


@triton_kernel
def leave_kernel(flags_ptr, world_size, rank, tag: tl.int64, limit: tl.int64):
    """Set this rank's flag on every peer to ``tag``, of ``Phase.LEFT``. Grid (W,), one program a peer.

    flags_ptr: see ``barrier_kernel``. A raised flag is overwritten after ``limit`` nanoseconds, if its owner has not
    lowered it by then.
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


@triton_kernel
def leave_slots_kernel(flags_ptr, world_size, rank, chunk, tag: tl.int64, BLOCK: tl.constexpr):
    """Set this rank's flags of receive slots on every peer to ``tag``, of ``Phase.LEFT``, unless they are raised.

    flags_ptr (W,) int64: addresses of (W - 1, chunk) flags of each rank, see ``combine.base``. Grid
    (W, ceil(chunk / BLOCK)). For a rank that leaves between the barrier of an operation and its combine.
    """
    origin = tl.program_id(0)
    if origin != rank:
        # Past the last slot it is set once more: this operation takes no mask.
        slot = tl.minimum(tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), chunk - 1)
        sender = (rank - origin - 1 + world_size) % world_size
        theirs = tl.load(flags_ptr + origin).to(tl.pointer_type(tl.int64)) + sender * chunk + slot
        lowered = tl.zeros((BLOCK,), dtype=tl.int64)
        tl.atomic_cas(theirs, lowered, lowered + tag, sem="release", scope="sys")
