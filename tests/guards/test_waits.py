"""Host collectives end in time, whatever becomes of the other ranks, and name the rank that was missing."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from waits_of import waits_of_a_new_group

from sonic_ep.distributed.collectives import ANNOUNCE_SECONDS, GRACE_SECONDS, HOST, BoundedCollectives
from sonic_ep.distributed.group import EPGroup, resolve_group
from sonic_ep.distributed.rank_status import ANSWER_SECONDS, RankStatus, StatusStore
from sonic_ep.distributed.sync_tag import Phase, Step, SyncTag
from sonic_ep.errors import PeerError, PeerLostError, PeerTimeoutError
from sonic_ep.testing import Rank, RankPool

ODD = 1
TIMEOUT_SECONDS = 0.5
# Long enough for the others to look for who is missing.
LATE_SECONDS = 1.2 * ANNOUNCE_SECONDS
# A busy machine's.
SLACK_SECONDS = 3.0
PLENTY_SECONDS = 60.0
Trouble = Callable[[Rank, BoundedCollectives], Any]


def in_trouble(rank: Rank, trouble: Trouble, timeout: float) -> tuple[str, float]:
    """What a rank has to say of ``trouble``, and after how many seconds."""
    collectives = waits_of_a_new_group(rank, timeout)
    collectives.sync_tag = SyncTag(step=Step(number=7), phase=Phase.EXCHANGE)
    dist.barrier()
    began = time.monotonic()
    try:
        said = str(trouble(rank, collectives))
    except PeerError as error:
        said = f"{type(error).__name__}: {error}"
    took = time.monotonic() - began
    # Whoever destroys its group closes the connections that others still wait at.
    dist.barrier()
    dist.destroy_process_group(collectives.group.process_group)
    return said, took


def assert_said_by_others(pool: RankPool, trouble: Trouble, timeout: float, expected: str, *, within: float) -> None:
    """All but the odd one of three ranks say what is expected, of their own number, soon after ``within`` seconds."""
    for rank, (said, took) in enumerate(pool.run(in_trouble, trouble, timeout, world_size=3)):
        if rank != ODD:
            assert said == expected.format(rank)
            assert took < within + SLACK_SECONDS


def comes_late(rank: Rank, collectives: BoundedCollectives) -> list[int]:
    """When the others have long told that they wait."""
    deadline = time.monotonic() + PLENTY_SECONDS
    while rank.rank == ODD and len(collectives._status_store.statuses()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if rank.rank == ODD:
        assert {notice.text for notice in collectives._status_store.statuses().values()} == {"phase exchange of step 7"}
    return collectives.numbers(10 * rank.rank, HOST) + collectives.numbers(rank.rank, HOST)


def test_a_rank_that_comes_in_time_is_waited_for(cpu_pool: RankPool) -> None:
    for said, _ in cpu_pool.run(in_trouble, comes_late, PLENTY_SECONDS, world_size=3):
        assert said == "[0, 10, 20, 0, 1, 2]"


def stays_away_after_a_wait(rank: Rank, collectives: BoundedCollectives) -> str:
    """It has told that it waits in an earlier collective."""
    comes_late(rank, collectives)
    collectives.timeout = TIMEOUT_SECONDS
    if rank.rank != 0:
        collectives.numbers(1, HOST)
    return "met"


def test_that_a_rank_waited_before_does_not_count_as_coming(cpu_pool: RankPool) -> None:
    said = [said for said, _ in cpu_pool.run(in_trouble, stays_away_after_a_wait, PLENTY_SECONDS, world_size=3)]
    assert said[0] == "met"
    for rank in (1, 2):
        assert said[rank].startswith(f"PeerTimeoutError: rank {rank} of 3: waited 0.5 s for rank 0 in phase exchange")


def stays_away(rank: Rank, collectives: BoundedCollectives) -> str:
    if rank.rank == ODD:
        return ""
    collectives.numbers(1, HOST)
    return "met"


def stays_away_from_rows(rank: Rank, collectives: BoundedCollectives) -> str:
    if rank.rank == ODD:
        return ""
    collectives.all_to_all_rows(torch.ones(3, 2), [1, 1, 1], [1, 1, 1])
    return "met"


@pytest.mark.parametrize("trouble", [stays_away, stays_away_from_rows])
def test_a_rank_that_does_not_come_is_named(cpu_pool: RankPool, trouble: Trouble) -> None:
    expected = (
        "PeerTimeoutError: rank {} of 3: waited 0.5 s for rank 1 in phase exchange of step 7; "
        "did it fail, or make another call?"
    )
    # Those that wait tell each other so, and take no longer than that.
    assert_said_by_others(cpu_pool, trouble, TIMEOUT_SECONDS, expected, within=TIMEOUT_SECONDS)


def only_one_comes(rank: Rank, collectives: BoundedCollectives) -> str:
    return stays_away(rank, collectives) if rank.rank == 2 else ""


def test_all_that_do_not_come_are_named(cpu_pool: RankPool) -> None:
    said, took = cpu_pool.run(in_trouble, only_one_comes, TIMEOUT_SECONDS, world_size=3)[2]
    assert "waited 0.5 s for ranks 0, 1 in phase exchange of step 7" in said
    assert took < TIMEOUT_SECONDS + GRACE_SECONDS + SLACK_SECONDS


def comes_when_all_have_given_up(rank: Rank, collectives: BoundedCollectives) -> str:
    if rank.rank == ODD:
        time.sleep(TIMEOUT_SECONDS + ANNOUNCE_SECONDS / 2)
    return str(collectives.numbers(1, HOST))


def test_a_rank_that_comes_too_late_hears_that_the_others_are_gone(cpu_pool: RankPool) -> None:
    said, _ = cpu_pool.run(in_trouble, comes_when_all_have_given_up, TIMEOUT_SECONDS, world_size=2)[ODD]
    assert said.startswith("PeerLostError: rank 1 of 2: lost a rank that is not known, waited for in phase exchange")


def leaves(rank: Rank, collectives: BoundedCollectives) -> str:
    if rank.rank == ODD:
        collectives.leave("KeyError: 'labels'")
        return ""
    collectives.numbers(1, HOST)
    return "met"


def test_a_rank_that_left_is_named_with_its_error_before_the_time_is_up(cpu_pool: RankPool) -> None:
    expected = (
        "PeerLostError: rank {} of 3: rank 1 left (KeyError: 'labels') while it was waited for in "
        "phase exchange of step 7"
    )
    assert_said_by_others(cpu_pool, leaves, PLENTY_SECONDS, expected, within=ANNOUNCE_SECONDS)


def leaves_after_its_part(rank: Rank, collectives: BoundedCollectives) -> list[int]:
    """It has done all that the others wait for, and left before they look."""
    if rank.rank == ODD:
        gathered = collectives.group.process_group.allgather(  # type: ignore[union-attr]
            [[torch.zeros(2, dtype=torch.int64) for _ in range(rank.world_size)]],
            [torch.tensor([collectives.sync_tag.tag, 5])],
        )
        collectives._collectives += 1
        collectives.leave("no error of the others'")
        gathered.wait()
        return [5, 5, 5]
    if rank.rank == 2:
        time.sleep(LATE_SECONDS)
    return collectives.numbers(5, HOST)


def test_a_rank_that_left_after_its_part_harms_nobody(cpu_pool: RankPool) -> None:
    for said, _ in cpu_pool.run(in_trouble, leaves_after_its_part, PLENTY_SECONDS, world_size=3):
        assert said == "[5, 5, 5]"


def closes_its_connections(rank: Rank, collectives: BoundedCollectives) -> str:
    """As the end of its process does."""
    if rank.rank == ODD:
        dist.destroy_process_group(collectives.group.process_group)
        return ""
    collectives.numbers(1, HOST)
    return "met"


def lost(rank: Rank) -> tuple[str, float]:
    collectives = waits_of_a_new_group(rank, PLENTY_SECONDS)
    dist.barrier()
    began = time.monotonic()
    try:
        said = closes_its_connections(rank, collectives)
    except PeerLostError as error:
        said = str(error)
    return said, time.monotonic() - began


def test_a_rank_that_is_gone_is_named_by_all(cpu_pool: RankPool) -> None:
    for rank, (said, took) in enumerate(cpu_pool.run(lost, world_size=3)):
        if rank != ODD:
            assert said.startswith(f"rank {rank} of 3: lost rank {ODD}, waited for in phase meeting of step 0: ")
            assert took < GRACE_SECONDS + SLACK_SECONDS


def strays(rank: Rank, collectives: BoundedCollectives) -> list[int]:
    if rank.rank == ODD:
        collectives.sync_tag = SyncTag(step=Step(number=6), phase=Phase.ROUTER, backward=True)
    return collectives.numbers(1, HOST)


def talks_of_something_else(rank: Rank, collectives: BoundedCollectives) -> str:
    """The caller's own exchange of two numbers, over the same group."""
    if rank.rank == ODD:
        two = torch.tensor([3, 4])
        dist.all_gather([torch.empty_like(two) for _ in range(3)], two, group=collectives.group.process_group)
        return ""
    return str(collectives.numbers(1, HOST))


