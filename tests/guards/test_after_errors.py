"""Ranks that go on after an error: together where they failed alike, and else told where the others are."""

import itertools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from calls import call_of, memory_short, with_trained_experts
from waits_of import waits_of_a_new_group

from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.distributed.collectives import ANNOUNCE_SECONDS, HOST
from sonic_ep.distributed.rank_status import RankStatus
from sonic_ep.distributed.sync_tag import Step
from sonic_ep.errors import CollectiveMismatchError, PeerError
from sonic_ep.testing import Rank, RankPool

ODD = 1
# Of so many batches, ranks fail in this one.
BATCHES, FAILING = 4, 1


def fails_and_goes_on(rank: Rank, failing: list[int], nth: int, goes_on: str) -> str:
    """Ranks run out of memory in front of their ``nth`` collective, leave that batch out, and go on: with a backward of
    the batch before, with the next batch and a backward for which one rank is late, or not at all.
    """
    group = dist.new_group(list(range(rank.world_size)))
    ep = ExpertParallel(group, backend="reference", timeout=6.0)
    arguments = with_trained_experts(call_of(rank.world_size))

    def batches() -> str:
        losses = []
        for number in range(BATCHES):
            try:
                with memory_short_at(ep, nth, number == FAILING and rank.rank in failing):
                    losses.append(ep.moe(**arguments).y.sum())
            except torch.OutOfMemoryError:
                if goes_on == "backward":
                    losses[0].backward()
                if goes_on == "leaves" and rank.rank == ODD:
                    ep._collectives.leave("KeyError: 'labels'")
                    return "left"
        # Longer than it takes the others to tell that they wait, and to look who is missing.
        time.sleep(1.5 * ANNOUNCE_SECONDS if rank.rank == ODD else 0)
        sum(losses).backward()
        return "went on"

    return said_of(batches, group)


def said_of(work: Callable[[], str], group: dist.ProcessGroup) -> str:
    """What ``work`` says, or the error that ends it, in a ``group`` that nobody needs any more."""
    try:
        said = work()
    except PeerError as error:
        said = f"{type(error).__name__}: {error}"
    dist.barrier()
    dist.destroy_process_group(group)
    return said


@contextmanager
def memory_short_at(ep: ExpertParallel, nth: int, here: bool) -> Iterator[None]:
    """Memory runs out in front of the ``nth`` collective of this rank, if that is to be ``here``."""
    counted = itertools.count(1)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_to_all_rows") if here else ():
            patch.setattr(ep._collectives, name, failing_at(nth, counted, getattr(ep._collectives, name)))
        yield


def failing_at(nth: int, counted: Iterator[int], collective: Callable[..., Any]) -> Callable[..., Any]:
    def counting(*arguments: Any) -> Any:
        if next(counted) == nth:
            memory_short()
        return collective(*arguments)

    return counting


# Of a call that is not the first: the meeting of the plan, ids, meetings of dispatch and combine, scores, rows.
COLLECTIVES = range(1, 8)


@pytest.mark.parametrize("nth", COLLECTIVES)
@pytest.mark.parametrize("goes_on", ["call", "backward"])
def test_a_rank_that_goes_on_after_an_error_meets_nobody_by_mistake(cpu_pool: RankPool, goes_on: str, nth: int) -> None:
    """Each names the other with the step that it is in, whatever the others wait for meanwhile."""
    place = "phase exchange of step 3" if goes_on == "call" else r"phase backward \(dispatch\) of step 1"
    for rank, said in enumerate(cpu_pool.run(fails_and_goes_on, [ODD], nth, goes_on, world_size=2)):
        if rank == ODD:
            assert re.match(r"CollectiveMismatchError: rank 1 of 2: rank 0 is in phase \w+ of step 2, while", said)
            assert re.search(rf"left a step by an error and came to {place}", said)
        else:
            assert re.search(rf"rank 0 of 2: rank 1 left a step by an error and came to {place}", said)


def test_ranks_that_fail_alike_go_on_together(cpu_pool: RankPool) -> None:
    assert cpu_pool.run(fails_and_goes_on, [0, 1, 2], 4, "call", world_size=3) == ["went on"] * 3


def test_a_rank_that_left_after_an_error_is_named_at_once(cpu_pool: RankPool) -> None:
    found = cpu_pool.run(fails_and_goes_on, [0, 1], 4, "leaves", world_size=2)
    assert found[0].startswith("PeerLostError: rank 0 of 2: rank 1 left (KeyError: 'labels') while it was waited for")


