"""How many plans later an error of the device is raised."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

# Of an interpreter, plans take long.
FEW_PLANS = 8


@contextmanager
def plans_ahead(count: int) -> Iterator[int]:
    """``count``, for objects that are first called meanwhile."""
    from sonic_ep.fast import device_errors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_errors, "PLANS_AHEAD", count)
        yield count


def of_the_library() -> tuple[int, int]:
    """Its number of plans, and how many of them share an event."""
    from sonic_ep.fast.device_errors import PLANS_AHEAD, WINDOWS

    return PLANS_AHEAD, PLANS_AHEAD // WINDOWS