@pytest.mark.parametrize(
    ("trouble", "place"),
    [(strays, "phase backward (router) of step 6"), (talks_of_something_else, "phase unknown of step 3")],
)
def test_a_rank_that_came_from_elsewhere_is_named_with_both_places(
    cpu_pool: RankPool, trouble: Trouble, place: str
) -> None:
    said = [said for said, _ in cpu_pool.run(in_trouble, trouble, PLENTY_SECONDS, world_size=3)]
    for rank in (0, 2):
        assert said[rank].startswith(
            f"CollectiveMismatchError: rank {rank} of 3: rank {ODD} came to {place}, expected phase exchange of step 7"
        )
    if trouble is strays:
        assert said[ODD].startswith(
            f"CollectiveMismatchError: rank {ODD} of 3: rank 0 came to phase exchange of step 7"
        )


def objects_of_unlike_sizes(rank: Rank) -> None:
    """Also after another call has been refused, and of objects that pickle to less or more than before."""
    collectives = waits_of_a_new_group(rank, PLENTY_SECONDS)
    collectives.sync_tag = here = SyncTag(step=Step(number=2), phase=Phase.DISPATCH)
    for size in (0, 1, 1000):
        mine = {"rank": rank.rank, "text": "x" * size * rank.rank}
        found = collectives.objects(mine, Phase.CHECK)
        assert found == [{"rank": other, "text": "x" * size * other} for other in range(rank.world_size)]
        assert collectives.sync_tag == here
    rows = torch.arange(3 * rank.rank).view(-1, 1)
    splits = [rank.rank] * rank.world_size
    received = collectives.all_to_all_rows(rows, splits, list(range(rank.world_size)))
    assert received.flatten().tolist() == [o * rank.rank + i for o in range(rank.world_size) for i in range(o)]
    assert collectives.all_gather(torch.zeros(0, 3)).shape == (rank.world_size, 0, 3)


