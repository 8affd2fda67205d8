"""Errors that the device has found and that no call has come to raise: printed at the latest when the process ends."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any


def told_at_the_end(owner: Any, find: Callable[[], Exception | None]) -> weakref.finalize[..., Any]:
    """Print what ``find`` finds, if anything, once ``owner`` is let go. ``find`` must not hold it. To be detached."""
    return weakref.finalize(owner, _tell, find)


def _tell(find: Callable[[], Exception | None]) -> None:
    found = find()
    if found is not None:
        print(f"sonic_ep: {type(found).__name__}: {found}", file=sys.stderr, flush=True)
