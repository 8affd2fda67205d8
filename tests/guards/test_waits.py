"""Host collectives end in time, whatever becomes of the other ranks, and name the rank that was missing."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from new_group import collectives_of_a_new_group, new_group, raises
from on_ranks import on_ranks
from promises import promise

from sonic_ep.distributed.collectives import ANNOUNCE_SECONDS, GRACE_SECONDS, HOST, BoundedCollectives
from sonic_ep.distributed.group import EPGroup, resolve_group
from sonic_ep.distributed.rank_status import ANSWER_SECONDS, RankStatus, StatusStore
from sonic_ep.distributed.sync_tag import Phase, Step, SyncTag
from sonic_ep.errors import CollectiveMismatchError, PeerLostError, PeerTimeoutError
from sonic_ep.testing import Rank, RankPool

ODD = 1
TIMEOUT_SECONDS = 0.5
# Long enough for the others to look who is missing.
LATE_SECONDS = 1.2 * ANNOUNCE_SECONDS
PLENTY_SECONDS = 60.0
TIMED_OUT = "rank {} of 3: waited 0.5 s for {} in phase exchange of step 7; did it fail, or make another call?"


@on_ranks(3, pool="cpu_pool")
def test_a_rank_that_comes_in_time_is_waited_for(rank: Rank) -> None:
    """It comes when the others have reported that they wait. To have waited before does not count as coming."""
    with new_group(rank, PLENTY_SECONDS) as collectives:
        if rank.rank == ODD:
            deadline = time.monotonic() + PLENTY_SECONDS
            while len(statuses := collectives._status_store.statuses()) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert {status.text for status in statuses.values()} == {"phase exchange of step 7"}
        assert collectives.numbers(10 * rank.rank, HOST) == [0, 10, 20]
        assert collectives.numbers(rank.rank, HOST) == [0, 1, 2]
        collectives.timeout = TIMEOUT_SECONDS
        if rank.rank != 0:
            with raises(PeerTimeoutError, TIMED_OUT.format(rank.rank, "rank 0")):
                collectives.numbers(1, HOST)


@promise("bounded-waits")
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("absent", "named", "grace"), [((1,), "rank 1", 0), ((0, 1), "ranks 0, 1", GRACE_SECONDS)])
@on_ranks(3, pool="cpu_pool")
def test_ranks_that_do_not_come_are_named(rank: Rank, absent: tuple, named: str, grace: float, rows: bool) -> None:
    with new_group(rank, TIMEOUT_SECONDS) as collectives:
        if rank.rank not in absent:
            with raises(PeerTimeoutError, TIMED_OUT.format(rank.rank, named), within=TIMEOUT_SECONDS + grace):
                if rows:
                    collectives.all_to_all_rows(torch.ones(3, 2), [1, 1, 1], [1, 1, 1])
                collectives.numbers(1, HOST)


@on_ranks(2, pool="cpu_pool")
def test_a_late_rank_hears_that_the_others_are_gone(rank: Rank) -> None:
    with new_group(rank, TIMEOUT_SECONDS) as collectives:
        error, words = PeerTimeoutError, "rank 0 of 2: waited 0.5 s for rank 1 in phase exchange"
        if rank.rank == ODD:
            time.sleep(TIMEOUT_SECONDS + ANNOUNCE_SECONDS / 2)
            error, words = PeerLostError, "rank 1 of 2: lost a rank that is not known, waited for in phase exchange"
        with raises(error, words):
            collectives.numbers(1, HOST)


@promise("lost-rank")
@pytest.mark.parametrize(("reported", "gone"), [(True, False), (True, True), (False, True)])
@on_ranks(3, pool="cpu_pool")
def test_a_rank_that_left_is_named_before_the_time_is_up(rank: Rank, reported: bool, gone: bool) -> None:
    """With its error, if it has reported that. gone: its connections are closed, as at the end of its process."""
    collectives = collectives_of_a_new_group(rank, PLENTY_SECONDS)
    if rank.rank == ODD:
        if reported:
            time.sleep(0.2)
            collectives.leave("KeyError: 'labels'")
        if gone:
            dist.destroy_process_group(collectives.group.process_group)
        return
    said = "rank 1 left (KeyError: 'labels') while it was waited for" if reported else "lost rank 1, waited for"
    within = ANNOUNCE_SECONDS if reported else GRACE_SECONDS
    with raises(PeerLostError, f"rank {rank.rank} of 3: {said} in phase exchange of step 7", within=within):
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


@on_ranks(3, pool="cpu_pool")
def test_objects_and_rows_of_unlike_sizes(rank: Rank) -> None:
    with new_group(rank, PLENTY_SECONDS) as collectives:
        here = collectives.sync_tag
        for size in (0, 1, 1000):
            mine = {"rank": rank.rank, "text": "x" * size * rank.rank}
            found = collectives.objects(mine, Phase.CHECK)
            assert found == [{"rank": other, "text": "x" * size * other} for other in range(rank.world_size)]
            assert collectives.sync_tag == here
        rows = torch.arange(3 * rank.rank).view(-1, 1)
        received = collectives.all_to_all_rows(rows, [rank.rank] * rank.world_size, list(range(rank.world_size)))
        assert received.flatten().tolist() == [o * rank.rank + i for o in range(rank.world_size) for i in range(o)]
        assert collectives.all_gather(torch.zeros(0, 3)).shape == (rank.world_size, 0, 3)


@on_ranks(2, pool="cpu_pool")
def test_two_objects_of_one_group_do_not_read_each_others_statuses(rank: Rank) -> None:
    group = resolve_group(dist.new_group(list(range(rank.world_size))))
    gone, going = BoundedCollectives(group), BoundedCollectives(group)
    assert (gone.object_number, going.object_number) == (0, 1)
    gone.leave("closed early")
    time.sleep(LATE_SECONDS if rank.rank == ODD else 0)
    assert going.numbers(rank.rank, HOST) == [0, 1]


class StoreThatFalls(dist.Store):
    """Answers at first, and then no more."""

    def __init__(self) -> None:
        super().__init__()
        self.fallen = False

    def add(self, key: str, amount: int) -> int:
        return amount

    def _answer(self, *_: object) -> Any:
        assert self.fallen
        time.sleep(PLENTY_SECONDS)

    check = get = set = _answer


@promise("silent-store")
@on_ranks(3, pool="cpu_pool")
def test_a_store_that_does_not_answer_is_not_waited_for(rank: Rank) -> None:
    with new_group(rank, TIMEOUT_SECONDS) as collectives:
        store = StoreThatFalls()
        collectives._status_store = StatusStore(collectives.group, store)
        store.fallen = True
        holder = "rank 0 of the world (which holds the store of the process group, and does not answer)"
        if rank.rank != ODD:
            with raises(PeerTimeoutError, f"waited 0.5 s for {holder} in phase exchange", within=0.5 + ANSWER_SECONDS):
                collectives.numbers(1, HOST)


@promise("lost-rank")
@on_ranks(3, pool="cpu_pool")
def test_a_rank_that_finds_out_stays_until_the_others_know(rank: Rank) -> None:
    """The first to find out waits until another, whose timeout is longer, has read of it and left."""
    with new_group(rank, TIMEOUT_SECONDS if rank.rank == 0 else PLENTY_SECONDS) as collectives:
        if rank.rank != ODD:
            with raises(PeerTimeoutError if rank.rank == 0 else PeerLostError, f"rank {ODD}"):
                collectives.numbers(1, HOST)
        if rank.rank == 0:
            assert collectives._status_store.statuses()[2].left
        if rank.rank == 2:
            collectives.leave("read of it")


def found_out_by_another(rank: Rank) -> None:
    """The first rank reports that the odd one is missing; the last reads it while it waits."""
    collectives = collectives_of_a_new_group(rank, PLENTY_SECONDS)
    if rank.rank == 0:
        collectives._status_store.report(RankStatus(collectives=1, left=False, text="timed out", lost=(ODD,)))
    if rank.rank == rank.world_size - 1:
        words = f"rank 2 of 3: lost rank {ODD}, waited for in phase exchange of step 7: rank 0 timed out"
        with raises(PeerLostError, words, within=PLENTY_SECONDS / 2):
            collectives.numbers(0, HOST)


def test_what_another_rank_has_found_out_is_believed(cpu_pool: RankPool) -> None:
    cpu_pool.run(found_out_by_another, world_size=3)
    cpu_pool.stop()


@promise("lost-rank")
@on_ranks(2, pool="cpu_pool")
def test_what_fails_as_it_begins_is_told_like_what_fails_later(rank: Rank) -> None:
    """The process group raises at once: the peer is lost; but memory is this rank's own."""
    with new_group(rank, TIMEOUT_SECONDS) as collectives:

        def fail(error: RuntimeError) -> dist.Work:
            raise error

        if rank.rank == ODD:
            with pytest.raises(torch.OutOfMemoryError):
                collectives._run(lambda *_: fail(torch.OutOfMemoryError("2 GiB")), torch.zeros(1))
            collectives.leave("no memory")
        dist.barrier()
        if rank.rank != ODD:
            collectives._begun += 1
            with raises(PeerLostError, "rank 0 of 2: rank 1 left (no memory) while it was waited for"):
                collectives._run(lambda *_: fail(RuntimeError("connection reset")), torch.zeros(1))


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
            with raises(PeerTimeoutError, "rank 0 of 2: waited 0.5 s for rank 1 in phase exchange", within=1.5):
                collectives.numbers(1, HOST)


