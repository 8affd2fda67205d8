"""The pool of ranks: live processes, errors with rank and traceback, and no rank left waiting."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from limits import HANG_SECONDS
from on_ranks import on_ranks

from sonic_ep.testing import Rank, RankError, RankPool


@pytest.fixture(scope="module")
def own_pool() -> Iterator[RankPool]:
    """A pool for these tests alone, whose ranks they may end."""
    with RankPool() as pool:
        yield pool


def pid_rank_and_sum(rank: Rank) -> tuple[int, int, int]:
    total = torch.tensor([rank.rank])
    if rank.world_size > 1:
        dist.all_reduce(total)
    return os.getpid(), rank.rank, int(total)


def fails_on_1(rank: Rank, how: str) -> None:
    if rank.rank == 1 and how == "error":
        raise KeyError("the message of rank 1")
    if rank.rank == 1 and how == "death":
        os.kill(os.getpid(), signal.SIGKILL)
    if how != "silence":
        dist.barrier()
    elif rank.rank == 1:
        time.sleep(600)


def returns_a_function(rank: Rank) -> object:
    return lambda: rank


def environment_and_threads_of_parent(rank: Rank) -> tuple[str | None, str | None, int]:
    threads = len(os.listdir(f"/proc/{os.getppid()}/task")) if sys.platform == "linux" else 1
    return os.environ.get("SET_LATER"), os.environ.get("TRITON_INTERPRET"), threads


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_processes_live_on_and_serve_every_size() -> None:
    with RankPool() as pool:
        first = pool.run(pid_rank_and_sum, world_size=3)
        assert [(rank, total) for _, rank, total in first] == [(0, 3), (1, 3), (2, 3)]
        for world_size in (2, 1, 3):
            again = pool.run(pid_rank_and_sum, world_size=world_size)
            assert [pid for pid, _, _ in again] == [pid for pid, _, _ in first[:world_size]]
            assert [total for _, _, total in again] == [sum(range(world_size))] * world_size
        pids = pool.pids()
    assert not any(map(alive, pids))
    with pytest.raises(RuntimeError, match=r"got a call after close\(\), expected an open pool"):
        pool.run(pid_rank_and_sum, world_size=2)


@on_ranks(2)
def test_uninitialized_memory_is_poisoned(rank: Rank) -> None:
    floats = torch.empty(1000, dtype=torch.bfloat16, device=rank.device)
    assert floats.isnan().all()
    assert torch.empty_like(floats).isnan().all()


@pytest.mark.parametrize(
    ("how", "timeout", "parts"),
    [
        ("error", None, ("rank 1 of 2 failed", "the message of rank 1", "in fails_on_1", "ranks [0]")),
        # The connections of its peers fail, but it is named.
        ("death", None, ("the process died, exit code -9", "--- rank 1 of 2 ---")),
        ("silence", 3.0, ("no answer within 3 s from ranks [1] of 2",)),
    ],
)
def test_a_failure_names_its_rank_and_stops_the_others(
    own_pool: RankPool, how: str, timeout: float | None, parts: tuple[str, ...]
) -> None:
    pids = [pid for pid, _, _ in own_pool.run(pid_rank_and_sum, world_size=2)]
    with pytest.raises(RankError) as raised:
        own_pool.run(fails_on_1, how, world_size=2, timeout=timeout)
    assert raised.value.rank == 1
    assert all(part in str(raised.value) for part in parts), raised.value
    assert not any(map(alive, pids))
    # The next call finds fresh ranks.
    assert len(own_pool.run(pid_rank_and_sum, world_size=2)) == 2


def test_a_rank_that_died_between_calls_is_named_and_replaced(own_pool: RankPool) -> None:
    own_pool.run(pid_rank_and_sum, world_size=2)
    os.kill(own_pool.pids()[1], signal.SIGKILL)
    time.sleep(0.5)
    with pytest.raises(RankError) as raised:
        own_pool.run(pid_rank_and_sum, world_size=2)
    assert raised.value.rank == 1
    assert len(own_pool.run(pid_rank_and_sum, world_size=2)) == 2


def test_fresh_ranks_have_the_environment_of_their_caller(own_pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are forked from a process of one thread."""
    assert own_pool.run(environment_and_threads_of_parent, world_size=1) == [(None, "1", 1)]
    own_pool.stop()
    monkeypatch.setenv("SET_LATER", "yes")
    assert own_pool.run(environment_and_threads_of_parent, world_size=1) == [("yes", "1", 1)]


def test_a_result_that_cannot_be_pickled_is_an_error_and_no_hang(own_pool: RankPool) -> None:
    with pytest.raises(RankError, match="returns_a_function"):
        own_pool.run(returns_a_function, world_size=1)


# In the background of a shell script Ctrl-C is ignored, also by every child that does not ask for it.
PARENT = """
import signal, sys
sys.path[:0] = {path!r}
from sonic_ep.testing import RankPool
from test_ranks import fails_on_1, pid_rank_and_sum
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pool = RankPool()
    pool.run(pid_rank_and_sum, world_size=2)
    print(*pool.pids(), flush=True)
    pool.run(fails_on_1, "silence", world_size=2)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=lambda how: how.name)
def test_ranks_end_with_their_parent(how: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(path=[str(Path(__file__).parent), *sys.path]))
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, script], **streams, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.send_signal(how)
        assert parent.wait(timeout=HANG_SECONDS) != 0
    deadline = time.monotonic() + HANG_SECONDS
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))
