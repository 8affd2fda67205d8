"""Host collectives end in time, whatever becomes of the other ranks, and name the rank that was missing."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from new_group import collectives_of, new_group, own_process_group, raises, without_haste
from on_ranks import on_ranks
from promises import promise

from sonic_ep.distributed.collectives import ANNOUNCE_SECONDS, GRACE_SECONDS, HOST, BoundedCollectives
from sonic_ep.distributed.group import EPGroup, resolve_group
from sonic_ep.distributed.rank_status import RankStatus, StatusStore
from sonic_ep.distributed.sync_tag import CALL_BITS, Phase, Step, SyncTag, after_write, mismatch
from sonic_ep.errors import CollectiveMismatchError, PeerError, PeerLostError, PeerTimeoutError
from sonic_ep.testing import Rank

ODD = 1
TIMEOUT_SECONDS = 0.5
# Long enough for the others to look who is missing.
LATE_SECONDS = 1.2 * ANNOUNCE_SECONDS
PLENTY_SECONDS = 60.0
TIMED_OUT = "rank {} of {}: waited 0.5 s for {} in phase exchange of step 7: "


@contextmanager
def raises_that_it_is_missing(collectives: BoundedCollectives, missing: int) -> Iterator[None]:
    """Of two ranks that wait, each times out, unless it hears before that the other has, or loses it."""
    without_haste(collectives)
    group = collectives.group
    waited = re.escape(TIMED_OUT.format(group.rank, group.world_size, f"rank {missing}"))
    with pytest.raises(PeerError, match=f"{waited}|{group}: lost rank {missing}, waited for in phase exchange of step"):
        yield
    collectives.leave("by its own error")


def status_of(collectives: BoundedCollectives, rank: int, is_so: Callable[[RankStatus], bool]) -> None:
    """Wait until a rank has reported a status that ``is_so``."""
    store = collectives._status_store
    while rank not in store.statuses() or not is_so(store.statuses()[rank]):
        time.sleep(0.05)


@on_ranks(3, pool="cpu_pool")
def test_a_rank_that_comes_in_time_is_waited_for(rank: Rank) -> None:
    """It comes when the others have reported that they wait. To have waited before does not count as coming."""
    with new_group(rank, PLENTY_SECONDS) as collectives:
        for other in (0, 2) if rank.rank == ODD else ():
            status_of(collectives, other, lambda status: status.text == "phase exchange of step 7")
        assert collectives.numbers(10 * rank.rank, HOST) == [0, 10, 20]
        assert collectives.numbers(rank.rank, HOST) == [0, 1, 2]
        collectives.timeout = TIMEOUT_SECONDS
        if rank.rank != 0:
            with raises_that_it_is_missing(collectives, 0):
                collectives.numbers(1, HOST)


@promise("bounded-waits")
@pytest.mark.parametrize("rows", [False, True])
@on_ranks(3, pool="cpu_pool")
def test_ranks_that_do_not_come_are_named(rank: Rank, rows: bool) -> None:
    """One, and then two: the rank that waits alone for both has timed out itself."""
    assert 2 * GRACE_SECONDS <= 5
    for absent in ((1,), (0, 1)):
        with new_group(rank, TIMEOUT_SECONDS) as collectives:
            alone = raises(PeerTimeoutError, TIMED_OUT.format(rank.rank, 3, "ranks 0, 1"))
            if rank.rank not in absent:
                with alone if len(absent) == 2 else raises_that_it_is_missing(collectives, ODD):
                    if rows:
                        collectives.all_to_all_rows(torch.ones(3, 2), [1, 1, 1], [1, 1, 1])
                    collectives.numbers(1, HOST)


@on_ranks(2, pool="cpu_pool")
def test_a_late_rank_hears_that_the_others_are_gone(rank: Rank) -> None:
    with new_group(rank, TIMEOUT_SECONDS) as collectives:
        error, words = PeerTimeoutError, TIMED_OUT.format(0, 2, "rank 1")
        if rank.rank == ODD:
            status_of(collectives, 0, lambda status: status.lost == (ODD,))
            error, words = PeerLostError, "rank 1 of 2: lost a rank that is not known, waited for in phase exchange"
        with raises(error, words):
            collectives.numbers(1, HOST)


@promise("lost-rank")
@pytest.mark.parametrize(("reported", "gone"), [(True, False), (True, True), (False, True)])
@on_ranks(3, pool="cpu_pool")
def test_a_rank_that_left_is_named_before_the_time_is_up(rank: Rank, reported: bool, gone: bool) -> None:
    """With its error, if it has reported that. gone: its connections are closed, as at the end of its process."""
    collectives = collectives_of(None, PLENTY_SECONDS)
    if rank.rank == ODD:
        if reported:
            time.sleep(0.2)
            collectives.leave("KeyError: 'labels'")
        if gone:
            dist.destroy_process_group(collectives.group.process_group)
        return
    said = "rank 1 left (KeyError: 'labels') while it was waited for" if reported else "lost rank 1, waited for"
    with raises(PeerLostError, f"rank {rank.rank} of 3: {said} in phase exchange of step 7"):
        collectives.numbers(1, HOST)


@on_ranks(3, pool="cpu_pool")
def test_a_rank_that_left_after_its_part_is_not_missed(rank: Rank) -> None:
    with new_group(rank, PLENTY_SECONDS) as collectives:
        if rank.rank != ODD:
            time.sleep(LATE_SECONDS if rank.rank == 2 else 0)
            assert collectives.numbers(5, HOST) == [5, 5, 5]
            return
        mine, found = torch.tensor([collectives.sync_tag.tag, 5]), [torch.zeros(2, dtype=torch.int64) for _ in range(3)]
        gathered = collectives.group.process_group.allgather([found], [mine])
        collectives._begun += 1
        collectives.leave("no error of the others'")
        gathered.wait()


@promise("mismatch")
@pytest.mark.parametrize("elsewhere", ["phase backward (router) of step 6", "phase unknown of step 3"])
@on_ranks(3, pool="cpu_pool")
def test_a_rank_that_came_from_elsewhere_is_named_with_both_places(rank: Rank, elsewhere: str) -> None:
    """At another tag, or in a collective of the caller's own."""
    here = "phase exchange of step 7"
    with new_group(rank, PLENTY_SECONDS) as collectives:
        words = f"rank {rank.rank} of 3: rank {ODD} came to {elsewhere}, expected {here}"
        if rank.rank == ODD and "unknown" in elsewhere:
            two = torch.tensor([3, 4])
            dist.all_gather([torch.empty_like(two) for _ in range(3)], two, group=collectives.group.process_group)
            return
        if rank.rank == ODD:
            collectives.sync_tag = SyncTag(step=Step(number=6), phase=Phase.ROUTER, backward=True)
            words = f"rank {ODD} of 3: rank 0 came to {here}, expected {elsewhere}"
        with raises(CollectiveMismatchError, words):
            collectives.numbers(1, HOST)


