"""Groups of a test's own, which may fail: that of the world stays usable."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch.distributed as dist
from limits import HANG_SECONDS

from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import resolve_group
from sonic_ep.distributed.sync_tag import Phase, Step, SyncTag
from sonic_ep.testing import Rank


@contextmanager
def own_process_group(rank: Rank) -> Iterator[dist.ProcessGroup]:
    """Collective. A new group of all ranks, destroyed at the end."""
    group = dist.new_group(list(range(rank.world_size)))
    yield group
    # Destroying a group closes connections at which other ranks still wait.
    dist.barrier()
    dist.destroy_process_group(group)


def collectives_of(group: dist.ProcessGroup | None, timeout: float) -> BoundedCollectives:
    """Collective. Those of a group, a new one where it is None, in phase exchange of step 7."""
    collectives = BoundedCollectives(resolve_group(group or dist.new_group()), timeout)
    collectives.sync_tag = SyncTag(step=Step(number=7), phase=Phase.EXCHANGE)
    dist.barrier()
    return collectives


@contextmanager
def new_group(rank: Rank, timeout: float) -> Iterator[BoundedCollectives]:
    """Collective. The same; the group is destroyed at the end."""
    with own_process_group(rank) as group:
        yield collectives_of(group, timeout)


def without_haste(collectives: BoundedCollectives) -> None:
    """On a busy machine ranks may need longer than ``GRACE_SECONDS`` to read what others have found out."""
    until = collectives._until

    def patient(reached: Callable[[], bool], seconds: float = HANG_SECONDS) -> None:
        until(reached, seconds)

    collectives._until = patient


def raises(error: type[Exception], words: str) -> AbstractContextManager[Any]:
    """``error`` with ``words`` in its message."""
    return pytest.raises(error, match=re.escape(words))
