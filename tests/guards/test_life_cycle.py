"""The life of an ExpertParallel: nothing is left of it, one that is not closed warns, and two do not mix."""

import gc
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from backends import both_backends
from lives import TOKENS, TOP_K, layer_of, planned, warned
from new_group import own_process_group
from on_ranks import on_ranks
from promises import promise
from same import assert_same_bits
from torch.distributed import _symmetric_memory as symmetric_memory

import sonic_ep
from sonic_ep import ClosedError, EPConfig, ExpertParallel
from sonic_ep.errors import CollectiveMismatchError, PeerError, PeerLostError
from sonic_ep.testing import Rank, assert_bitwise

ODD = 1
# The whole device's memory can be counted where no other tests run beside these.
ALONE_ON_GPUS = "PYTEST_XDIST_WORKER" not in os.environ
PAGE_BYTES = 2 * 2**20
LIVES = 200
# All have a barrier; of so many one plans, and of so many one runs a layer, forward and backward.
PLANNING, WORKING = 10, 100
# What is made once is made by then.
FIRST_LIVES = 3


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """What a process holds: file descriptors, threads, maps of shared files, bytes on the GPU, objects by type."""

    descriptors: int
    threads: int
    maps: int
    allocated: int
    used: int
    objects: Counter

    @staticmethod
    def now(device: torch.device) -> "Holdings":
        gc.collect()
        gpu = device.type == "cuda"
        free, total = torch.cuda.mem_get_info(device) if gpu else (0, 0)
        return Holdings(
            descriptors=len(os.listdir("/proc/self/fd")),
            threads=len(os.listdir("/proc/self/task")),
            maps=Path("/proc/self/maps").read_text().count("/dev/shm/"),
            allocated=torch.cuda.memory_allocated(device) if gpu else 0,
            used=total - free,
            objects=Counter(type(thing).__name__ for thing in gc.get_objects()),
        )


# What PyTorch keeps of every rendezvous of symmetric memory on the GPU: two tables of addresses, a block each.
KEPT_BYTES = 2 * 512


