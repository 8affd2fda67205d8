"""A router of either backend, and random numbers for it, the same on any device."""

import torch
from torch import Tensor

from sonic_ep.backend import Routing
from sonic_ep.config import RouterOptions
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import resolve_group
from sonic_ep.reference.router import route
from sonic_ep.testing import Rank


def routed(rank: Rank, backend: str, x_TH: Tensor, weight_EH: Tensor, options: RouterOptions) -> Routing:
    """What the router of ``backend`` makes of x, over the world. Collective."""
    group = resolve_group(None)
    if backend == "reference":
        return route(x_TH, weight_EH, options, (BoundedCollectives(group)))
    # Not at the top: triton asks whether it is to interpret when it is imported, and only ranks know.
    from sonic_ep.fast.router import route as fast_route
    from sonic_ep.fast.workspace import Workspace

    return fast_route(x_TH, weight_EH, options, Workspace(group, rank.device))


def randn(rank: Rank, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(rank.device)
