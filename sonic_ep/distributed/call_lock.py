"""Admits one thread at a time, in one process, until the object is closed or has ended by an error."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sonic_ep.errors import ClosedError, ConcurrentCallError


class CallLock:
    """Admits one thread at a time to the calls and backwards of one object; that thread may nest them.

    name: begins every message. begun: the call has passed its checks, so other ranks are in it too. ended: why nothing
    is admitted any more, or None.
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

    @contextmanager
    def taken(self, *, begun: bool = False, last: bool = False) -> Iterator[None]:
        """Hold the lock. last: to close the object, also one that has ended; only outside of calls.

        Raises ``ClosedError`` after ``end``, ``ConcurrentCallError`` in a forked process, while another thread is in a
        call, and during a wait: calls do not queue, or their order would differ over ranks.
        """
        if not self.is_of_this_process:
            raise ConcurrentCallError(
                f"{self._name}: got a call in process {os.getpid()}, forked from process {self._process} that made "
                "this ExpertParallel: shared memory and connections cannot be inherited, make one in this process"
            )
        if self.ended and not last:
            raise ClosedError(self.ended)
        if not self._lock.acquire(blocking=False):
            raise ConcurrentCallError(f"{self._name}: got a call while another thread is in one: make one at a time")
        if self._waiting or (last and self._depth):
            self._lock.release()
            what = "close()" if last else "a call"
            raise ConcurrentCallError(f"{self._name}: got {what} in the middle of a call of the same thread")
        self._depth += 1
        self.begun = begun or (self.begun and self._depth > 1)
        try:
            yield
        except BaseException as error:
            if self._depth == 1 and not last:
                self._after_error(error)
            raise
        finally:
            self._depth -= 1
            self._lock.release()
