"""Errors that the device has found and that no call has come to raise: printed at the latest when the process ends."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable
from typing import Any


def told_at_the_end(owner: Any, find: Callable[[], Exception | None]) -> weakref.finalize[..., Any]:
    """Print what ``find`` finds, if anything, once ``owner`` is let go. ``find`` must not hold it. To be detached."""
    return weakref.finalize(owner, _tell, find, os.getpid())


def _tell(find: Callable[[], Exception | None], process: int) -> None:
    # What a forked child has of it is its parent's to tell.
    found = find() if process == os.getpid() else None
    if found is not None:
        print(f"sonic_ep: {type(found).__name__}: {found}", file=sys.stderr, flush=True)
