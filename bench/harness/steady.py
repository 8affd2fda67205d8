"""A host that takes as long today as yesterday: where calls are short, its launches are what is timed."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def on_own_core(rank: int, ranks: int) -> Iterator[None]:
    """Keep this thread on one core that no other of ``ranks`` ranks here is given.

    A thread that moves finds cold caches. Threads that it starts meanwhile inherit the core; those of PyTorch and NCCL
    that run already keep all cores, of which a rank has at least one more. Nothing where the system has no such call,
    does not let us, or has too few cores.
    """
    before = _pinned(rank, ranks)
    try:
        yield
    finally:
        if before is not None:
            os.sched_setaffinity(0, before)


def _pinned(rank: int, ranks: int) -> set[int] | None:
    """The cores that this thread had before it was given one, None if it was not."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    before = os.sched_getaffinity(0)
    core = own_core(rank, ranks, sorted(before))
    if core is None:
        return None
    try:
        os.sched_setaffinity(0, {core})
    except OSError:
        return None
    return before


def own_core(rank: int, ranks: int, cores: Sequence[int]) -> int | None:
    """The middle one of a rank's share of the cores; None if that is less than two.

    >>> own_core(1, 2, [0, 1, 2, 3, 8, 9, 10, 11])
    10
    """
    share = len(cores) // ranks
    return None if share < 2 else cores[rank * share + share // 2]


@contextmanager
def little_to_collect() -> Iterator[None]:
    """Collect garbage now, and from then on look only at what is new: a round does not pay for all of PyTorch."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
