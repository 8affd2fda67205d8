"""The pool of ranks: live processes, errors with rank and traceback, and nobody left waiting."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from sonic_ep.testing import Rank, RankError, RankPool


def who(rank: Rank) -> tuple[int, int, int]:
    total = torch.tensor([rank.rank])
    if rank.world_size > 1:
        dist.all_reduce(total)
    return os.getpid(), rank.rank, int(total)


def fails_on(rank: Rank, culprit: int) -> None:
    if rank.rank == culprit:
        raise KeyError("the culprit's own words")
    dist.barrier()


def dies_on(rank: Rank, culprit: int) -> None:
    if rank.rank == culprit:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def sleeps_on(rank: Rank, culprit: int) -> None:
    if rank.rank == culprit:
        time.sleep(600)


def returns_a_function(rank: Rank) -> object:
    return lambda: rank


def fresh_memory(rank: Rank) -> bool:
    floats = torch.empty(1000, dtype=torch.bfloat16, device=rank.device)
    return bool(floats.isnan().all() and torch.empty_like(floats).isnan().all())


def said_in_environment(rank: Rank, name: str) -> str | None:
    return os.environ.get(name)


def threads_of_parent(rank: Rank) -> int:
    return len(os.listdir(f"/proc/{os.getppid()}/task"))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_processes_live_on_and_serve_every_size() -> None:
    with RankPool() as pool:
        first = pool.run(who, world_size=3)
        assert [(rank, total) for _, rank, total in first] == [(0, 3), (1, 3), (2, 3)]
        for world_size in (2, 1, 3, 2):
            again = pool.run(who, world_size=world_size)
            assert [pid for pid, _, _ in again] == [pid for pid, _, _ in first[:world_size]]
            assert [total for _, _, total in again] == [sum(range(world_size))] * world_size
        pids = pool.pids()
    assert not any(map(alive, pids))


def test_memory_that_nobody_wrote_is_poisoned(pool: RankPool) -> None:
    assert pool.run(fresh_memory, world_size=2) == [True, True]


def test_an_error_names_its_rank_and_stops_the_others() -> None:
    with RankPool() as pool:
        pids = [pid for pid, _, _ in pool.run(who, world_size=3)]
        started = time.monotonic()
        with pytest.raises(RankError, match="rank 1 of 3 failed") as raised:
            pool.run(fails_on, 1, world_size=3)
        assert time.monotonic() - started < 5
        assert raised.value.rank == 1
        assert "the culprit's own words" in str(raised.value)
        assert "in fails_on" in str(raised.value)
        assert "stopped while they waited: ranks [0, 2]" in str(raised.value)
        assert not any(map(alive, pids))
        # The next call finds fresh ranks.
        assert len(pool.run(who, world_size=3)) == 3


def test_a_dead_rank_is_named() -> None:
    with RankPool() as pool:
        pool.run(who, world_size=2)
        with pytest.raises(RankError, match="the process died, exit code -9") as raised:
            pool.run(dies_on, 1, world_size=2)
        assert "--- rank 1 of 2 ---" in str(raised.value)
        # Its peers complain of their connections, but it is the one that died.
        assert raised.value.rank == 1


def test_a_silent_rank_is_named_when_time_is_up() -> None:
    with RankPool() as pool:
        pool.run(who, world_size=2)
        with pytest.raises(RankError, match=r"no answer within 3 s from ranks \[1\] of 2"):
            pool.run(sleeps_on, 1, world_size=2, timeout=3.0)


def test_a_rank_that_died_between_calls_is_named_and_replaced() -> None:
    with RankPool() as pool:
        pool.run(who, world_size=2)
        os.kill(pool.pids()[1], signal.SIGKILL)
        time.sleep(0.5)
        with pytest.raises(RankError) as raised:
            pool.run(who, world_size=2)
        assert raised.value.rank == 1
        assert len(pool.run(who, world_size=2)) == 2


def test_fresh_ranks_have_the_environment_of_their_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    with RankPool() as pool:
        assert pool.run(said_in_environment, "SAID_LATER", world_size=1) == [None]
        pool.stop()
        monkeypatch.setenv("SAID_LATER", "yes")
        assert pool.run(said_in_environment, "SAID_LATER", world_size=1) == ["yes"]
        assert pool.run(said_in_environment, "TRITON_INTERPRET", world_size=1) == ["1"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, where ranks are forked")
def test_what_ranks_are_forked_from_has_no_threads_to_lose() -> None:
    with RankPool() as pool:
        assert pool.run(threads_of_parent, world_size=2) == [1, 1]


def test_a_closed_pool_says_so() -> None:
    pool = RankPool()
    pool.close()
    with pytest.raises(RuntimeError, match=r"got a call after close\(\), expected an open pool"):
        pool.run(who, world_size=2)


def test_what_cannot_travel_is_an_error_and_no_hang() -> None:
    with RankPool() as pool, pytest.raises(RankError, match="returns_a_function"):
        pool.run(returns_a_function, world_size=1)


# In the background of a shell script, Ctrl-C is ignored, and by every child too that does not ask for it.
PARENT = """
import signal, sys, time
sys.path.insert(0, {folder!r})
from sonic_ep.testing import RankPool
from test_ranks import sleeps_on, who
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pool = RankPool()
    pool.run(who, world_size=2)
    print(*pool.pids(), flush=True)
    pool.run(sleeps_on, 0, world_size=2)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda how: how.name)
def test_ranks_go_when_their_parent_goes(how: signal.Signals, tmp_path: os.PathLike[str]) -> None:
    script = os.path.join(tmp_path, "parent.py")
    with open(script, "w") as file:
        file.write(PARENT.format(folder=os.path.dirname(__file__)))
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.send_signal(how)
        assert parent.wait(timeout=20) != 0
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))
