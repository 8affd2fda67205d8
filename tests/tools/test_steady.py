"""A host that takes as long every time: cores of ranks."""

import os
from itertools import pairwise
from unittest.mock import Mock

import pytest
from harness.steady import core_of, own_core

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else 0


def test_ranks_share_no_core_and_no_neighbour_and_run_on_all_where_one_has_no_second_core() -> None:
    for cores, ranks in ((32, 2), (33, 2), (16, 8), (4, 2), (2, 1)):
        there = list(range(10, 10 + cores))
        given = [core for rank in range(ranks) if (core := core_of(rank, ranks, there)) is not None]
        assert set(given) <= set(there)
        assert len(set(given)) == ranks
        assert all(after - before >= 2 for before, after in pairwise(given))
    for cores, ranks in ((2, 2), (3, 2), (1, 1), (4, 8)):
        assert [core_of(rank, ranks, range(cores)) for rank in range(ranks)] == [None] * ranks


@pytest.mark.skipif(CORES < 2, reason="needs os.sched_setaffinity, as Linux has, and 2 cores")
def test_a_thread_keeps_to_its_core_and_gets_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    with own_core(0, 1):
        assert os.sched_getaffinity(0) == {core_of(0, 1, sorted(before))}
    with pytest.raises(ZeroDivisionError), own_core(0, 1):
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before
    with own_core(0, CORES):
        assert os.sched_getaffinity(0) == before
    # One that may not choose a core runs on all, and so it does where there is no such call.
    monkeypatch.setattr(os, "sched_setaffinity", Mock(side_effect=PermissionError))
    for _ in range(2):
        with own_core(0, 1):
            assert os.sched_getaffinity(0) == before
        monkeypatch.delattr(os, "sched_setaffinity", raising=False)
