"""Ranks that go on after an error: together where they failed alike, and else told where the others are."""

import itertools
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from calls import call_of, memory_short, with_trained_experts

from sonic_ep import ExpertParallel
from sonic_ep.config import PeerError
from sonic_ep.testing import Rank, RankPool
from sonic_ep.waits import ANNOUNCE_SECONDS

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
                with pytest.MonkeyPatch.context() as patch:
                    if number == FAILING and rank.rank in failing:
                        counted = itertools.count(1)
                        for name in ("all_gather", "all_to_all_rows"):
                            patch.setattr(ep._waits, name, failing_at(nth, counted, getattr(ep._waits, name)))
                    losses.append(ep.moe(**arguments).y.sum())
            except torch.OutOfMemoryError:
                if goes_on == "backward":
                    losses[0].backward()
                if goes_on == "leaves" and rank.rank == ODD:
                    ep._waits.leave("KeyError: 'labels'")
                    return "left"
        # Longer than it takes the others to tell that they wait, and to look who is missing.
        time.sleep(1.5 * ANNOUNCE_SECONDS if rank.rank == ODD else 0)
        sum(losses).backward()
        return "went on"

    try:
        said = batches()
    except PeerError as error:
        said = f"{type(error).__name__}: {error}"
    dist.barrier()
    dist.destroy_process_group(group)
    return said


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
