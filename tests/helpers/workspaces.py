"""Shared memory of the fast backend, without a layer around it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from limits import HANG_SECONDS

from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import resolve_group
from sonic_ep.testing import Rank


def new_workspace(rank: Rank, group: dist.ProcessGroup | None = None) -> Any:
    """Collective. The caller closes it."""
    # Not at the top of the module: triton reads at import whether it interprets, and only ranks have that setting.
    from sonic_ep.fast.workspace import Workspace

    resolved = resolve_group(group)
    return Workspace(resolved, rank.device, None, BoundedCollectives(resolved, HANG_SECONDS))


@contextmanager
def workspace_of(rank: Rank) -> Iterator[Any]:
    """Collective. Closed at the end, but not after an error: the other ranks may not come to close it."""
    workspace = new_workspace(rank)
    yield workspace
    workspace.close()


def assert_every_rank_reads(workspace: Any, rows: Any) -> None:
    """Collective. Every rank's bytes of a buffer, which it fills with its number, are read by all."""
    workspace.enter()
    rows.local.fill_(workspace.group.rank)
    workspace.barrier_after_write()
    assert [int(of_rank[-1]) for of_rank in rows.by_rank] == list(range(workspace.group.world_size))
    workspace.barrier_before_write()
