"""Random numbers that are the same on any device."""

import torch
from torch import Tensor

from sonic_ep.testing import Rank


def randn(rank: Rank, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(rank.device)
