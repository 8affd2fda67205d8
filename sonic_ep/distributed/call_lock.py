"""One thread at a time, in one process, until it ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sonic_ep.errors import ClosedError, ConcurrentCallError


def _nothing_to_do(error: BaseException) -> None:
    """The error says it all."""


class CallLock:
    """What one thread at a time may do; from within, the same thread may do more of it. name: of the object.

    It belongs to the process that makes it, and ends with ``end``. begun: whether what the turn is for has passed its
    checks, so that other ranks are in it too.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._ended = False
        self._depth = 0
        self._waiting = False
        self.begun = False
        self._failed: Callable[[BaseException], None] = _nothing_to_do

    def after_errors(self, failed: Callable[[BaseException], None]) -> None:
        """``failed`` is given the error that ends a turn, and may raise one that says more."""
        self._failed = failed

    def end(self) -> None:
        """Nobody has a turn any more."""
        self._ended = True

    @property
    def is_of_this_process(self) -> bool:
        """False in a process that was forked from the one that made it."""
        return self._process == os.getpid()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within this turn, the host waits for other ranks."""
        before, self._waiting = self._waiting, True
        try:
            yield
        finally:
            self._waiting = before

    @contextmanager
    def taken(self, *, begun: bool = False, last: bool = False) -> Iterator[None]:
        """Raises ``ConcurrentCallError`` in a forked process, while another thread is in a call, and in a wait, as from
        a signal's handler: nobody waits for a turn, as ranks would come to differ. Raises ``ClosedError`` after
        ``end``. last: nobody has to hear of an error in it, and it has to be the outermost.
        """
        if not self.is_of_this_process:
            raise ConcurrentCallError(
                f"{self._name}: got a call in process {os.getpid()}, forked from process {self._process} "
                "that made it, expected one made in this process: what ranks share cannot be inherited"
            )
        if self._ended:
            raise ClosedError(f"{self._name}: got a call or a backward after close(), expected none")
        if not self._lock.acquire(blocking=False):
            raise ConcurrentCallError(
                f"{self._name}: got a call while another thread is in one, expected one after the other"
            )
        if self._waiting or (last and self._depth):
            self._lock.release()
            what = "close()" if last else "a call"
            raise ConcurrentCallError(
                f"{self._name}: got {what} in the middle of a call of the same thread, expected it after"
            )
        self._depth += 1
        self.begun = begun or (self.begun and self._depth > 1)
        try:
            yield
        except BaseException as error:
            if self._depth == 1 and not last:
                self._failed(error)
            raise
        finally:
            self._depth -= 1
            self._lock.release()