@on_ranks(2, pool="cpu_pool")
def test_objects_do_not_read_each_others_statuses(rank: Rank) -> None:
    """Those of one group, and of two groups of the same ranks."""
    with own_process_group(rank) as group:
        world, *pair = (BoundedCollectives(resolve_group(one)) for one in (None, group, group))
        assert [one.object_number for one in pair] == [0, 1]
        for one, why in ((world, "of the world"), (pair[0], "closed early")):
            one.leave(why)
        time.sleep(LATE_SECONDS if rank.rank == ODD else 0)
        assert pair[1].numbers(rank.rank, HOST) == [0, 1]
        found = [[status.text for status in one._status_store.statuses().values()] for one in (world, pair[0])]
        assert found == [["of the world"], ["closed early"]]


def test_a_status_arrives_as_it_was_reported() -> None:
    store = dist.HashStore()
    mine, theirs = (StatusStore(EPGroup(rank=rank, world_size=2), store) for rank in range(2))
    assert theirs.statuses() == {}
    mine.report(RankStatus(collectives=1, left=False, text="before", lost=(1, 2)))
    for text in ("", "KeyError: 'a b'\nsecond line", "Größe ≥ 7", "\udcff as file names have it"):
        last = RankStatus(collectives=3, left=True, text=text)
        mine.report(last)
        assert theirs.statuses() == {0: last}
    assert (mine.statuses(), mine.broken, theirs.broken) == ({}, False, False)


@promise("silent-store")
@pytest.mark.parametrize("silent", [False, True])
@on_ranks(3, pool="cpu_pool")
def test_a_store_that_fails_is_asked_once(rank: Rank, silent: bool) -> None:
    with new_group(rank, TIMEOUT_SECONDS) as collectives:
        failure = (lambda *_: threading.Event().wait()) if silent else dist.DistNetworkError("Broken pipe")
        store = Mock(**{"add.return_value": 1, "set.side_effect": failure})
        collectives._status_store = StatusStore(collectives.group, store)
        holder = "rank 0 of the world (which holds the store of the process group, and does not answer)"
        if rank.rank != ODD:
            with raises(PeerTimeoutError, TIMED_OUT.format(rank.rank, 3, holder)):
                collectives.numbers(1, HOST)
            assert [name for name, *_ in store.method_calls] == ["add", "set"]


@promise("lost-rank")
@on_ranks(3, pool="cpu_pool")
def test_a_rank_that_finds_out_stays_until_the_others_know(rank: Rank) -> None:
    """The first to find out waits until another, whose timeout is longer, has read of it and left."""
    with new_group(rank, TIMEOUT_SECONDS if rank.rank == 0 else PLENTY_SECONDS) as collectives:
        without_haste(collectives)
        if rank.rank == 0:
            with raises(PeerTimeoutError, TIMED_OUT.format(0, 3, "rank 1")):
                collectives.numbers(1, HOST)
            assert collectives._status_store.statuses()[2].left
        if rank.rank == 2:
            # Late, and alive: neither of the two that waited calls it lost.
            heard = "rank 2 of 3: rank 1, waited for in phase exchange of step 7: rank 0 timed out waiting for it; rank"
            with raises(PeerTimeoutError, heard):
                collectives.numbers(1, HOST)
            collectives.leave("read of it")