def one_collective_apart(rank: Rank, ahead: int) -> str:
    """Both left a call by an error and came to the same meeting, but one had begun a collective in between."""
    collectives = waits_of_a_new_group(rank, 6.0)
    collectives.begin(Step(number=3))
    collectives.mark_failed()
    collectives._collectives += rank.rank == ahead
    # The other has told where it is by then.
    time.sleep(0.3 if rank.rank == ODD else 0)
    with pytest.raises(CollectiveMismatchError) as raised:
        collectives.numbers(rank.rank, HOST)
    dist.barrier()
    dist.destroy_process_group(collectives.group.process_group)
    return str(raised.value)


@pytest.mark.parametrize("ahead", [0, 1])
def test_ranks_at_one_meeting_after_unlike_collectives_are_told_at_once(cpu_pool: RankPool, ahead: int) -> None:
    for rank, said in enumerate(cpu_pool.run(one_collective_apart, ahead, world_size=2)):
        there = "phase meeting of step 3, after another number of collectives"
        assert said.startswith(f"rank {rank} of 2: rank {1 - rank} is in {there}, while this rank left a step")


def fails_in_backward(rank: Rank, nth: int) -> str:
    """A rank runs out of memory in front of the ``nth`` collective of a backward, and goes on with the next call."""
    group = dist.new_group(list(range(rank.world_size)))
    ep = ExpertParallel(group, backend="reference", timeout=6.0)
    arguments = with_trained_experts(call_of(rank.world_size))
    y = ep.moe(**arguments).y

    def steps() -> str:
        try:
            with memory_short_at(ep, nth, rank.rank == ODD):
                y.sum().backward()
        except torch.OutOfMemoryError:
            pass
        ep.moe(**arguments)
        return "went on"

    return said_of(steps, group)


# Of a backward for w1 alone: the meeting of dispatch, rows.
@pytest.mark.parametrize("nth", [1, 2])
def test_a_rank_whose_backward_failed_meets_nobody_by_mistake(cpu_pool: RankPool, nth: int) -> None:
    for rank, said in enumerate(cpu_pool.run(fails_in_backward, nth, world_size=2)):
        if rank == ODD:
            assert said.startswith(
                "CollectiveMismatchError: rank 1 of 2: rank 0 is in phase backward (dispatch) of step 1"
            )
            assert "left a step by an error and came to phase exchange of step 2" in said
        else:
            assert "rank 0 of 2: rank 1 left a step by an error and came to phase exchange of step 2" in said


def part_after_an_error(rank: Rank) -> str:
    return fails_and_goes_on(rank, [0, 1], 4, "backward" if rank.rank == ODD else "call")


def test_ranks_that_fail_alike_and_part_are_told_at_once(cpu_pool: RankPool) -> None:
    """Neither waits in a collective: both look for the other, at other meetings."""
    for rank, said in enumerate(cpu_pool.run(part_after_an_error, world_size=2)):
        assert said.startswith(f"CollectiveMismatchError: rank {rank} of 2: rank {1 - rank} is in phase ")


def run_again(rank: Rank, fails: bool, late: bool) -> tuple[str, torch.Tensor | None]:
    """One token of 8 bf16 a rank: 16 bytes, as the two numbers of a meeting."""
    torch.manual_seed(rank.rank)
    group = dist.new_group(list(range(rank.world_size)))
    ep = ExpertParallel(group, backend="reference", config=EPConfig(dispatch="all_gather"), timeout=6.0)
    arguments = call_of(rank.world_size, x=torch.randn(1, 8))
    arguments = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    w1 = with_trained_experts(arguments)["w1"]
    y = ep.moe(**arguments).y
    # Longer than it takes the other to tell that it waits.
    time.sleep(1.5 * ANNOUNCE_SECONDS if rank.rank == ODD and late else 0)

    def steps() -> str:
        try:
            with memory_short_at(ep, 2, rank.rank == ODD and fails):
                y.sum().backward()
        except torch.OutOfMemoryError:
            y.sum().backward()
        return "went on"

    return said_of(steps, group), w1.grad


@pytest.mark.parametrize("late", [False, True])
def test_a_backward_that_is_run_again_yields_no_wrong_number(cpu_pool: RankPool, late: bool) -> None:
    right = cpu_pool.run(run_again, False, False, world_size=2)
    found = cpu_pool.run(run_again, True, late, world_size=2)
    for (said, grad), (_, expected) in zip(found, right, strict=True):
        assert grad is None or torch.equal(grad, expected), said
    place = "phase backward (dispatch) of step 1, after another number of collectives"
    assert f"rank 0 of 2: rank 1 left a step by an error and came to {place}, expected it in phase" in found[0][0]
    assert f"rank 1 of 2: rank 0 is in {place}, while this rank left a step by an error" in found[1][0]


