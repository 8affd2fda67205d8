"""Measured bandwidth of the link and of memory: every transfer is checked, and where there is no link nothing is."""

from collections.abc import Callable
from dataclasses import astuple
from unittest.mock import Mock

import pytest
import torch
from on_ranks import on_ranks

import sonic_ep.profiler.bandwidth as bandwidth
from sonic_ep.cost import LinkBandwidth
from sonic_ep.distributed.group import EPGroup, resolve_group
from sonic_ep.profiler.agreement import gathered
from sonic_ep.profiler.bandwidth import measured_bandwidth, memory_rate
from sonic_ep.testing import Rank

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


def test_nothing_is_measured_without_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured_bandwidth(ALONE, GPU, 2**20) is None
    assert measured_bandwidth(PAIR, CPU, 2**20) is None
    unavailable = Mock(return_value=("GPUs cannot map each other's memory",))
    monkeypatch.setattr(bandwidth, "unavailable_reasons", unavailable)
    assert measured_bandwidth(PAIR, GPU, 2**20) is None
    unavailable.assert_called_once_with("fast", PAIR)


@on_ranks(2, pool="cuda_pool")
def test_bandwidth_of_the_link_is_that_of_every_rank(rank: Rank) -> None:
    group = resolve_group(None)
    found = measured_bandwidth(group, rank.device, 2**26, rounds=5)
    assert found is not None
    assert gathered(group, found) == [found] * 2
    assert all(1e9 < rate < 1e13 for rate in astuple(found))


@pytest.mark.fast
@on_ranks(2, 3)
def test_every_transfer_over_the_link_brings_what_was_sent(rank: Rank) -> None:
    from sonic_ep.fast.workspace import Workspace
    from sonic_ep.profiler.link_kernels import ENGINE_COPIES, KERNEL_COPIES, Link, link_bandwidth

    workspace, asked = Workspace(resolve_group(None), rank.device), []

    def two_seconds(transfer: Callable[[], None]) -> float:
        transfer()
        workspace.barrier_after_write()
        asked.append(transfer)
        return 2.0

    rate = LINK_BYTES / 2
    found = link_bandwidth(workspace, LINK_BYTES, two_seconds)
    assert found == LinkBandwidth(copy_engine_in=rate, copy_engine_out=rate, read=rate, write=rate)
    assert len(asked) == 2 * len(ENGINE_COPIES) + 2 * len(KERNEL_COPIES)
    name = f"rank {rank.rank} of {rank.world_size}: link: "
    for nbytes in (0, 1000):
        with pytest.raises(ValueError, match=f"{name}got {nbytes} bytes, expected a multiple of 32768"):
            Link(workspace, nbytes)
    link, sender = Link(workspace, LINK_BYTES), (rank.rank + 1) % rank.world_size
    # Nothing was moved.
    with pytest.raises(AssertionError, match=f"{name}nothing at all: what arrived is not what rank {sender} sent"):
        link.check(sender, "nothing at all")
    workspace.close()
