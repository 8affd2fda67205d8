"""Measured bandwidth of the link and of memory: every transfer is checked, and where there is no link nothing is."""

from collections.abc import Callable

import pytest
import torch

import sonic_ep.profiler.bandwidth as bandwidth
from sonic_ep.cost import LinkBandwidth
from sonic_ep.distributed.group import EPGroup, resolve_group
from sonic_ep.profiler.bandwidth import measured_bandwidth, memory_rate
from sonic_ep.testing import Rank, RankPool

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ALONE, PAIR = EPGroup(rank=0, world_size=1), EPGroup(rank=0, world_size=2)
LINK_BYTES = 32768


def test_a_copy_is_read_and_written() -> None:
    def two_seconds(copy: Callable[[], None]) -> float:
        copy()
        return 2.0

    assert memory_rate(CPU, two_seconds, 400) == 400.0
    with pytest.raises(AssertionError, match="the copy differs from its source"):
        memory_rate(CPU, lambda copy: 2.0, 400)


def test_there_are_no_ceilings_without_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured_bandwidth(ALONE, GPU, 2**20) is None
    assert measured_bandwidth(PAIR, CPU, 2**20) is None
    asked: list[tuple[str, EPGroup]] = []

    def unavailable(backend: str, group: EPGroup) -> tuple[str, ...]:
        asked.append((backend, group))
        return ("GPUs cannot map each other's memory",)

    monkeypatch.setattr(bandwidth, "unavailable_reasons", unavailable)
    assert measured_bandwidth(PAIR, GPU, 2**20) is None
    assert asked == [("fast", PAIR)]


def ceilings_on(rank: Rank) -> LinkBandwidth | None:
    return measured_bandwidth(resolve_group(None), rank.device, 2**26, rounds=5)


def test_ceilings_of_the_link_are_those_of_every_rank(cuda_pool: RankPool) -> None:
    found, others = cuda_pool.run(ceilings_on, world_size=2)
    assert found == others
    assert found is not None
    rates = (found.copy_engine_in, found.copy_engine_out, found.read, found.write)
    assert all(1e9 < rate < 1e13 for rate in rates)


def ceilings_of_counted_transfers(rank: Rank) -> tuple[object, int]:
    """Ceilings by a stopwatch that runs a transfer once and reports 2 seconds; and how often it was asked."""
    from sonic_ep.fast.workspace import Workspace
    from sonic_ep.profiler.link_kernels import link_bandwidth

    workspace = Workspace(resolve_group(None), rank.device)
    asked = []

    def stopwatch(transfer: Callable[[], None]) -> float:
        transfer()
        workspace.barrier_after_write()
        asked.append(transfer)
        return 2.0

    bandwidth = link_bandwidth(workspace, LINK_BYTES, stopwatch)
    workspace.close()
    return bandwidth, len(asked)


@pytest.mark.fast
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_transfer_over_the_link_brings_what_was_sent(pool: RankPool, world_size: int) -> None:
    from sonic_ep.profiler.link_kernels import ENGINE_COPIES, KERNEL_COPIES

    rate = LINK_BYTES / 2
    expected = LinkBandwidth(copy_engine_in=rate, copy_engine_out=rate, read=rate, write=rate)
    for bandwidth, asked in pool.run(ceilings_of_counted_transfers, world_size=world_size):
        assert bandwidth == expected
        assert asked == 2 * len(ENGINE_COPIES) + 2 * len(KERNEL_COPIES)


@pytest.mark.fast
def test_one_rank_has_no_link(cpu_pool: RankPool) -> None:
    assert cpu_pool.run(ceilings_of_counted_transfers, world_size=1) == [(None, 0)]


def transfers_that_fail(rank: Rank) -> list[str]:
    """The errors of a transfer that brought nothing, and of sizes that no configuration fits."""
    from sonic_ep.fast.workspace import Workspace
    from sonic_ep.profiler.link_kernels import Link

    workspace = Workspace(resolve_group(None), rank.device)
    errors = []
    for nbytes in (0, 1000):
        with pytest.raises(ValueError, match="expected a multiple of") as refused:
            Link(workspace, nbytes)
        errors.append(str(refused.value))
    with pytest.raises(AssertionError, match="what arrived is not what") as wrong:
        Link(workspace, LINK_BYTES).check(0, "nothing at all")
    workspace.close()
    return [*errors, str(wrong.value)]


@pytest.mark.fast
def test_a_transfer_that_brings_something_else_is_an_error(cpu_pool: RankPool) -> None:
    errors = cpu_pool.run(transfers_that_fail, world_size=2)[1]
    assert errors[0] == "rank 1 of 2: link: got 0 bytes, expected a multiple of 32768"
    assert errors[2] == "rank 1 of 2: link: nothing at all: what arrived is not what rank 0 sent"
