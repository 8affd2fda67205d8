"""The calls of one ``ExpertParallel``, one at a time, in one process, each with its number; and whether it is open."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.utils.checkpoint

from sonic_ep.backend import Backend
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.sync_tag import Phase, Step, call_digest
from sonic_ep.errors import ClosedError, CollectiveMismatchError, PeerError

Facts = Mapping[str, object]
Told = tuple[tuple[str, object], ...]
DIGESTS_KEPT = 64
# PyTorch has no error of its own for the memory of a CPU.
CPU_ALLOCATOR = "DefaultCPUAllocator"
# How activation checkpointing leaves a forward that it runs again, on all ranks alike: no error.
ENOUGH_RECOMPUTED: Any = getattr(torch.utils.checkpoint, "_StopRecomputationError", ())


@dataclass(frozen=True, kw_only=True)
class Held:
    """What an ``ExpertParallel`` has to give back, and whose turn that is."""

    name: str
    backend: Backend
    collectives: BoundedCollectives

    def leave(self, error: BaseException) -> None:
        """Report ``error`` to the ranks that wait for this one: through the store, and to their kernels by a tag."""
        self.collectives.leave(_in_words(error))
        # On a lost GPU the kernel cannot run.
        with suppress(RuntimeError):
            self.backend.leave()


class CallGuard:
    """Who may call now, and what others are told of a call.

    common: what has to be the same on every rank in all calls. check: whether ranks compare each call in words first.
    """

    def __init__(self, collectives: BoundedCollectives, backend: Backend, common: Facts, *, check: bool) -> None:
        self._collectives = collectives
        self._common = {**common, "objects before": collectives.object_number}
        self._check = check
        self._number = 0
        # The same few calls come again and again, and their words would take longer than the rest.
        self._digest = lru_cache(maxsize=DIGESTS_KEPT)(partial(_digest_of, tuple(self._common.items())))
        self._held = Held(name=f"{collectives.group}: ExpertParallel", backend=backend, collectives=collectives)
        self._release = weakref.finalize(self, _forgotten, self._held, weakref.ref(self))
        # Weakly: backwards hold the turn, and may outlive what it would hold.
        collectives.call_lock.after_errors(
            partial(_failed, self._held.name, weakref.ref(backend), weakref.ref(collectives))
        )

    @property
    def closed(self) -> bool:
        """Whether ``close`` or ``leave`` has been called."""
        return not self._release.alive

    @contextmanager
    def one(self) -> Iterator[None]:
        """A call, from its checks to its end.

        Raises ``ClosedError`` after ``close``, and ``ConcurrentCallError`` in a forked process or while another thread
        is in a call. In a call and in a backward, the error of a kernel that waited too long replaces PyTorch's own,
        and an error of memory names the rank.
        """
        if self.closed:
            raise ClosedError(f"{self._held.name}: got one that is closed, expected an open one")
        with self._collectives.call_lock.taken():
            yield

    def begin(self, name: str, **facts: object) -> None:
        """The arguments are right: from here on the call is collective. ``facts``: what all ranks have to have alike.

        Raises ``CollectiveMismatchError`` that names the odd rank and what differs, if calls are compared in words.
        """
        self._number += 1
        told = (("call", name), *facts.items())
        self._collectives.begin(Step(number=self._number, call=self._digest(told)))
        if self._check:
            self._compare({name: str(value) for name, value in (*told, *self._common.items())})

    def close(self) -> None:
        """Give back what is held. Later calls raise. ``ConcurrentCallError`` while a thread is in a call."""
        if not self._collectives.call_lock.is_of_this_process:
            self._release.detach()
            return
        # What a kernel has waited for in vain is kept for the end: here another error may be on its way.
        with self._collectives.call_lock.taken(last=True):
            if self._release.detach() is not None:
                self._collectives.call_lock.end()
                self._held.backend.close()

    def detach(self) -> None:
        """No call will follow, and what backward still needs stays for as long as that does."""
        if self._release.detach() is not None:
            if self._number == 0:
                self._collectives.withdraw()
            self._held.backend.raise_in_backward()

    def leave(self, error: BaseException) -> None:
        """The same, because of ``error``; ranks that wait for this one are told."""
        if not self.closed and self._collectives.call_lock.is_of_this_process:
            self._held.leave(error)
        # Where another thread is in a call, the error that is on its way is what has to be seen.
        with suppress(RuntimeError):
            self.close()

    def _compare(self, mine: dict[str, str]) -> None:
        # The digests may differ, and that is told here in words.
        call, step = mine, self._collectives.sync_tag.step
        self._collectives.begin(Step(number=step.number))
        by_rank = self._collectives.objects(call, Phase.CHECK)
        self._collectives.begin(step)
        differing = [name for name in mine if len({told.get(name) for told in by_rank}) > 1]
        if differing:
            found = "; ".join(f"{name}: {_by_value([told.get(name) for told in by_rank])}" for name in differing)
            raise CollectiveMismatchError(
                f"{self._collectives.group}: step {step.number}: got calls that differ in {found}, "
                "expected the same call"
            )


def _in_words(error: BaseException) -> str:
    """The error's own, if it has any: what it is asked for here must not hide it."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _by_value(values: list[str | None]) -> str:
    """Who has what, the rarest first.

    >>> _by_value(["64", "128", "64"])
    '128 on rank 1, 64 on ranks 0 2'
    """
    counts = Counter(values)
    rarest = sorted(counts, key=lambda value: counts[value])
    words = []
    for value in rarest:
        ranks = [str(rank) for rank, own in enumerate(values) if own == value]
        words.append(f"{value} on rank{'s' if len(ranks) > 1 else ''} {' '.join(ranks)}")
    return ", ".join(words)


def _failed(
    name: str, backend: weakref.ref[Backend], collectives: weakref.ref[BoundedCollectives], error: BaseException
) -> None:
    """After an ``error`` of a call or a backward. Raise what it means, if more is known than it says."""
    if isinstance(error, ENOUGH_RECOMPUTED):
        return
    of_backend, of_waits = backend(), collectives()
    if of_backend is not None and of_waits is not None and of_waits.call_lock.begun:
        of_backend.mark_failed()
    if not isinstance(error, RuntimeError) or isinstance(error, PeerError):
        return
    if of_backend is not None:
        of_backend.explain(error)
    if of_waits is not None and (isinstance(error, torch.OutOfMemoryError) or CPU_ALLOCATOR in str(error)):
        raise torch.OutOfMemoryError(f"{name}: out of memory in {of_waits.sync_tag}: {error}") from error


def _digest_of(common: Told, told: Told) -> int:
    return call_digest(repr((*told, *common)))


def _forgotten(held: Held, calls: weakref.ref[CallGuard]) -> None:
    """Warn if ``close()`` was not called. Shared memory stays as long as graphs need it.

    Where an uncaught exception ends the process, report it to the ranks that wait for this one.
    """
    if not held.collectives.call_lock.is_of_this_process:
        return
    uncaught = getattr(sys, "last_value", None)
    # ``calls`` is alive only if this runs at exit, not where the object is garbage collected.
    if calls() is not None and isinstance(uncaught, BaseException):
        held.leave(uncaught)
    if not held.backend.holds_memory():
        return
    warnings.warn(f"{held.name}: got no close() before it was let go, expected one", ResourceWarning, stacklevel=2)
    held.backend.detach()