def met_after_an_error(rank: Rank) -> list[list[int]]:
    """What a rank told on its way back is still there when all have met, and again when all have failed alike."""
    collectives = waits_of_a_new_group(rank, 20.0)
    met = []
    for step in (1, 2):
        collectives.begin(Step(number=step))
        collectives.mark_failed()
        time.sleep(0.5 if rank.rank == ODD else 0)
        met.append(collectives.numbers(rank.rank, HOST))
        # Longer than it takes the others to look who is missing.
        time.sleep(1.5 * ANNOUNCE_SECONDS if rank.rank == ODD else 0)
        met.append(collectives.all_gather(torch.tensor(rank.rank)).tolist())
    dist.barrier()
    dist.destroy_process_group(collectives.group.process_group)
    return met


def test_what_was_told_before_all_have_met_counts_no_more(cpu_pool: RankPool) -> None:
    assert cpu_pool.run(met_after_an_error, world_size=3) == [[[0, 1, 2]] * 4] * 3


def waits_for_who_looks_for_a_third(rank: Rank) -> list[int]:
    """One waits at a meeting, another is back there from an error and looks for the third, that comes late."""
    collectives = waits_of_a_new_group(rank, 20.0)
    collectives.begin(Step(number=1))
    if rank.rank == ODD:
        collectives.mark_failed()
    time.sleep(1.5 * ANNOUNCE_SECONDS if rank.rank == 2 else 0)
    met = collectives.numbers(rank.rank, HOST)
    dist.barrier()
    dist.destroy_process_group(collectives.group.process_group)
    return met


def test_a_rank_that_is_about_to_come_is_waited_for(cpu_pool: RankPool) -> None:
    assert cpu_pool.run(waits_for_who_looks_for_a_third, world_size=3) == [[0, 1, 2]] * 3


def failing_alike_in_front(rank: Rank) -> list[int]:
    """All fail in front of one meeting after the other, and one of them is always late to come and late to look."""
    collectives = waits_of_a_new_group(rank, 20.0)
    tell = collectives._status_store.tell

    def tell_and_dawdle(notice: RankStatus) -> None:
        tell(notice)
        time.sleep(0.1)

    if rank.rank == ODD:
        collectives._status_store.tell = tell_and_dawdle
    for step in range(1, 6):
        collectives.begin(Step(number=step))
        collectives.mark_failed()
        time.sleep(0.05 if rank.rank == ODD else 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collectives, "all_gather", memory_short)
            with pytest.raises(torch.OutOfMemoryError):
                collectives.numbers(rank.rank, HOST)
    met = collectives.numbers(rank.rank, HOST)
    dist.barrier()
    dist.destroy_process_group(collectives.group.process_group)
    return met


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_fail_alike_again_and_again_go_on_together(cpu_pool: RankPool, world_size: int) -> None:
    assert cpu_pool.run(failing_alike_in_front, world_size=world_size) == [list(range(world_size))] * world_size


def interrupted_in_backward(rank: Rank) -> str:
    """Ctrl-C in the combine of a backward, which is then run again: what was sent in the first may still be there."""
    with ExpertParallel(backend="fast", timeout=20) as ep:
        plan = ep.plan(torch.tensor([[0], [1]]), 2)
        x = torch.ones(2, 8, requires_grad=True)
        rows = ep.dispatch(x, plan)
        (context,) = ep._backend._contexts.values()

        def interrupt(*arguments: object, **constants: object) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(context.workspace, "run_waiting", interrupt)
            with pytest.raises(KeyboardInterrupt):
                rows.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError) as raised:
            rows.sum().backward()
        # Its forward again, and the backward of that, are as ever.
        ep.dispatch(x, plan)[: plan.rows()].sum().backward()
        assert bool((x.grad == 1).all())
    return str(raised.value)


@pytest.mark.fast
def test_a_backward_that_an_error_has_ended_is_not_run_again(cpu_pool: RankPool) -> None:
    for rank, said in enumerate(cpu_pool.run(interrupted_in_backward, world_size=2)):
        assert said.startswith(f"rank {rank} of 2: step 2: got a backward again that an error has ended before")
