"""Shared files: private, without a name, and refused where memory is short."""

import os
import resource
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from on_ranks import on_ranks
from promises import promise
from workspaces import assert_every_rank_reads, new_workspace, workspace_of

from sonic_ep import ExpertParallel
from sonic_ep.errors import SharedMemoryError
from sonic_ep.testing import Rank, RankError, RankPool

pytestmark = pytest.mark.fast
# More than any machine has.
TOO_MANY_BYTES = 2**45
FOLDER_OF_FILES = "sonic_ep.testing.host_memory.folder"


@promise("shared-files")
@on_ranks(3, pool="cpu_pool")
def test_files_are_private_and_have_no_name(rank: Rank, tmp_path: Path) -> None:
    """Even while they are open: nothing can be guessed, and nothing is left."""
    honest, found = torch.from_file, []

    def from_file(path: str, **options: Any) -> torch.Tensor:
        found.append(os.stat(path))
        return honest(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FOLDER_OF_FILES, lambda: tmp_path)
        patch.setattr(torch, "from_file", from_file)
        with workspace_of(rank) as workspace:
            rows = workspace.reserve("rows", 100)
            assert list(tmp_path.iterdir()) == []
            assert_every_rank_reads(workspace, rows)
    assert len(found) % rank.world_size == 0
    assert len({file.st_ino for file in found}) == len(found) > 0
    assert {(stat.S_IMODE(file.st_mode), file.st_nlink) for file in found} == {(0o600, 0)}


def killed_after_allocation(rank: Rank, folder: Path) -> None:
    """Each rank has created its file; the first to map one is killed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FOLDER_OF_FILES, lambda: folder)
        patch.setattr(torch, "from_file", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        new_workspace(rank)


@promise("shared-files")
def test_killed_ranks_leave_no_file(cpu_pool: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="died, exit code -9"):
        cpu_pool.run(killed_after_allocation, tmp_path, world_size=2)
    assert list(tmp_path.iterdir()) == []


@promise("out-of-memory")
@on_ranks(2)
def test_more_memory_than_there_is_is_refused_on_all_ranks(rank: Rank) -> None:
    """Afterwards the group and the memory allocated before are usable."""
    with workspace_of(rank) as workspace:
        with pytest.raises(SharedMemoryError) as raised:
            workspace.reserve("rows", TOO_MANY_BYTES)
        said = str(raised.value)
        assert said.startswith(f"rank {rank.rank} of 2: shared memory: got no {TOO_MANY_BYTES} bytes on rank 0: ")
        assert "; rank 1: " in said
        assert_every_rank_reads(workspace, workspace.reserve("rows", 100))


@promise("out-of-memory")
@on_ranks(3, pool="cpu_pool")
def test_memory_short_on_one_rank_is_reported_on_all(rank: Rank) -> None:
    """Afterwards calls of the old size and of the new one work."""
    idx = torch.full((2, 1), rank.rank)
    with ExpertParallel(backend="fast", max_tokens_per_rank=2) as ep:
        plan = ep.plan(idx, rank.world_size)
        narrow, wide = (torch.full((2, hidden), float(rank.rank)) for hidden in (8, 2**16))
        ep.dispatch(narrow, plan)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
        with pytest.raises(SharedMemoryError) as raised:
            ep.dispatch(wide, plan)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert str(raised.value).startswith(f"rank {rank.rank} of 3: shared memory: got no ")
        assert str(raised.value).endswith(" bytes on rank 1: [Errno 27] File too large")
        assert torch.equal(ep.dispatch(narrow, plan)[:2], narrow)
        assert torch.equal(ep.dispatch(wide, plan)[:2], wide)
