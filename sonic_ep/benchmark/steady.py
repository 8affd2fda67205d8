"""A host that takes as long today as yesterday: where calls are short, its launches are what is timed."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def on_own_core(rank: int, ranks: int) -> Iterator[None]:
    """Keep this thread, and threads it starts meanwhile, on one core that no other of ``ranks`` ranks here is given.

    A thread that moves finds cold caches. Nothing where the system does not say which cores there are, or has less than
    two for a rank: one is for the helpers of PyTorch and NCCL.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    core = own_core(rank, ranks, sorted(before))
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


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