def test_objects_and_rows_of_unlike_sizes(cpu_pool: RankPool) -> None:
    cpu_pool.run(objects_of_unlike_sizes, world_size=3)


def two_of_one_group(rank: Rank) -> list[int]:
    """One has told that it leaves; the other goes on, and waits long enough to look."""
    group = resolve_group(dist.new_group(list(range(rank.world_size))))
    left, going = BoundedCollectives(group), BoundedCollectives(group)
    assert (left.object_number, going.object_number) == (0, 1)
    left.leave("closed early")
    if rank.rank == ODD:
        time.sleep(LATE_SECONDS)
    return going.numbers(rank.rank, HOST)


def test_two_of_one_group_do_not_read_each_others_notices(cpu_pool: RankPool) -> None:
    assert cpu_pool.run(two_of_one_group, world_size=2) == [[0, 1]] * 2


class StoreThatFalls(dist.Store):
    """Answers at first, and then no more: as long as the ranks had nothing to say, nobody knew."""

    def __init__(self) -> None:
        super().__init__()
        self.fallen = False

    def add(self, key: str, amount: int) -> int:
        return amount

    def _answer(self, *_: object) -> Any:
        assert self.fallen
        time.sleep(PLENTY_SECONDS)

    check = get = set = _answer


def without_a_store(rank: Rank, collectives: BoundedCollectives) -> str:
    store = StoreThatFalls()
    collectives._status_store = StatusStore(collectives.group, store)
    store.fallen = True
    return stays_away(rank, collectives)


