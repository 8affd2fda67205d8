"""The life of an ExpertParallel: nothing is left of it, two do not mix, and a forked process keeps off."""

import gc
import os
import weakref
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from backends import both_backends
from lives import TOKENS, TOP_K, layer_of, planned, said_in_child, warned
from on_ranks import on_ranks
from programs import run_program
from promises import promise
from same import assert_same_bits
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory

import sonic_ep
from sonic_ep import ClosedError, EPConfig, ExpertParallel
from sonic_ep.errors import CollectiveMismatchError, PeerError
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


def held_by_process(device: torch.device) -> tuple[int, int, int, int]:
    """File descriptors, threads, and bytes on the GPU: of this process, and used in all."""
    gc.collect()
    gpu = device.type == "cuda"
    free, total = torch.cuda.mem_get_info(device) if gpu else (0, 0)
    descriptors, threads = (len(os.listdir(f"/proc/self/{folder}")) for folder in ("fd", "task"))
    return descriptors, threads, torch.cuda.memory_allocated(device) if gpu else 0, total - free


def shared_maps() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("/dev/shm/")


# What PyTorch keeps of every rendezvous of symmetric memory on the GPU: two tables of addresses, a block each.
KEPT_BYTES = 2 * 512


@promise("close")
@pytest.mark.parametrize("backend", ["fast", pytest.param("reference", marks=pytest.mark.thorough)])
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
        *first, allocated, used = held_by_process(rank.device)
        objects = Counter(type(thing).__name__ for thing in gc.get_objects())
    rendezvous, kept = symmetric_memory.rendezvous, 0

    def counted(*arguments: object, **options: object) -> object:
        nonlocal kept
        kept += KEPT_BYTES
        return rendezvous(*arguments, **options)

    with mock.patch.object(symmetric_memory, "rendezvous", counted):
        for number in range(LIVES):
            live(number)
    *last, allocated_last, used_last = held_by_process(rank.device)
    assert (last, shared_maps()) == (first, 0)
    assert allocated_last == allocated + kept
    if ALONE_ON_GPUS:
        assert used_last - used <= kept + PAGE_BYTES
    new = Counter(type(thing).__name__ for thing in gc.get_objects()) - objects
    # A few objects of Python's and Triton's own caches come and go, but none for every life or plan.
    assert {name: n for name, n in new.items() if n >= LIVES // PLANNING} == {}


@promise("close")
@both_backends
@on_ranks(2)
def test_what_is_forgotten_warns_and_its_graph_lives_on(rank: Rank, backend: str) -> None:
    """An object freed without close() warns if it holds memory, and no other. close() frees it though a graph lives."""
    leaves, before = layer_of(rank), shared_maps()
    with ExpertParallel(backend=backend) as ep:
        out = ep.moe(*leaves, TOP_K)
        expected = torch.autograd.grad(out.y.square().sum(), leaves, retain_graph=True)
        assert (shared_maps() > before) == (backend == "fast" and rank.device.type == "cpu")
    assert shared_maps() == before
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


@on_ranks(2)
def test_two_objects_of_one_group_take_turns(rank: Rank) -> None:
    layers = [layer_of(rank, seed) for seed in range(2)]
    configs = (EPConfig(dispatch="all_to_all", combine="rank_dedup"), EPConfig(redispatch_x_in_backward=True))
    first, second = made = [ExpertParallel(backend="reference", config=config) for config in configs]

    def forward(number: int) -> Tensor:
        return made[number].moe(*layers[number], TOP_K).y

    def with_gradients(number: int, y: Tensor) -> list[Tensor]:
        return [y.detach(), *torch.autograd.grad(y.square().sum(), layers[number])]

    with first, second:
        alone = [with_gradients(number, forward(number)) for number in range(2)]
        for order in ((0, 1), (1, 0)):
            outs = [forward(number) for number in range(2)]
            planned(first, rank)
            for number in order:
                assert_same_bits(with_gradients(number, outs[number]), alone[number])
                planned(second, rank)


@pytest.mark.parametrize("order", ["made", "called", "called later"])
@both_backends
@on_ranks(2, pool="cpu_pool")
def test_another_order_of_objects_is_found(rank: Rank, backend: str, order: str) -> None:
    """Also when both hold their memory: each rank then waits in that of another. The group stays usable."""
    odd = rank.rank == ODD
    bounds = (4, 4) if order != "made" else (4, 5) if odd else (5, 4)
    made = [ExpertParallel(backend=backend, max_tokens_per_rank=bound) for bound in bounds]
    for ep in made if order == "called later" else ():
        planned(ep, rank)
        # Nothing but the end of its time ends such a wait.
        ep._collectives.timeout = 1.0
    calls = sorted(made, key=lambda ep: ep._max_tokens.most) if order == "made" else made[::-1] if odd else made

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


AT_EXIT = """
import os, sys, torch, sonic_ep

def planned(ep):
    return ep.plan(torch.tensor([[0], [1]]), 2).counts.tolist()

layer = (torch.ones(2, 8), torch.ones(2, 8), torch.ones(2, 8, 8), torch.ones(2, 8, 4), 1)
made = [sonic_ep.ExpertParallel(backend=backend) for backend in ("reference", "fast")]
y = sonic_ep.moe(*layer, backend="fast").y
assert [planned(ep) for ep in made] == [[1, 1], [1, 1]]
child = os.fork()
if child == 0:
    sys.exit(0)
print("child ended with", os.waitpid(child, 0)[1], flush=True)
assert [planned(ep) for ep in made] == [[1, 1], [1, 1]]
"""


@promise("close")
@pytest.mark.fast
def test_what_is_left_open_at_exit_warns_in_the_process_that_made_it(tmp_path: Path) -> None:
    """Once: not for what holds nothing, and not in a child that was forked."""
    ((code, said),) = run_program(tmp_path, AT_EXIT, [])
    assert code == 0, said
    assert said.count("ResourceWarning: rank 0 of 1: this ExpertParallel was not closed: call close()") == 1
    assert "child ended with 0" in said


@promise("one-call")
@both_backends
@on_ranks(2, pool="cpu_pool")
def test_a_forked_process_keeps_off(rank: Rank, backend: str) -> None:
    """In children the object is used, closed, freed and called backward through; the parent goes on."""
    with ExpertParallel(backend=backend, max_tokens_per_rank=TOKENS) as ep:
        assert planned(ep, rank) == [2] * rank.world_size
        leaves = layer_of(rank)
        y = ep.moe(*leaves, TOP_K).y
        expected = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)

        def used_and_freed() -> None:
            with warned() as said:
                try:
                    with ep:
                        planned(ep, rank)
                except RuntimeError as error:
                    raise RuntimeError(f"{error}{said}") from None

        for use in (used_and_freed, ep.close, y.sum().backward):
            said = said_in_child(use)
            assert said.startswith(f"rank {rank.rank} of 2: got a call in process CHILD, forked from "), said
            assert said.removesuffix("[]").endswith("cannot be inherited, make one in this process")
            assert planned(ep, rank) == [2] * rank.world_size
        # No child has reported that this rank is gone.
        assert ep._collectives._status_store.statuses() == {}
        assert_same_bits(torch.autograd.grad(y.square().sum(), leaves), expected)


