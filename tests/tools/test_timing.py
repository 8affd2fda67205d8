"""Times over all ranks, rates under their ceilings, and the ceilings themselves."""

from functools import partial
from time import sleep

import pytest
import torch
import torch.distributed as dist

from sonic_ep.distributed.group import EPGroup, resolve_group
from sonic_ep.testing import Rank, RankPool
from sonic_ep.testing.timing import (
    AboveCeilingError,
    Captured,
    Ceiling,
    Timing,
    captured,
    keep_busy,
    measure,
    slowest_rank,
)

ALONE = EPGroup(rank=0, world_size=1)
CPU = torch.device("cpu")
SLOW, BRIEF = 0.03, 0.002
LINK_BYTES = 32768


def test_a_round_takes_as_long_as_its_slowest_rank() -> None:
    timing = slowest_rank([[1.0, 9.0, 2.0, 4.0], [3.0, 1.0, 2.0, 5.0]])
    assert timing.rounds == (3.0, 9.0, 2.0, 5.0)
    assert timing.median == 4.0


def test_quantiles() -> None:
    timing = Timing(rounds=tuple(float(number) for number in (50, 10, 30, 20, 40)))
    assert [timing.quantile(share) for share in (0.0, 0.1, 0.5, 0.9, 1.0)] == [10.0, 14.0, 30.0, 46.0, 50.0]
    assert Timing(rounds=(7.0,)).quantile(0.9) == 7.0


def test_ranks_that_measured_different_rounds_are_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        slowest_rank([[1.0, 2.0], [1.0]])


def test_a_share_of_the_ceiling() -> None:
    ceiling = Ceiling(name="the read ceiling", bytes_per_second=200e9)
    assert ceiling.share_of(100e9, 1.0, "work") == 0.5
    assert ceiling.share_of(203e9, 1.0, "work") == pytest.approx(1.015)


def test_a_rate_above_the_ceiling_is_an_error_that_names_both() -> None:
    ceiling = Ceiling(name="the read ceiling", bytes_per_second=200e9)
    with pytest.raises(AboveCeilingError, match=r"dispatch: got 205\.0 GB/s.*200\.0 GB/s \(the read ceiling\)"):
        ceiling.share_of(205e9, 1.0, "dispatch")


def test_what_enters_a_round_is_not_timed() -> None:
    calls: list[str] = []

    def enter() -> None:
        calls.append("enter")
        sleep(SLOW)

    timing = measure(partial(calls.append, "work"), rounds=3, warmup=2, device=CPU, group=ALONE, enter=enter)
    assert calls == ["enter", "work"] * 5
    assert len(timing.rounds) == 3
    assert timing.quantile(1.0) < SLOW


def test_no_rounds_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"rank 0 of 1: rounds: got 0, expected at least 1"):
        measure(lambda: None, rounds=0, warmup=0, device=CPU, group=ALONE, enter=lambda: None)


def timed_with_one_slow_rank(rank: Rank) -> Timing:
    """The last rank is slow, in the work and not in the meeting."""
    seconds = SLOW if rank.rank == rank.world_size - 1 else BRIEF
    group = resolve_group(None)
    return measure(lambda: sleep(seconds), rounds=3, warmup=1, device=CPU, group=group, enter=dist.barrier)


def test_all_ranks_get_the_time_of_the_slow_one(cpu_pool: RankPool) -> None:
    timings = cpu_pool.run(timed_with_one_slow_rank, world_size=3)
    assert timings[0] == timings[1] == timings[2]
    assert min(timings[0].rounds) >= SLOW


def timed_on_the_stream(rank: Rank) -> tuple[Timing, bool]:
    """A few kernels in a graph, entered over shared memory behind a spin; and whether the graph ran."""
    from sonic_ep.fast.workspace import Workspace

    workspace = Workspace(resolve_group(None), rank.device)
    numbers = torch.zeros(1000, device=rank.device)
    replayed = captured(lambda: numbers.add_(1), rank.device)
    assert isinstance(replayed, Captured)

    def enter() -> None:
        keep_busy(rank.device)
        workspace.barrier_before_write()

    before = float(numbers[0])
    timing = measure(replayed, rounds=4, warmup=1, device=rank.device, group=workspace.group, enter=enter)
    workspace.close()
    return timing, float(numbers[0]) == before + 5


@pytest.mark.fast
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices")
def test_graphs_are_timed_by_events(pool: RankPool, request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["pool"] == "cpu":
        pytest.skip("graphs need a GPU")
    answers = pool.run(timed_on_the_stream, world_size=2)
    assert answers[0] == answers[1]
    timing, ran = answers[0]
    assert ran
    # The spin of a millisecond before each round is not part of it.
    assert 0 < timing.median < 0.5e-3


def test_nothing_to_keep_busy_on_the_cpu() -> None:
    keep_busy(CPU)


def ceilings_of_counted_transfers(rank: Rank) -> tuple[object, int]:
    """Ceilings by a stopwatch that runs a transfer once and says 2 seconds; and how often it was asked."""
    from sonic_ep.fast.link import link_ceilings
    from sonic_ep.fast.workspace import Workspace

    workspace = Workspace(resolve_group(None), rank.device)
    asked = []

    def stopwatch(transfer: object) -> float:
        transfer()
        workspace.barrier_after_write()
        asked.append(transfer)
        return 2.0

    ceilings = link_ceilings(workspace, LINK_BYTES, stopwatch)
    workspace.close()
    return ceilings, len(asked)


@pytest.mark.fast
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_transfer_over_the_link_brings_what_was_sent(pool: RankPool, world_size: int) -> None:
    from sonic_ep.cost import LinkCeilings
    from sonic_ep.fast.link import LAUNCHES, STREAMS

    rate = LINK_BYTES / 2
    expected = LinkCeilings(copy_engine_in=rate, copy_engine_out=rate, read=rate, write=rate)
    for ceilings, asked in pool.run(ceilings_of_counted_transfers, world_size=world_size):
        assert ceilings == expected
        assert asked == 2 * len(STREAMS) + 2 * len(LAUNCHES)


@pytest.mark.fast
def test_one_rank_has_no_link(cpu_pool: RankPool) -> None:
    assert cpu_pool.run(ceilings_of_counted_transfers, world_size=1) == [(None, 0)]


def transfers_that_fail(rank: Rank) -> list[str]:
    """What is said of a transfer that brought nothing, and of sizes that no launch fits."""
    from sonic_ep.fast.link import Link
    from sonic_ep.fast.workspace import Workspace

    workspace = Workspace(resolve_group(None), rank.device)
    said = []
    for nbytes in (0, 1000):
        with pytest.raises(ValueError, match="expected a multiple of") as refused:
            Link(workspace, nbytes)
        said.append(str(refused.value))
    with pytest.raises(AssertionError, match="what arrived is not what") as wrong:
        Link(workspace, LINK_BYTES).expect_next("nothing at all")
    workspace.close()
    return [*said, str(wrong.value)]


@pytest.mark.fast
def test_a_transfer_that_brings_something_else_is_an_error(cpu_pool: RankPool) -> None:
    said = cpu_pool.run(transfers_that_fail, world_size=2)[1]
    assert said[0] == "rank 1 of 2: link: got 0 bytes, expected a multiple of 32768"
    assert said[2] == "rank 1 of 2: link: nothing at all: what arrived is not what rank 0 sent"
