"""Admits one thread at a time, in one process, until the object is closed or has ended by an error."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from sonic_ep.errors import ClosedError, ConcurrentCallError


class CallLock:
    """Admits one thread at a time to the calls and backwards of one object; that thread may nest them.

    name: begins every message. begun: the call has passed its checks, so other ranks are in it too. ended: why nothing
    is admitted any more, or None. ``with lock.call`` holds it in a call, from its checks on; ``begun_call`` in one
    without checks; ``last_call`` to close the object, also one that has ended, and only outside of calls.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._depth = 0
        self._waiting = False
        self._after_error: Callable[[BaseException], None] = lambda error: None
        self.begun = False
        self.ended: str | None = None
        self.call = Admission(self)
        self.begun_call = Admission(self, begun=True)
        self.last_call = Admission(self, last=True)

    def after_error(self, handle: Callable[[BaseException], None]) -> None:
        """Call ``handle`` with the error that ends an outermost call; ``handle`` may raise a clearer one."""
        self._after_error = handle

    def end(self, why: str) -> None:
        """Admit nothing from now on. The first ``why`` is the one that later calls raise."""
        self.ended = self.ended or f"{self._name}: this ExpertParallel {why}"

    @property
    def is_of_this_process(self) -> bool:
        """False in a process forked from the one that made it."""
        return self._process == os.getpid()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The host waits for other ranks inside a call: meanwhile a signal handler may not begin another."""
        before, self._waiting = self._waiting, True
        try:
            yield
        finally:
            self._waiting = before

    def refuse(self, *, last: bool) -> NoReturn:
        """Raise what keeps a call out, if the lock could not be taken."""
        if not self.is_of_this_process:
            raise ConcurrentCallError(
                f"{self._name}: got a call in process {os.getpid()}, forked from process {self._process} that made "
                "this ExpertParallel: shared memory and connections cannot be inherited, make one in this process"
            )
        if self.ended and not last:
            raise ClosedError(self.ended)
        raise ConcurrentCallError(f"{self._name}: got a call while another thread is in one: make one at a time")


class Admission:
    """Holds a ``CallLock`` while its block runs; a block within a block nests.

    Raises ``ClosedError`` after ``end``, ``ConcurrentCallError`` in a forked process, while another thread is in a
    call, and during a wait: calls do not queue, or their order would differ over ranks.
    """

    # Every call and every backward enters one: no generator, no object a call.

    def __init__(self, lock: CallLock, *, begun: bool = False, last: bool = False) -> None:
        self._lock = lock
        self._begun = begun
        self._last = last

    def __enter__(self) -> None:
        lock, last = self._lock, self._last
        if lock._process != os.getpid() or (lock.ended and not last) or not lock._lock.acquire(blocking=False):
            lock.refuse(last=last)
        if lock._waiting or (last and lock._depth):
            lock._lock.release()
            what = "close()" if last else "a call"
            raise ConcurrentCallError(f"{lock._name}: got {what} in the middle of a call of the same thread")
        lock._depth += 1
        lock.begun = self._begun or (lock.begun and lock._depth > 1)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        lock = self._lock
        try:
            if error is not None and lock._depth == 1 and not self._last:
                lock._after_error(error)
        finally:
            lock._depth -= 1
            lock._lock.release()
