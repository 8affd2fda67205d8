"""Meetings before a round, stopwatches, and the rates of links and memories."""

from collections.abc import Callable
from time import sleep

import pytest
import torch

import sonic_ep.ceilings as module
from sonic_ep.ceilings import WARMUP, measured_ceilings, meeting, memory_rate, stopwatch
from sonic_ep.cost import LinkCeilings
from sonic_ep.distributed.group import EPGroup, resolve_group
from sonic_ep.testing import Rank, RankPool
from sonic_ep.testing.timing import BUSY_SECONDS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ALONE, PAIR = EPGroup(rank=0, world_size=1), EPGroup(rank=0, world_size=2)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What a meeting does, in order: how long a device is kept busy, and where ranks meet."""
    order: list[object] = []
    monkeypatch.setattr(module, "keep_busy", lambda device, seconds: order.append((device, seconds)))
    return order


def test_the_device_is_busy_before_ranks_meet(done: list[object]) -> None:
    enter = meeting(lambda: done.append("fence"), GPU, ahead=True, busy_seconds=0.25)
    assert done == []
    enter()
    enter()
    assert done == [(GPU, 0.25), "fence"] * 2
    done.clear()
    meeting(lambda: done.append("fence"), GPU, ahead=True)()
    assert done == [(GPU, BUSY_SECONDS), "fence"]


def test_the_device_is_not_busy_where_nobody_gets_ahead(done: list[object]) -> None:
    meeting(lambda: done.append("fence"), GPU, ahead=False)()
    assert done == ["fence"]


def test_a_stopwatch_tells_the_median_behind_its_meetings() -> None:
    calls: list[str] = []
    takes = iter([0.0] * 3 + [0.08, 0.005, 0.02])

    def work() -> None:
        calls.append("work")
        sleep(next(takes))

    def slow_fence() -> None:
        calls.append("fence")
        sleep(0.1)

    seconds = stopwatch(slow_fence, CPU, ALONE, rounds=3)(work)
    # As many rounds warm up, and no more than usual.
    assert calls == ["fence", "work"] * 6
    assert 0.02 <= seconds < 0.08
    calls.clear()
    stopwatch(lambda: calls.append("fence"), CPU, ALONE, rounds=WARMUP + 1)(lambda: None)
    assert len(calls) == 2 * WARMUP + 1


def test_a_copy_is_read_and_written() -> None:
    def two_seconds(copy: Callable[[], None]) -> float:
        copy()
        return 2.0

    assert memory_rate(CPU, two_seconds, 400) == 400.0
    with pytest.raises(AssertionError, match="not what was copied"):
        memory_rate(CPU, lambda copy: 2.0, 400)


def test_there_are_no_ceilings_without_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured_ceilings(ALONE, GPU, 2**20) is None
    assert measured_ceilings(PAIR, CPU, 2**20) is None
    asked: list[tuple[str, EPGroup]] = []

    def unavailable(backend: str, group: EPGroup) -> tuple[str, ...]:
        asked.append((backend, group))
        return ("GPUs cannot map each other's memory",)

    monkeypatch.setattr(module, "unavailable_reasons", unavailable)
    assert measured_ceilings(PAIR, GPU, 2**20) is None
    assert asked == [("fast", PAIR)]


def ceilings_on(rank: Rank) -> LinkCeilings | None:
    return measured_ceilings(resolve_group(None), rank.device, 2**26, rounds=5)


def test_ceilings_of_the_link_are_those_of_every_rank(cuda_pool: RankPool) -> None:
    found, others = cuda_pool.run(ceilings_on, world_size=2)
    assert found == others
    assert found is not None
    rates = (found.copy_engine_in, found.copy_engine_out, found.read, found.write)
    assert all(1e9 < rate < 1e13 for rate in rates)
