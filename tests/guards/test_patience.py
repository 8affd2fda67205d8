"""How long ranks wait for each other, and what an error says about the rank that has not come."""

import subprocess
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from backends import both_backends
from lives import TOP_K, layer_of
from on_ranks import on_ranks
from promises import promise

from sonic_ep import ExpertParallel
from sonic_ep.distributed.collectives import TIMEOUT_SECONDS, BoundedCollectives
from sonic_ep.distributed.group import EPGroup
from sonic_ep.distributed.process_identity import STARTED, ProcessIdentity
from sonic_ep.distributed.sync_tag import Phase, Step, SyncTag
from sonic_ep.errors import PeerLostError, PeerTimeoutError
from sonic_ep.testing import Rank

HERE = SyncTag(step=Step(number=3), phase=Phase.DISPATCH)
OWN = ProcessIdentity.own()
LATE_SECONDS = 90


@promise("patience")
@on_ranks(2, pool="cpu_pool")
def test_the_timeout_is_that_of_the_process_group(rank: Rank) -> None:
    """Unless another is given; and the one of old where nobody knows."""
    group = dist.new_group(timeout=timedelta(seconds=33))
    for given, seconds in ((None, 33.0), (7, 7.0)):
        with ExpertParallel(group, backend="reference", timeout=given) as ep:
            assert ep._collectives.timeout == seconds
    dist.destroy_process_group(group)
    assert BoundedCollectives(EPGroup(rank=0, world_size=1)).timeout == TIMEOUT_SECONDS


def test_whether_a_process_is_alive() -> None:
    """Also one that nobody has waited for, one whose number another process has by now, and on another machine."""
    assert OWN.machine is not None
    assert OWN.has_died() is False
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[STARTED]
        other = replace(OWN, pid=process.pid, started=started)
        assert other.has_died() is False
        assert replace(other, started="1").has_died() is True
        process.kill()
        while not other.has_died():
            time.sleep(0.01)
        assert process.returncode is None
    assert other.has_died() is True
    for machine in ("another", None):
        assert replace(OWN, machine=machine).has_died() is None


@promise("patience")
def test_the_error_says_what_is_known_of_the_rank() -> None:
    collectives = BoundedCollectives(EPGroup(rank=0, world_size=4), timeout=2)
    collectives.know({1: OWN, 2: replace(OWN, pid=7, started="1", machine="another")})
    waited = "rank 0 of 4: waited 2 s for rank {} in phase dispatch of step 3: "
    alive, unknown, untold = (collectives.late([rank], HERE) for rank in (1, 2, 3))
    assert {type(error) for error in (alive, unknown, untold)} == {PeerTimeoutError}
    busy = f"rank 1 (process {OWN.pid}) is alive, so busy (saving, compiling) or in another call: a larger timeout"
    assert str(alive).startswith(waited.format(1) + busy)
    for rank, error in ((2, unknown), (3, untold)):
        assert str(error) == f"{waited.format(rank)}whether rank {rank} is alive is not known, as on another machine"
    collectives.know({1: replace(OWN, started="1")})
    died = collectives.late([1, 3], HERE)
    assert type(died) is PeerLostError
    assert f"ranks 1, 3 in phase dispatch of step 3: rank 1 (process {OWN.pid}) has died; whether rank 3" in str(died)


@promise("patience")
@both_backends
@on_ranks(2, pool="cpu_pool")
def test_errors_of_kernels_and_collectives_name_the_process(rank: Rank, backend: str) -> None:
    """Ranks have told their processes as they made the object."""
    other, numbers = 1 - rank.rank, [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    with ExpertParallel(backend=backend) as ep:
        dist.all_gather(numbers, torch.tensor([ProcessIdentity.own().pid]))
        error = ep._collectives.late([other], HERE)
        if backend == "fast":
            from sonic_ep.fast.device_errors import wait_error
            from sonic_ep.fast.sync import TIME_UP

            error = wait_error(torch.tensor([TIME_UP.value, other + 1, HERE.tag, 0]), ep._collectives)
        process = numbers[other].item()
        words = f"s for rank {other} in phase dispatch of step 3: rank {other} (process {process}) is alive, so busy"
        assert words in str(error)
        dist.barrier()


@promise("patience")
@pytest.mark.thorough
@both_backends
@on_ranks(2)
def test_a_rank_that_saves_for_90_seconds_is_waited_for(rank: Rank, backend: str) -> None:
    """By default, between forward and backward and before a call; the job goes on."""
    leaves = layer_of(rank)
    with ExpertParallel(backend=backend) as ep:
        expected = torch.autograd.grad(ep.moe(*leaves, TOP_K).y.sum(), leaves)
        for before in (True, False):
            if before and rank.rank == 1:
                time.sleep(LATE_SECONDS)
            y = ep.moe(*leaves, TOP_K).y
            if not before and rank.rank == 1:
                time.sleep(LATE_SECONDS)
            found = torch.autograd.grad(y.sum(), leaves)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
