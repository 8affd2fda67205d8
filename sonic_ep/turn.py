"""One thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turn:
    """What one thread at a time may do; from within, the same thread may do more of it. name: of the object."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.RLock()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Raises ``RuntimeError`` where another thread is at it: nobody waits, as ranks would come to differ."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(f"{self._name}: got a call while another thread is in one, expected one after the other")
        try:
            yield
        finally:
            self._lock.release()
