"""Waits over groups of their own: what becomes of such a group leaves the world's in order."""

import torch.distributed as dist

from sonic_ep.group import resolve_group
from sonic_ep.testing import Rank
from sonic_ep.waits import Waits


def waits_of_a_new_group(rank: Rank, timeout: float) -> Waits:
    """Collective. Of a group of all ranks."""
    return Waits(resolve_group(dist.new_group(list(range(rank.world_size)))), timeout)
