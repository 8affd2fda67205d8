"""Keeps the host's launch times steady, which decide the time of short calls: one core, no garbage collection."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress


@contextmanager
def own_core(rank: int, ranks: int) -> Iterator[None]:
    """Keep this thread, and those it starts, on a core of its own: a thread that moves finds cold caches.

    Does nothing where the system has no such call, refuses it, or has too few cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    core = core_of(rank, ranks, sorted(before))
    with suppress(OSError):
        os.sched_setaffinity(0, before if core is None else {core})
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, before)


def core_of(rank: int, ranks: int, cores: Sequence[int]) -> int | None:
    """The middle one of a rank's share of the cores, as 10 for rank 1 of 2 on 0-3 and 8-11; None below two."""
    share = len(cores) // ranks
    return None if share < 2 else cores[rank * share + share // 2]


@contextmanager
def freeze_garbage() -> Iterator[None]:
    """Collect garbage now, and from then on look only at what is new: a round does not pay for all of PyTorch."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
