"""Collectives over groups of their own: whatever becomes of such a group, the world's stays in order."""

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


def collectives_of_a_new_group(rank: Rank, timeout: float) -> BoundedCollectives:
    """Collective. Of a group of all ranks, in phase exchange of step 7."""
    collectives = BoundedCollectives(resolve_group(dist.new_group(list(range(rank.world_size)))), timeout)
    collectives.sync_tag = SyncTag(step=Step(number=7), phase=Phase.EXCHANGE)
    dist.barrier()
    return collectives


@contextmanager
def new_group(rank: Rank, timeout: float) -> Iterator[BoundedCollectives]:
    """Collective. The same, and the group is destroyed at the end."""
    collectives = collectives_of_a_new_group(rank, timeout)
    yield collectives
    # Destroying a group closes connections at which other ranks still wait.
    dist.barrier()
    dist.destroy_process_group(collectives.group.process_group)


@contextmanager
def raises(error: type[Exception], words: str, *, within: float = 60.0) -> Iterator[None]:
    """``error`` with ``words`` in its message, soon after ``within`` seconds."""
    began = time.monotonic()
    with pytest.raises(error, match=re.escape(words)) as raised:
        yield
    assert raised.type is error
    assert time.monotonic() - began < within + SLACK_SECONDS
