"""Notices of ranks in trouble: they arrive, stay with their object, and a silent store holds up nobody."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from sonic_ep.distributed.group import EPGroup, resolve_group
from sonic_ep.distributed.rank_status import ANSWER_SECONDS, RankStatus, StatusStore
from sonic_ep.testing import Rank, RankPool

PAIR = EPGroup(rank=0, world_size=2)
OTHER = EPGroup(rank=1, world_size=2)
# A busy machine's.
SLACK_SECONDS = 2.0


@pytest.mark.parametrize(
    "text",
    ["", "in phase dispatch of step 3", "KeyError: 'a b'\nsecond line", "Größe ≥ 7", "\udcff as file names have it"],
)
def test_a_notice_arrives_as_it_was_told(text: str) -> None:
    store = dist.HashStore()
    mine, theirs = StatusStore(PAIR, store), StatusStore(OTHER, store)
    assert theirs.statuses() == {}
    mine.tell(RankStatus(collectives=2, left=False, text="before"))
    mine.tell(RankStatus(collectives=3, left=True, text=text))
    assert theirs.statuses() == {0: RankStatus(collectives=3, left=True, text=text)}
    assert mine.statuses() == {}
    assert [mine.broken, theirs.broken] == [False, False]


def test_boards_of_one_group_have_numbers_and_do_not_mix() -> None:
    store = dist.HashStore()
    first, second = ([StatusStore(group, store) for _ in range(2)] for group in (PAIR, OTHER))
    assert [board.number for board in first] == [board.number for board in second] == [0, 1]
    first[0].tell(RankStatus(collectives=1, left=False, text="of the first object"))
    second[1].tell(RankStatus(collectives=1, left=False, text="of the second object"))
    assert list(second[0].statuses()) == [0]
    assert second[1].statuses() == {}
    assert list(first[1].statuses()) == [1]


def test_alone_there_is_nobody_to_tell() -> None:
    board = StatusStore(EPGroup(rank=0, world_size=1), None)
    board.tell(RankStatus(collectives=1, left=True, text="gone"))
    assert (board.number, board.statuses(), board.broken) == (0, {}, False)


class BrokenStore:
    """A store whose every call ends in ``failure``."""

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


# It fails in a thread, whose last words would come as a warning.
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("failure", "longest"), [(gone, 0.0), (silent, ANSWER_SECONDS)])
def test_a_store_that_fails_is_asked_once(failure: Callable[[], Any], longest: float) -> None:
    store = BrokenStore(failure)
    began = time.monotonic()
    board = StatusStore(PAIR, store)
    assert board.broken
    board.tell(RankStatus(collectives=1, left=False, text="nobody hears"))
    assert board.statuses() == {}
    assert time.monotonic() - began < longest + SLACK_SECONDS
    assert store.calls == 1


def told_in_groups(rank: Rank) -> list[str]:
    """What the other rank has told, in the world and in a group of the same ranks."""
    groups = [None, dist.new_group([0, 1])]
    boards = [StatusStore.of(resolve_group(group)) for group in groups]
    for name, board in zip(("world", "pair"), boards, strict=True):
        board.tell(RankStatus(collectives=rank.rank, left=False, text=name))
    dist.barrier()
    other = 1 - rank.rank
    return [board.statuses()[other].text for board in boards]


def test_every_group_has_boards_of_its_own(cpu_pool: RankPool) -> None:
    assert cpu_pool.run(told_in_groups, world_size=2) == [["world", "pair"]] * 2
