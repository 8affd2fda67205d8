"""Shared files: private, locked, gone as soon as they are mapped, removed when abandoned, never promised in vain."""

import fcntl
import os
import resource
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from host_files import PATTERN, lasting_files, shared_files

from sonic_ep import ExpertParallel
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import resolve_group
from sonic_ep.errors import SharedMemoryError
from sonic_ep.testing import Rank, RankError, RankPool

pytestmark = pytest.mark.fast
NAME = "sonic_ep_" + "0123456789abcdef" * 2
OLD_SECONDS = 3600
SHORT = 1
# More than any machine has.
TOO_MANY_BYTES = 2**45


@contextmanager
def files_in(folder: Path) -> Iterator[None]:
    """Shared files are in ``folder`` while this lasts, where no other process of this machine removes any."""
    # Not at the top: triton asks whether it is to interpret when it is imported, and only ranks know.
    from sonic_ep.testing import host_memory as under_test

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(under_test, "folder", lambda: folder)
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where shared files are, for this test alone."""
    with files_in(tmp_path):
        yield tmp_path


def aged(path: Path) -> Path:
    before = time.time() - OLD_SECONDS
    os.utime(path, (before, before), follow_symlinks=False)
    return path


def old_file(path: Path) -> Path:
    path.write_bytes(b"left behind")
    return aged(path)


def remove_abandoned() -> None:
    from sonic_ep.testing.host_memory import remove_abandoned as remove

    remove()


def test_files_are_private_unguessable_and_locked() -> None:
    from sonic_ep.testing.host_memory import shared_file

    with shared_file(100) as first, shared_file(100) as second:
        assert first.name != second.name
        for path in (first, second):
            assert path.match(PATTERN)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert path.stat().st_size == 100
            with path.open() as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not first.exists()
    assert not second.exists()


def test_nobody_elses_file_is_taken_for_a_new_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if its name could be guessed: it would be open to its maker."""
    from sonic_ep.testing import host_memory as under_test

    monkeypatch.setattr(under_test.secrets, "token_hex", lambda nbytes: NAME.removeprefix("sonic_ep_"))
    (folder / NAME).symlink_to(folder / "elsewhere")
    with pytest.raises(FileExistsError), under_test.shared_file(100):
        pass
    assert not (folder / "elsewhere").exists()
    assert (folder / NAME).is_symlink()


def test_what_nobody_holds_any_more_is_removed(folder: Path) -> None:
    old_file(folder / NAME)
    remove_abandoned()
    assert shared_files(folder) == []


@contextmanager
def young(path: Path) -> Iterator[None]:
    path.write_bytes(b"just made")
    yield


