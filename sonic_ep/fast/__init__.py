"""The fast backend: Triton kernels over symmetric memory."""

from sonic_ep.backend import Backend
from sonic_ep.config import EPConfig
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import EPGroup
from sonic_ep.fast.capabilities import auto_reasons, device_reasons, interpreted, interpreter_reasons, software_reasons

__all__ = ["auto_reasons", "create", "unavailable_reasons"]


def unavailable_reasons(group: EPGroup) -> tuple[str, ...]:
    """Every reason why the backend cannot run here, all at once."""
    missing = software_reasons()
    # Only an installed triton says whether it interprets, and so needs no GPU.
    if not missing and interpreted():
        from sonic_ep.fast import symmetric_memory

        unshared = group.world_size > 1 and symmetric_memory.host_transport is None
        asked = "interpreted kernels of several ranks share memory of the host: import sonic_ep.testing first"
        return interpreter_reasons() or ((asked,) if unshared else ())
    return (*missing, *device_reasons())


def create(collectives: BoundedCollectives, config: EPConfig) -> Backend:
    """The fast backend for the group of ``collectives``. Not collective: the first call allocates shared memory."""
    from sonic_ep.fast.backend import FastBackend

    return FastBackend(collectives, config)
