"""What ranks in trouble tell arrives however they end, and what debugs PyTorch is no wait of its own."""

import time

import pytest
import torch
import torch.distributed as dist
from waits_of import waits_of_a_new_group

from sonic_ep.distributed.collectives import ANNOUNCE_SECONDS, HOST
from sonic_ep.errors import PeerError, PeerLostError, PeerTimeoutError
from sonic_ep.testing import Rank, RankPool

ODD = 1
TIMEOUT_SECONDS = 0.5
PLENTY_SECONDS = 60.0
# A busy machine's.
SLACK_SECONDS = 3.0
HERE = torch.zeros(1)


def with_pytorchs_checks(rank: Rank) -> tuple[list[int], str, float]:
    """Ranks that meet, and then one that does not come, in a group that PyTorch compares before each collective."""
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        collectives = waits_of_a_new_group(rank, TIMEOUT_SECONDS)
    finally:
        dist.set_debug_level(level)
    group = collectives.group.process_group
    assert hasattr(group._get_backend(torch.device("cpu")), "wrapped_pg")
    met = collectives.numbers(rank.rank, HOST)
    rows = collectives.all_to_all_rows(torch.full((rank.world_size, 1), rank.rank), [1, 1], [1, 1])
    assert rows.flatten().tolist() == met
    began, said = time.monotonic(), ""
    if rank.rank != ODD:
        with pytest.raises(PeerTimeoutError) as raised:
            collectives.numbers(1, HOST)
        said = str(raised.value)
    took = time.monotonic() - began
    dist.barrier()
    dist.destroy_process_group(group)
    return met, said, took


def test_pytorchs_own_checks_do_not_wait_by_their_own_clock(cpu_pool: RankPool) -> None:
    (met, said, took), _ = cpu_pool.run(with_pytorchs_checks, world_size=2)
    assert met == [0, 1]
    assert said.startswith("rank 0 of 2: waited 0.5 s for rank 1 in phase meeting of step 0")
    assert took < TIMEOUT_SECONDS + ANNOUNCE_SECONDS + SLACK_SECONDS


def memory_short_at_launch(rank: Rank) -> str:
    """What a process group raises when a collective is begun: lost, with the reason; but memory is this rank's own."""
    collectives = waits_of_a_new_group(rank, TIMEOUT_SECONDS)

    def begin(error: RuntimeError) -> dist.Work:
        raise error

    if rank.rank == ODD:
        with pytest.raises(torch.OutOfMemoryError):
            collectives._finish(lambda: begin(torch.OutOfMemoryError("2 GiB")), HERE)
        collectives.leave("no memory")
    dist.barrier()
    if rank.rank == ODD:
        return ""
    collectives._collectives += 1
    with pytest.raises(PeerLostError) as raised:
        collectives._finish(lambda: begin(RuntimeError("connection reset")), HERE)
    return str(raised.value)


def test_what_fails_as_it_begins_is_told_like_what_fails_later(cpu_pool: RankPool) -> None:
    said, _ = cpu_pool.run(memory_short_at_launch, world_size=2)
    assert said.startswith("rank 0 of 2: rank 1 left (no memory) while it was waited for in phase meeting of step 0")


def leaves_and_closes_its_connections(rank: Rank) -> tuple[str, float]:
    """As a program that ends of an error does: what it has told comes before that it is gone."""
    collectives = waits_of_a_new_group(rank, PLENTY_SECONDS)
    dist.barrier()
    began, said = time.monotonic(), ""
    if rank.rank == ODD:
        time.sleep(0.2)
        collectives.leave("KeyError: 'labels'")
        dist.destroy_process_group(collectives.group.process_group)
    else:
        with pytest.raises(PeerLostError) as raised:
            collectives.numbers(1, HOST)
        said = str(raised.value)
    return said, time.monotonic() - began


def test_a_rank_that_left_and_is_gone_is_named_with_its_error(cpu_pool: RankPool) -> None:
    said, took = cpu_pool.run(leaves_and_closes_its_connections, world_size=2)[0]
    assert took < ANNOUNCE_SECONDS + SLACK_SECONDS
    assert said.startswith("rank 0 of 2: rank 1 left (KeyError: 'labels') while it was waited for in phase")


def stays_for_others(rank: Rank) -> bool:
    """The first to find out who is missing waits until another, that has more time, has heard of it and left."""
    collectives = waits_of_a_new_group(rank, TIMEOUT_SECONDS if rank.rank == 0 else PLENTY_SECONDS)
    dist.barrier()
    there = True
    if rank.rank != ODD:
        with pytest.raises(PeerError) as raised:
            collectives.numbers(1, HOST)
        assert raised.type is (PeerTimeoutError if rank.rank == 0 else PeerLostError)
    if rank.rank == 0:
        there = collectives._status_store.statuses()[2].left
    if rank.rank == 2:
        collectives.leave("heard of it")
    dist.barrier()
    return there


def test_who_finds_out_stays_until_the_others_know(cpu_pool: RankPool) -> None:
    assert cpu_pool.run(stays_for_others, world_size=3) == [True] * 3