@promise("close")
@both_backends
@on_ranks(2)
def test_two_hundred_lives_leave_nothing(rank: Rank, backend: str) -> None:
    def live(number: int) -> None:
        with ExpertParallel(backend=backend, max_tokens_per_rank=TOKENS) as ep:
            ep.meet(rank.device)
            if number % PLANNING == 0:
                planned(ep, rank)
            if number % WORKING == 0:
                ep.moe(*layer_of(rank), TOP_K).y.sum().backward()

    for _ in range(FIRST_LIVES):
        live(0)
        first = Holdings.now(rank.device)
    rendezvous, kept = symmetric_memory.rendezvous, 0

    def counted(*arguments: object, **options: object) -> object:
        nonlocal kept
        kept += KEPT_BYTES
        return rendezvous(*arguments, **options)

    with mock.patch.object(symmetric_memory, "rendezvous", counted):
        for number in range(LIVES):
            live(number)
    last = Holdings.now(rank.device)
    assert (last.descriptors, last.threads, last.maps) == (first.descriptors, first.threads, 0)
    assert first.maps == 0
    assert last.allocated == first.allocated + kept
    if ALONE_ON_GPUS:
        assert last.used - first.used <= kept + PAGE_BYTES
    # A few objects of Python's and Triton's own caches come and go, but none for every life or plan.
    assert {name: n for name, n in (last.objects - first.objects).items() if n >= LIVES // PLANNING} == {}


@promise("close")
@both_backends
@on_ranks(2)
def test_what_is_forgotten_warns_and_its_graph_lives_on(rank: Rank, backend: str) -> None:
    """An object freed without close() warns if it holds memory; the functional form does not, nor does close()."""
    leaves = layer_of(rank)
    with ExpertParallel(backend=backend) as ep:
        out = ep.moe(*leaves, TOP_K)
        expected = torch.autograd.grad(out.y.square().sum(), leaves, retain_graph=True)
    with pytest.raises(ClosedError, match=f"rank {rank.rank} of 2: this ExpertParallel is closed: make a new one"):
        out.y.sum().backward()
    with warned() as functional:
        y = sonic_ep.moe(*leaves, TOP_K, backend=backend).y
    assert_bitwise(y.detach(), out.y.detach())
    with warned() as freed:
        ep = ExpertParallel(backend=backend)
        later = ep.moe(*leaves, TOP_K).y
        del ep
    with ExpertParallel(backend=backend) as other:
        # What is given back here may not be what the graphs need.
        planned(other, rank)
    for graph in (y, later):
        assert_same_bits(torch.autograd.grad(graph.square().sum(), leaves), expected)
    words = f"rank {rank.rank} of 2: this ExpertParallel was not closed: call close(), or use it in a with"
    assert (functional, freed) == ([], [words] if backend == "fast" else [])


@on_ranks(2, pool="cpu_pool")
def test_a_rank_that_left_by_an_error_is_named_with_it(rank: Rank) -> None:
    with own_process_group(rank) as group:
        ep = ExpertParallel(group, backend="reference")

        def use() -> None:
            with ep:
                planned(ep, rank)
                if rank.rank == ODD:
                    raise KeyError("labels")
                planned(ep, rank)

        words = "rank 0 of 2: rank 1 left \\(KeyError: 'labels'\\) while it was waited for in"
        expected = {"match": "labels"} if rank.rank == ODD else {"match": words}
        with pytest.raises(KeyError if rank.rank == ODD else PeerLostError, **expected):
            use()
        with pytest.raises(ClosedError):
            planned(ep, rank)


@both_backends
@on_ranks(2)
def test_two_objects_of_one_group_take_turns(rank: Rank, backend: str) -> None:
    configs = (EPConfig(dispatch="all_to_all", combine="rank_dedup"), EPConfig(redispatch_x_in_backward=True))
    alone = []
    for seed, config in enumerate(configs):
        with ExpertParallel(backend=backend, config=config) as ep:
            leaves = layer_of(rank, seed)
            y = ep.moe(*leaves, TOP_K).y
            alone.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    first, second = (ExpertParallel(backend=backend, config=config) for config in configs)
    with first, second:
        for order in ((0, 1), (1, 0)):
            layers = [layer_of(rank, seed) for seed in range(2)]
            outs = [ep.moe(*leaves, TOP_K).y for ep, leaves in zip((first, second), layers, strict=True)]
            planned(first, rank)
            for number in order:
                found = [outs[number].detach(), *torch.autograd.grad(outs[number].square().sum(), layers[number])]
                assert_same_bits(found, alone[number])
                planned(second, rank)


@pytest.mark.parametrize("order", ["made", "called", "called later"])
@both_backends
@on_ranks(2, pool="cpu_pool")
def test_another_order_of_objects_is_found(rank: Rank, backend: str, order: str) -> None:
    """Also when both hold their memory: each rank then waits in that of another. The group stays usable."""
    odd = rank.rank == ODD
    bounds = (4, 4) if order != "made" else (4, 5) if odd else (5, 4)
    timeout = 1.0 if order == "called later" else 60.0
    made = [ExpertParallel(backend=backend, max_tokens_per_rank=bound, timeout=timeout) for bound in bounds]
    if order == "called later":
        for ep in made:
            planned(ep, rank)
    calls = sorted(made, key=lambda ep: ep._max_tokens) if order == "made" else made[::-1] if odd else made

    def call_both() -> None:
        for ep in calls:
            planned(ep, rank)

    error = PeerError if order == "called later" else CollectiveMismatchError
    with pytest.raises(error, match=f"rank {rank.rank} of 2: .*rank {1 - rank.rank} "):
        call_both()
    for ep in made:
        with suppress(PeerError):
            ep.close()
    dist.barrier()
    with ExpertParallel(backend=backend) as later:
        assert planned(later, rank) == [2] * rank.world_size


@promise("close")
@pytest.mark.fast
@on_ranks(2, pool="cpu_pool")
def test_close_gives_memory_back_while_a_graph_lives(rank: Rank) -> None:
    before = Holdings.now(rank.device).maps
    ep = ExpertParallel(backend="fast", max_tokens_per_rank=TOKENS)
    y = ep.moe(*layer_of(rank), TOP_K).y
    assert Holdings.now(rank.device).maps > before
    ep.close()
    assert Holdings.now(rank.device).maps == before
    assert y.requires_grad
