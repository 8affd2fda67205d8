"""Groups of a test's own, which may fail: that of the world stays usable."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import resolve_group
from sonic_ep.distributed.sync_tag import Phase, Step, SyncTag
from sonic_ep.testing import Rank

# On a busy machine.
SLACK_SECONDS = 3.0


def new_process_group(rank: Rank) -> dist.ProcessGroup:
    """Collective. Of all ranks."""
    return dist.new_group(list(range(rank.world_size)))


@contextmanager
def own_process_group(rank: Rank) -> Iterator[dist.ProcessGroup]:
    """Collective. A new group, destroyed at the end."""
    group = new_process_group(rank)
    yield group
    # Destroying a group closes connections at which other ranks still wait.
    dist.barrier()
    dist.destroy_process_group(group)


def collectives_of_a_new_group(
    rank: Rank, timeout: float, group: dist.ProcessGroup | None = None
) -> BoundedCollectives:
    """Collective. Those of a group, a new one unless given, in phase exchange of step 7."""
    collectives = BoundedCollectives(resolve_group(group or new_process_group(rank)), timeout)
    collectives.sync_tag = SyncTag(step=Step(number=7), phase=Phase.EXCHANGE)
    dist.barrier()
    return collectives


@contextmanager
def new_group(rank: Rank, timeout: float) -> Iterator[BoundedCollectives]:
    """Collective. The same; the group is destroyed at the end."""
    with own_process_group(rank) as group:
        yield collectives_of_a_new_group(rank, timeout, group)


@contextmanager
def raises(error: type[Exception], words: str, *, within: float = 60.0) -> Iterator[None]:
    """``error`` with ``words`` in its message, soon after ``within`` seconds."""
    began = time.monotonic()
    with pytest.raises(error, match=re.escape(words)) as raised:
        yield
    assert raised.type is error
    assert time.monotonic() - began < within + SLACK_SECONDS