def test_a_store_that_does_not_answer_is_not_waited_for(cpu_pool: RankPool) -> None:
    for rank, (said, took) in enumerate(cpu_pool.run(in_trouble, without_a_store, TIMEOUT_SECONDS, world_size=3)):
        if rank != ODD:
            assert said.startswith(
                f"PeerTimeoutError: rank {rank} of 3: waited 0.5 s for rank 0 of the world (which holds the store of "
                "the process group, and does not answer) in phase exchange of step 7"
            )
            assert took < TIMEOUT_SECONDS + ANSWER_SECONDS + SLACK_SECONDS


def told_by_another(rank: Rank) -> tuple[str, float]:
    """The first rank has found out that the odd one is missing, and the last one hears of it while it waits."""
    collectives, began = (
        BoundedCollectives(resolve_group(dist.new_group(list(range(rank.world_size)))), PLENTY_SECONDS),
        time.monotonic(),
    )
    said = ""
    if rank.rank == 0:
        collectives._status_store.tell(RankStatus(collectives=1, left=False, text="waited in vain", lost=(ODD,)))
    if rank.rank == rank.world_size - 1:
        with pytest.raises(PeerLostError) as raised:
            collectives.numbers(0, HOST)
        said = str(raised.value)
    return said, time.monotonic() - began


def test_what_another_rank_has_found_out_is_believed(cpu_pool: RankPool) -> None:
    said, took = cpu_pool.run(told_by_another, world_size=3)[-1]
    assert said == f"rank 2 of 3: lost rank {ODD}, waited for in phase meeting of step 0: rank 0 waited in vain"
    assert took < PLENTY_SECONDS
    cpu_pool.stop()


def before_gpus_are_connected(rank: Rank) -> list[tuple[str, float]]:
    """As before a first collective of GPUs: the odd rank comes late, is there the next time, and then does not come."""
    found, of_a_gpu = [], torch.empty(0, device="meta")
    for late, patience in ((LATE_SECONDS, PLENTY_SECONDS), (0, PLENTY_SECONDS), (PLENTY_SECONDS, TIMEOUT_SECONDS)):
        collectives = BoundedCollectives(resolve_group(None), patience)
        if rank.rank == ODD and late == PLENTY_SECONDS:
            break
        time.sleep(late if rank.rank == ODD else 0)
        began, said = time.monotonic(), ""
        try:
            collectives._come_together(of_a_gpu)
            # Once is enough.
            collectives._come_together(of_a_gpu)
        except PeerTimeoutError as error:
            said = str(error)
        found.append((said, time.monotonic() - began))
    return found


def test_ranks_come_together_before_their_gpus_are_connected(cpu_pool: RankPool) -> None:
    late, here, never = cpu_pool.run(before_gpus_are_connected, world_size=3)[0]
    assert (late[0], here[0]) == ("", "")
    assert late[1] > LATE_SECONDS / 2 > here[1]
    assert never[0].startswith(f"rank 0 of 3: waited {TIMEOUT_SECONDS:g} s for rank {ODD} in phase meeting of step 0")


def test_alone_nobody_is_waited_for() -> None:
    collectives = BoundedCollectives(EPGroup(rank=0, world_size=1), timeout=TIMEOUT_SECONDS)
    assert collectives.numbers(5, HOST) == [5]
    assert collectives.objects("mine", Phase.MEMORY) == ["mine"]
    collectives.leave("nobody hears")
