"""Shared files: private, locked, unlinked once mapped, removed when abandoned, and refused where memory is short."""

import fcntl
import importlib
import os
import resource
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from host_files import PATTERN, lasting_files, shared_files
from on_ranks import on_ranks
from promises import promise
from workspaces import new_workspace, workspace_of

from sonic_ep import ExpertParallel
from sonic_ep.errors import SharedMemoryError
from sonic_ep.testing import Rank, RankError, RankPool

pytestmark = pytest.mark.fast
NAME = "sonic_ep_" + "0123456789abcdef" * 2
# More than any machine has.
TOO_MANY_BYTES = 2**45


def use(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Shared files are created in ``folder``, where no other process removes any."""
    patch.setattr("sonic_ep.testing.host_memory.folder", lambda: folder)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use(tmp_path, monkeypatch)
    return tmp_path


def aged(path: Path) -> Path:
    """An hour old."""
    before = time.time() - 3600
    os.utime(path, (before, before), follow_symlinks=False)
    return path


def old_file(path: Path) -> Path:
    path.write_bytes(b"left behind")
    return aged(path)


@pytest.fixture
def host_memory() -> ModuleType:
    """Imported late: triton reads at import whether it interprets, and only ranks have that setting."""
    return importlib.import_module("sonic_ep.testing.host_memory")


@promise("shared-files")
def test_files_are_private_unguessable_and_locked(
    folder: Path, host_memory: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if its name was guessed, an existing file is not taken for a new one: it would be open to its creator."""
    with host_memory.shared_file(100) as first, host_memory.shared_file(100) as second:
        assert first.name != second.name
        for path in (first, second):
            assert path.match(PATTERN)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert path.stat().st_size == 100
            with path.open() as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert list(folder.iterdir()) == []
    monkeypatch.setattr(host_memory.secrets, "token_hex", lambda nbytes: NAME.removeprefix("sonic_ep_"))
    (folder / NAME).symlink_to(folder / "elsewhere")
    with pytest.raises(FileExistsError), host_memory.shared_file(100):
        pass
    assert [path.name for path in folder.iterdir()] == [NAME]


def locked(path: Path, patch: pytest.MonkeyPatch) -> object:
    file = path.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    aged(path)
    return file


def of_another_user(path: Path, patch: pytest.MonkeyPatch) -> None:
    owner = old_file(path).stat().st_uid
    patch.setattr(os, "getuid", lambda: owner + 1)


def a_link(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.symlink_to(old_file(path.with_name("target")))
    aged(path)


OTHER_NAMES = (NAME[:-1], NAME + "0", NAME[:-1] + "x", "somebody_else_" + NAME)
NOT_ABANDONED: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    "young": lambda path, patch: path.write_bytes(b"just created"),
    "locked by a live process": locked,
    "of another user": of_another_user,
    "a link": a_link,
    "a folder": lambda path, patch: path.mkdir() or aged(path),
    "of other names": lambda path, patch: [old_file(path.with_name(name)) for name in OTHER_NAMES],
}


@promise("shared-files")
@pytest.mark.parametrize("why", NOT_ABANDONED)
def test_other_files_are_never_removed(
    folder: Path, host_memory: ModuleType, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = NOT_ABANDONED[why](folder / NAME, monkeypatch)
    before = set(folder.iterdir())
    assert before
    host_memory.remove_abandoned()
    assert set(folder.iterdir()) == before
    del held


def test_a_file_of_a_killed_process_is_removed_once_it_is_old(folder: Path, host_memory: ModuleType) -> None:
    child = os.fork()
    if child == 0:
        with host_memory.shared_file(100):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = shared_files(folder)
    host_memory.remove_abandoned()
    assert left.exists(), "another rank may just have created it, and not locked it yet"
    aged(left)
    host_memory.remove_abandoned()
    assert not left.exists()


@promise("shared-files")
@on_ranks(3, pool="cpu_pool")
def test_no_file_is_left_even_while_it_is_mapped(rank: Rank) -> None:
    with workspace_of(rank) as workspace:
        workspace.reserve("rows", 100)
        workspace.barrier_after_write()
        assert lasting_files() == []
        workspace.barrier_before_write()


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
        rows = workspace.reserve("rows", 100)
        workspace.enter()
        rows.local.fill_(rank.rank)
        workspace.barrier_after_write()
        assert [int(of_rank[99]) for of_rank in rows.by_rank] == list(range(rank.world_size))
        workspace.barrier_before_write()


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
        assert lasting_files() == []
        assert torch.equal(ep.dispatch(narrow, plan)[:2], narrow)
        assert torch.equal(ep.dispatch(wide, plan)[:2], wide)


def killed_after_allocation(rank: Rank, folder: Path) -> None:
    """Each rank has created its file; the first to map one is killed."""
    with pytest.MonkeyPatch.context() as patch:
        use(folder, patch)
        patch.setattr(torch, "from_file", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        new_workspace(rank)


def started_again(rank: Rank, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        use(folder, patch)
        new_workspace(rank).close()


@promise("shared-files")
def test_files_of_killed_ranks_are_removed_by_the_next_start(cpu_pool: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="died, exit code -9"):
        cpu_pool.run(killed_after_allocation, tmp_path, world_size=2)
    # One a rank, unless a rank saw the other's death and removed its own.
    left = shared_files(tmp_path)
    assert left
    cpu_pool.run(started_again, tmp_path, world_size=2)
    assert shared_files(tmp_path) == left, "they are young: their processes may live"
    for path in left:
        aged(path)
    cpu_pool.run(started_again, tmp_path, world_size=2)
    assert shared_files(tmp_path) == []