def lost_gpu(_: object) -> None:
    raise RuntimeError("CUDA error: device-side assert triggered")


def ended_workspace(rank: Rank, how: str) -> tuple[weakref.ref[Any], weakref.ref[Any]]:
    """What holds the shared memory of an object that has ended, and the errors of its kernels' waits."""
    x, *weights = layer_of(rank)
    ep = ExpertParallel(backend="fast")
    if how == "freed with its graph":
        ep.release_with_last_user()
    y = ep.moe(x, *weights, TOP_K).y
    (workspace,) = (context.workspace for context in ep._backend._contexts.values())  # type: ignore[attr-defined]
    found = weakref.ref(workspace), weakref.ref(workspace.wait_errors)
    y.sum().backward()
    if how == "closed":
        ep.close()
    elif how == "lost":
        with mock.patch.object(type(workspace), "synchronize", lost_gpu), suppress(RuntimeError), ep:
            y.sum().item()
            lost_gpu(ep)
    return found


@pytest.mark.fast
@promise("close")
@pytest.mark.parametrize("how", ["closed", "freed with its graph", "lost"])
@on_ranks(1, 2)
def test_shared_memory_needs_no_garbage_collector(rank: Rank, how: str) -> None:
    """Else it would stay for long; and what a kernel's failed wait has left to print, where a process just ends."""
    gc.collect()
    gc.disable()
    try:
        found = ended_workspace(rank, how)
        assert [held() for held in found] == [None, None]
    finally:
        gc.enable()
