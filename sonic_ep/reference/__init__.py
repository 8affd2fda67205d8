"""The reference backend: plain PyTorch over ``torch.distributed`` collectives, and the definition of right."""

import torch.distributed as dist

from sonic_ep.backend import Backend
from sonic_ep.config import EPConfig
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import EPGroup
from sonic_ep.reference.backend import ReferenceBackend

__all__ = ["auto_reasons", "create", "unavailable_reasons"]


def unavailable_reasons(group: EPGroup) -> tuple[str, ...]:
    """Every reason why the backend cannot run here."""
    unavailable = group.world_size > 1 and not dist.is_available()
    return ("this PyTorch was built without torch.distributed",) if unavailable else ()


def auto_reasons() -> tuple[str, ...]:
    """None: ``"auto"`` takes it wherever it runs."""
    return ()


def create(collectives: BoundedCollectives, config: EPConfig) -> Backend:
    """The reference backend for the group of ``collectives``."""
    return ReferenceBackend(collectives, config)
