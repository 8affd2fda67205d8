"""A small layer, a plan, the warnings for objects that were not closed, and forked processes."""

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sonic_ep import ExpertParallel
from sonic_ep.testing import Rank

TOKENS, HIDDEN, HELD, TOP_K = 3, 8, 2, 2


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


def said_in_child(use: Callable[[], object]) -> str:
    """What ``use`` returns or raises in a forked process, whose number is replaced by CHILD."""
    read, write = os.pipe()
    # The child cannot end what is left over of other groups.
    gc.collect()
    child = os.fork()
    if child == 0:
        try:
            words = str(use())
        except RuntimeError as error:
            words = str(error)
        os.write(write, words.encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    os.close(write)
    with open(read) as said:
        return said.read().replace(str(child), "CHILD")
