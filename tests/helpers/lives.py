"""A small layer, a plan, and the warnings for objects that were not closed."""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sonic_ep import ExpertParallel
from sonic_ep.testing import Rank

HIDDEN, HELD, TOP_K = 8, 2, 2
TOKENS = 3


def layer_of(rank: Rank, seed: int = 0, *, hidden: int = HIDDEN, tokens: int = TOKENS) -> list[Tensor]:
    """Leaves of one rank: x (T, H), router_w, w1, w2."""
    generator = torch.Generator().manual_seed(10 * seed + rank.rank)
    shapes = ((tokens, hidden), (HELD * rank.world_size, hidden), (HELD, 8, hidden), (HELD, hidden, 4))
    return [torch.randn(shape, generator=generator).to(rank.device).requires_grad_() for shape in shapes]


def planned(ep: ExpertParallel, rank: Rank) -> list[int]:
    return ep.plan(torch.full((2, 1), rank.rank, device=rank.device), rank.world_size).counts.tolist()


@contextmanager
def warned() -> Iterator[list[str]]:
    """The warnings for objects that are freed while this lasts."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
        gc.collect()
    said += [str(one.message) for one in caught if issubclass(one.category, ResourceWarning)]