@pytest.mark.parametrize(("late", "patience"), [(LATE_SECONDS, PLENTY_SECONDS), (0.0, PLENTY_SECONDS), (None, 0.5)])
@on_ranks(3, pool="cpu_pool")
def test_ranks_come_together_before_their_gpus_are_connected(rank: Rank, late: float | None, patience: float) -> None:
    """The odd rank comes late, or in time, or never."""
    collectives = collectives_of_a_new_group(rank, patience)
    if rank.rank != ODD and late is None:
        with raises(PeerTimeoutError, TIMED_OUT.format(rank.rank, "rank 1"), within=patience):
            collectives._connect()
    elif late is not None:
        time.sleep(late if rank.rank == ODD else 0)
        began = time.monotonic()
        collectives._connect()
        assert (time.monotonic() - began > LATE_SECONDS / 2) == (rank.rank != ODD and late > 0)


@on_ranks(2, pool="cpu_pool")
def test_a_rank_that_left_has_not_come_to_connect_and_nor_has_one_that_reported(rank: Rank) -> None:
    """Reports of an earlier wait do not count; a rank that left is named with its error."""
    collectives = collectives_of_a_new_group(rank, PLENTY_SECONDS)
    if rank.rank == ODD:
        collectives._report()
        time.sleep(LATE_SECONDS)
        collectives.leave("ValueError: no data")
    else:
        with raises(PeerLostError, "rank 1 left (ValueError: no data)", within=PLENTY_SECONDS):
            collectives._connect()


def test_alone_nobody_is_waited_for() -> None:
    collectives = BoundedCollectives(EPGroup(rank=0, world_size=1), timeout=TIMEOUT_SECONDS)
    assert collectives.numbers(5, HOST) == [5]
    assert collectives.objects("mine", Phase.MEMORY) == ["mine"]
    collectives.leave("nobody reads it")
