"""Waits over groups of their own: what becomes of such a group leaves the world's in order."""

import torch.distributed as dist

from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import resolve_group
from sonic_ep.testing import Rank


def waits_of_a_new_group(rank: Rank, timeout: float) -> BoundedCollectives:
    """Collective. Of a group of all ranks."""
    return BoundedCollectives(resolve_group(dist.new_group(list(range(rank.world_size)))), timeout)
