"""The fast backend: Triton kernels over symmetric memory.

This version ships what tells whether the backend can run on a machine; its kernels are not part of it yet, and
``unavailable_reasons`` says so first.
"""

from __future__ import annotations

from sonic_ep.backend import Backend
from sonic_ep.config import BackendUnavailableError, EPConfig
from sonic_ep.fast.availability import device_reasons, software_reasons
from sonic_ep.group import EPGroup

__all__ = ["create", "unavailable_reasons"]

NOT_BUILT = "this version of sonic_ep does not contain its kernels yet"


def unavailable_reasons(group: EPGroup) -> tuple[str, ...]:
    """Every reason why the backend cannot run here, all at once."""
    return (NOT_BUILT, *software_reasons(), *device_reasons())


def create(group: EPGroup, config: EPConfig) -> Backend:
    """Raises ``BackendUnavailableError``: the registry never gets here while there are reasons."""
    raise BackendUnavailableError(f"{group}: " + "; ".join(unavailable_reasons(group)))
