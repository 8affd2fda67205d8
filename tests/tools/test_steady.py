"""A host that takes as long every time: cores of ranks, and what the garbage collector looks at."""

import gc
import os
import weakref
from itertools import pairwise
from threading import Thread

import pytest
from harness.steady import core_of, freeze_garbage, own_core

on_linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs os.sched_setaffinity, as Linux has")


def test_ranks_share_no_core_and_no_neighbour_and_run_on_all_where_one_has_no_second_core() -> None:
    for cores, ranks in ((32, 2), (33, 2), (16, 8), (4, 2), (2, 1)):
        there = list(range(10, 10 + cores))
        given = [core for rank in range(ranks) if (core := core_of(rank, ranks, there)) is not None]
        assert set(given) <= set(there)
        assert len(set(given)) == ranks
        assert all(after - before >= 2 for before, after in pairwise(given))
    for cores, ranks in ((2, 2), (3, 2), (1, 1), (4, 8)):
        assert [core_of(rank, ranks, range(cores)) for rank in range(ranks)] == [None] * ranks


@on_linux
def test_a_thread_keeps_to_its_core_and_gets_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip(f"needs 2 cores, found {len(before)}")
    seen: list[set[int]] = []

    def look_and_fail() -> None:
        started = Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        started.start()
        started.join()
        seen.append(os.sched_getaffinity(0))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), own_core(0, 1):
        look_and_fail()
    assert seen == [{core_of(0, 1, sorted(before))}] * 2
    assert os.sched_getaffinity(0) == before
    with own_core(0, len(before)):
        assert os.sched_getaffinity(0) == before
    monkeypatch.delattr(os, "sched_setaffinity")
    with own_core(0, 1):
        assert os.sched_getaffinity(0) == before


@on_linux
def test_a_thread_that_may_not_choose_a_core_runs_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    with own_core(0, 2):
        pass


def test_garbage_is_gone_before_and_only_what_is_new_is_looked_at() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    gone = weakref.ref(Cycle())

    def look_and_fail() -> None:
        assert gone() is None
        assert gc.get_freeze_count() > 1000
        assert gc.isenabled()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), freeze_garbage():
        look_and_fail()
    assert gc.get_freeze_count() == 0