@contextmanager
def held(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        aged(path)
        yield


@contextmanager
def of_another_user(path: Path) -> Iterator[None]:
    old_file(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
        yield


@contextmanager
def a_link(path: Path) -> Iterator[None]:
    target = old_file(path.with_name("target"))
    path.symlink_to(target)
    aged(path)
    yield
    assert target.exists()


@contextmanager
def a_folder(path: Path) -> Iterator[None]:
    path.mkdir()
    aged(path)
    yield


def named(name: str) -> Callable[[Path], Iterator[None]]:
    def with_that_name(path: Path) -> Iterator[None]:
        other = old_file(path.with_name(name))
        path.touch()
        yield
        assert other.exists()

    return contextmanager(with_that_name)


NOT_ABANDONED = {
    "young": young,
    "its maker lives": held,
    "another user's": of_another_user,
    "a link": a_link,
    "a folder": a_folder,
    "a shorter name": named(NAME[:-1]),
    "a longer name": named(NAME + "0"),
    "no such digits": named(NAME[:-1] + "x"),
    "of somebody else": named("somebody_else_" + NAME),
}


@pytest.mark.parametrize("why", NOT_ABANDONED)
def test_nothing_else_is_removed(folder: Path, why: str) -> None:
    with NOT_ABANDONED[why](folder / NAME):
        remove_abandoned()
        assert [path.name for path in shared_files(folder)] == [NAME]


def test_a_file_whose_maker_was_killed_is_abandoned(folder: Path) -> None:
    from sonic_ep.testing.host_memory import shared_file

    child = os.fork()
    if child == 0:
        with shared_file(100):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = shared_files(folder)
    remove_abandoned()
    assert left.exists(), "it may be one that another rank has just made and not locked yet"
    aged(left)
    remove_abandoned()
    assert not left.exists()


def make_workspace(rank: Rank):
    from sonic_ep.fast.workspace import Workspace

    group = resolve_group(None)
    return Workspace(group, rank.device, collectives=BoundedCollectives(group))


def files_while_open(rank: Rank) -> list[Path]:
    workspace = make_workspace(rank)
    workspace.reserve("rows", 100)
    workspace.barrier_after_write()
    found = lasting_files()
    workspace.barrier_before_write()
    workspace.close()
    return found


def test_no_file_is_left_even_while_it_is_mapped(cpu_pool: RankPool) -> None:
    assert cpu_pool.run(files_while_open, world_size=3) == [[]] * 3


def more_than_there_is(rank: Rank) -> str:
    """The group is of use afterwards, and so is the memory that was there."""
    workspace = make_workspace(rank)
    with pytest.raises(SharedMemoryError) as raised:
        workspace.reserve("rows", TOO_MANY_BYTES)
    rows = workspace.reserve("rows", 100)
    workspace.enter()
    rows.local.fill_(rank.rank)
    workspace.barrier_after_write()
    assert [int(of_rank[99]) for of_rank in rows.by_rank] == list(range(rank.world_size))
    workspace.barrier_before_write()
    workspace.close()
    return str(raised.value)


def test_more_memory_than_there_is_is_refused_on_all_ranks(pool: RankPool) -> None:
    for rank, said in enumerate(pool.run(more_than_there_is, world_size=2)):
        assert said.startswith(f"rank {rank} of 2: shared memory: got no {TOO_MANY_BYTES} bytes on rank 0: ")
        assert "; rank 1: " in said


@contextmanager
def no_files_above(nbytes: int) -> Iterator[None]:
    """As in a process whose memory is bounded, or where another has taken all but that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def short_on_one(rank: Rank) -> tuple[str, list[Path]]:
    """Wider rows than one rank has room for, and then as wide ones as before."""
    idx = torch.full((2, 1), rank.rank)
    with ExpertParallel(backend="fast", max_tokens_per_rank=2) as ep:
        plan = ep.plan(idx, rank.world_size)
        narrow, wide = (torch.full((2, hidden), float(rank.rank)) for hidden in (8, 2**16))
        ep.dispatch(narrow, plan)
        with no_files_above(2**16 if rank.rank == SHORT else 2**40), pytest.raises(SharedMemoryError) as raised:
            ep.dispatch(wide, plan)
        left = lasting_files()
        assert torch.equal(ep.dispatch(narrow, plan)[:2], narrow)
        assert torch.equal(ep.dispatch(wide, plan)[:2], wide)
    return str(raised.value), left


def test_memory_short_on_one_rank_is_told_by_all(cpu_pool: RankPool) -> None:
    for rank, (said, left) in enumerate(cpu_pool.run(short_on_one, world_size=3)):
        assert said.startswith(f"rank {rank} of 3: shared memory: got no ")
        assert said.endswith(f" bytes on rank {SHORT}: [Errno 27] File too large")
        assert left == []


def killed_while_files_are_there(rank: Rank, folder: Path) -> None:
    """All ranks have made their files, and then whoever goes to map them dies."""
    with pytest.MonkeyPatch.context() as patch, files_in(folder):
        patch.setattr(torch, "from_file", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        make_workspace(rank)


def started_again(rank: Rank, folder: Path) -> None:
    with files_in(folder):
        make_workspace(rank).close()


def test_what_killed_ranks_left_is_removed_by_the_next_start(cpu_pool: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="died, exit code -9"):
        cpu_pool.run(killed_while_files_are_there, tmp_path, world_size=2)
    # One a rank, but for a rank that heard of the other's death and tidied up.
    left = shared_files(tmp_path)
    assert left
    cpu_pool.run(started_again, tmp_path, world_size=2)
    assert shared_files(tmp_path) == left, "they are young: their makers may live"
    for path in left:
        aged(path)
    cpu_pool.run(started_again, tmp_path, world_size=2)
    assert shared_files(tmp_path) == []
