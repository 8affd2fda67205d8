"""Statuses of ranks in trouble: they arrive, stay with their object, and a silent store holds up nobody."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from on_ranks import on_ranks

from sonic_ep.distributed.group import EPGroup, resolve_group
from sonic_ep.distributed.rank_status import ANSWER_SECONDS, RankStatus, StatusStore
from sonic_ep.testing import Rank

PAIR = EPGroup(rank=0, world_size=2)
OTHER = EPGroup(rank=1, world_size=2)
# On a busy machine.
SLACK_SECONDS = 2.0
TEXTS = ["", "in phase dispatch of step 3", "KeyError: 'a b'\nsecond line", "Größe ≥ 7", "\udcff as file names have it"]


def status(text: str, **fields: Any) -> RankStatus:
    return RankStatus(**{"collectives": 1, "left": False, "text": text, **fields})


@pytest.mark.parametrize("text", TEXTS)
def test_a_status_arrives_as_it_was_reported(text: str) -> None:
    store = dist.HashStore()
    mine, theirs = StatusStore(PAIR, store), StatusStore(OTHER, store)
    assert theirs.statuses() == {}
    mine.report(status("before", lost=(1, 2)))
    mine.report(status(text, collectives=3, left=True))
    assert theirs.statuses() == {0: status(text, collectives=3, left=True)}
    assert (mine.statuses(), mine.broken, theirs.broken) == ({}, False, False)


def test_statuses_of_two_objects_do_not_mix() -> None:
    store = dist.HashStore()
    first, second = ([StatusStore(group, store) for _ in range(2)] for group in (PAIR, OTHER))
    assert [own.number for own in first] == [own.number for own in second] == [0, 1]
    first[0].report(status("of the first object"))
    second[1].report(status("of the second object"))
    assert (list(second[0].statuses()), second[1].statuses(), list(first[1].statuses())) == ([0], {}, [1])


def test_alone_there_is_nobody_to_report_to() -> None:
    alone = StatusStore(EPGroup(rank=0, world_size=1), None)
    alone.report(status("gone", left=True))
    assert (alone.number, alone.statuses(), alone.broken) == (0, {}, False)


class BrokenStore:
    def __init__(self, failure: Callable[[], Any]) -> None:
        self._failure, self.calls = failure, 0

    def _fail(self, *_: object) -> Any:
        self.calls += 1
        return self._failure()

    add = check = get = set = _fail


def gone() -> None:
    raise dist.DistNetworkError("Broken pipe")


def silent() -> None:
    time.sleep(4 * ANSWER_SECONDS)


# It fails in a thread, whose error would come as a warning.
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("failure", "longest"), [(gone, 0.0), (silent, ANSWER_SECONDS)])
def test_a_store_that_fails_is_asked_once(failure: Callable[[], Any], longest: float) -> None:
    store = BrokenStore(failure)
    began = time.monotonic()
    own = StatusStore(PAIR, store)
    assert own.broken
    own.report(status("nobody reads it"))
    assert own.statuses() == {}
    assert time.monotonic() - began < longest + SLACK_SECONDS
    assert store.calls == 1


@on_ranks(2, pool="cpu_pool")
def test_every_group_has_statuses_of_its_own(rank: Rank) -> None:
    """The world, and a group of the same ranks."""
    groups = {"world": None, "pair": dist.new_group([0, 1])}
    own = {name: StatusStore.of(resolve_group(group)) for name, group in groups.items()}
    for name, store in own.items():
        store.report(status(name))
    dist.barrier()
    assert [store.statuses()[1 - rank.rank].text for store in own.values()] == ["world", "pair"]