@promise("lost-rank")
@on_ranks(2, pool="cpu_pool")
def test_what_fails_as_it_begins_is_told_like_what_fails_later(rank: Rank) -> None:
    """The process group raises at once: the peer is lost; but memory is this rank's own."""
    with new_group(rank, TIMEOUT_SECONDS) as collectives:
        if rank.rank == ODD:
            with pytest.raises(torch.OutOfMemoryError):
                collectives._run(Mock(side_effect=torch.OutOfMemoryError("2 GiB")), torch.zeros(1))
            collectives.leave("no memory")
        dist.barrier()
        if rank.rank != ODD:
            collectives._begun += 1
            with raises(PeerLostError, "rank 0 of 2: rank 1 left (no memory) while it was waited for"):
                collectives._run(Mock(side_effect=RuntimeError("connection reset")), torch.zeros(1))


@promise("own-clock")
@on_ranks(2, pool="cpu_pool")
def test_pytorchs_own_checks_do_not_wait_by_their_own_clock(rank: Rank) -> None:
    """Ranks that come, and then one that does not."""
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    with new_group(rank, TIMEOUT_SECONDS) as collectives:
        dist.set_debug_level(level)
        assert hasattr(collectives.group.process_group._get_backend(HOST), "wrapped_pg")
        assert collectives.numbers(rank.rank, HOST) == [0, 1]
        rows = collectives.all_to_all_rows(torch.full((rank.world_size, 1), rank.rank), [1, 1], [1, 1])
        assert rows.flatten().tolist() == [0, 1]
        if rank.rank != ODD:
            with raises(PeerTimeoutError, TIMED_OUT.format(0, 2, "rank 1")):
                collectives.numbers(1, HOST)


@pytest.mark.parametrize("odd", ["comes late", "never comes", "leaves"])
@on_ranks(3, pool="cpu_pool")
def test_ranks_come_together_before_their_gpus_are_connected(rank: Rank, odd: str) -> None:
    """Clocks of ranks on one machine agree."""
    collectives = collectives_of(None, TIMEOUT_SECONDS if odd == "never comes" else PLENTY_SECONDS)
    here = rank.rank != ODD
    if odd == "comes late":
        time.sleep(0 if here else LATE_SECONDS)
        began = time.monotonic()
        collectives._connect()
        times: list[Any] = [None] * rank.world_size
        dist.all_gather_object(times, (began, time.monotonic()))
        assert max(began for began, _ in times) <= min(ended for _, ended in times)
    elif odd == "never comes":
        # The two that come, come at once.
        if here:
            collectives._status_store.arrive()
        dist.barrier()
        if here:
            with raises(PeerTimeoutError, TIMED_OUT.format(rank.rank, 3, "rank 1")):
                collectives._connect()
    elif here:
        with raises(PeerLostError, "rank 1 left (ValueError: no data)"):
            collectives._connect()
    else:
        # A report of an earlier wait does not count as coming.
        collectives._report()
        time.sleep(LATE_SECONDS)
        collectives.leave("ValueError: no data")


def test_every_place_has_a_tag_of_its_own_and_is_read_back() -> None:
    """Steps beyond the bits of a tag count from 0. Two ranks at one tag, where one has written, the other read."""
    steps, calls = (1, 2, 2**31, 2**32 - 1), (0, 1, 2**CALL_BITS - 1)
    places = product(steps, calls, set(Phase) - {Phase.UNKNOWN}, (False, True))
    tags = [SyncTag(step=Step(number=n, call=call), phase=phase, backward=b) for n, call, phase, b in places]
    numbers = [number for tag in tags for number in (tag.tag, after_write(tag.tag))]
    assert len(set(numbers)) == 2 * len(tags)
    # No lowered flag, none of another kind, and none that an int64 of a kernel cuts off.
    assert all(2**32 < number < 2**63 for number in numbers)
    for tag in tags:
        assert SyncTag.decode(tag.tag) == SyncTag.decode(after_write(tag.tag)) == tag
    many = SyncTag(step=Step(number=2**32 + 7, call=5), phase=Phase.ROUTER)
    wrapped = SyncTag.decode(many.tag)
    assert wrapped == SyncTag(step=Step(number=7, call=5), phase=Phase.ROUTER)
    assert all("unknown" in str(SyncTag.decode(number)) for number in (5, 31 << 32, -1))
    words = "rank 1 came to phase router of step 7 at another barrier: one rank came to the barrier after its write"
    assert mismatch(wrapped, 1, wrapped).startswith(words)
