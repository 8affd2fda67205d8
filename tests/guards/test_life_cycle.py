"""The life of an ExpertParallel: nothing is left of it, forgotten ones warn, and two do not mix."""

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from backends import BACKENDS
from lives import TOKENS, TOP_K, layer_of, planned, warned

import sonic_ep
from sonic_ep import ClosedError, EPConfig, ExpertParallel
from sonic_ep.errors import CollectiveMismatchError, PeerError, PeerLostError
from sonic_ep.testing import Rank, RankPool, assert_bitwise

ODD = 1
# The whole device's memory can be counted where no other tests run beside these.
ALONE_ON_GPUS = "PYTEST_XDIST_WORKER" not in os.environ
PAGE_BYTES = 2 * 2**20
LIVES = 200
# All meet; of so many one makes a plan, and of so many one is a layer's, there and back.
PLANNING, WORKING = 10, 100
# Of lives before the count: what is made once is made by then.
FIRST_LIVES = 3
both_backends = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.fast if name == "fast" else ()) for name in BACKENDS]
)


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
            maps=Path("/proc/self/maps").read_text().count("/dev/shm/sonic_ep_"),
            allocated=torch.cuda.memory_allocated(device) if gpu else 0,
            used=total - free,
            objects=Counter(type(thing).__name__ for thing in gc.get_objects()),
        )


# What PyTorch keeps of every rendezvous of symmetric memory on the GPU: two tables of addresses, a block each.
KEPT_BYTES = 2 * 512


@contextmanager
def rendezvous_counted() -> Iterator[Counter]:
    """How many there are while this lasts, under the name of the function."""
    from sonic_ep.fast import workspace

    made: Counter = Counter()
    meet = workspace.symmetric_memory.rendezvous

    def counted(*arguments: object, **options: object) -> object:
        made[meet.__name__] += 1
        return meet(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace.symmetric_memory, "rendezvous", counted)
        yield made


def lived(rank: Rank, backend: str) -> tuple[Holdings, Holdings, int]:
    """What there is after the first lives, and after many; and how many rendezvous were made in between."""

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
    with rendezvous_counted() if backend == "fast" else nullcontext(Counter()) as made:
        for number in range(LIVES):
            live(number)
    return first, Holdings.now(rank.device), made.total()


@both_backends
def test_two_hundred_lives_leave_nothing(pool: RankPool, backend: str) -> None:
    for first, last, rendezvous in pool.run(lived, backend, world_size=2):
        assert last.descriptors == first.descriptors
        assert last.threads == first.threads
        assert last.maps == first.maps == 0
        assert last.allocated == first.allocated + rendezvous * KEPT_BYTES
        if ALONE_ON_GPUS:
            assert last.used - first.used <= rendezvous * KEPT_BYTES + PAGE_BYTES
        # A few objects of Python's and Triton's own caches come and go, but none for every life or plan.
        assert {name: n for name, n in (last.objects - first.objects).items() if n >= LIVES // PLANNING} == {}


def forgotten(rank: Rank, backend: str) -> tuple[list[str], list[str]]:
    """What is said of one that was let go without close(), and of the functional form; and their backwards."""
    leaves = layer_of(rank)
    with ExpertParallel(backend=backend) as ep:
        out = ep.moe(*leaves, TOP_K)
        expected = torch.autograd.grad(out.y.square().sum(), leaves)
    with warned() as functional:
        y = sonic_ep.moe(*leaves, TOP_K, backend=backend).y
    assert_bitwise(y.detach(), out.y.detach())
    with warned() as detach:
        ep = ExpertParallel(backend=backend)
        later = ep.moe(*leaves, TOP_K).y
        del ep
    with ExpertParallel(backend=backend) as other:
        # What is given back here may not be what the graphs need.
        planned(other, rank)
    for graph in (y, later):
        for found, grad in zip(torch.autograd.grad(graph.square().sum(), leaves), expected, strict=True):
            assert_bitwise(found, grad)
    return functional, detach


@both_backends
def test_what_is_forgotten_warns_and_its_graph_lives_on(pool: RankPool, backend: str) -> None:
    for rank, (functional, detach) in enumerate(pool.run(forgotten, backend, world_size=2)):
        assert functional == []
        said = f"rank {rank} of 2: ExpertParallel: got no close() before it was let go, expected one"
        assert detach == ([said] if backend == "fast" else [])


def left_by_an_error(rank: Rank) -> str:
    """One rank's ``with`` ends in an error; the other hears of it while it waits, and says so."""
    group = dist.new_group(list(range(rank.world_size)))
    ep = ExpertParallel(group, backend="reference")

    def use() -> None:
        with ep:
            planned(ep, rank)
            if rank.rank == ODD:
                raise KeyError("labels")
            planned(ep, rank)

    with pytest.raises((KeyError, PeerLostError)) as raised:
        use()
    with pytest.raises(ClosedError):
        planned(ep, rank)
    dist.barrier()
    dist.destroy_process_group(group)
    return f"{raised.type.__name__}: {raised.value}"


def test_a_rank_that_left_by_an_error_is_named_with_it(cpu_pool: RankPool) -> None:
    who, why = cpu_pool.run(left_by_an_error, world_size=2)
    assert who.startswith(
        "PeerLostError: rank 0 of 2: rank 1 left (KeyError: 'labels') while it was waited for in phase"
    )
    assert why == "KeyError: 'labels'"


def backward_of_a_closed_one(rank: Rank, backend: str) -> str:
    leaves = layer_of(rank)
    with ExpertParallel(backend=backend) as ep:
        y = ep.moe(*leaves, TOP_K).y
    with pytest.raises(ClosedError) as raised:
        y.sum().backward()
    return str(raised.value)


@both_backends
def test_a_backward_after_close_is_refused(pool: RankPool, backend: str) -> None:
    for rank, said in enumerate(pool.run(backward_of_a_closed_one, backend, world_size=2)):
        assert said == f"rank {rank} of 2: ExpertParallel: got a call or a backward after close(), expected none"


def interleaved(rank: Rank, backend: str) -> None:
    """Two objects of one group, calls and backwards in any order, against each alone."""
    configs = (EPConfig(dispatch="all_to_all", combine="rank_dedup"), EPConfig(redispatch_x_in_backward=True))
    alone = []
    for seed, config in enumerate(configs):
        with ExpertParallel(backend=backend, config=config) as ep:
            leaves = layer_of(rank, seed)
            y = ep.moe(*leaves, TOP_K).y
            alone.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    with (
        ExpertParallel(backend=backend, config=configs[0]) as first,
        ExpertParallel(backend=backend, config=configs[1]) as second,
    ):
        for order in ((0, 1), (1, 0)):
            layers = [layer_of(rank, seed) for seed in range(2)]
            outs = [ep.moe(*leaves, TOP_K).y for ep, leaves in zip((first, second), layers, strict=True)]
            planned(first, rank)
            for number in order:
                found = [outs[number].detach(), *torch.autograd.grad(outs[number].square().sum(), layers[number])]
                for got, expected in zip(found, alone[number], strict=True):
                    assert_bitwise(got, expected)
                planned(second, rank)


@both_backends
def test_two_objects_of_one_group_take_turns(pool: RankPool, backend: str) -> None:
    pool.run(interleaved, backend, world_size=2)


def made_in_another_order(rank: Rank, backend: str) -> str:
    bounds = (4, 5) if rank.rank == ODD else (5, 4)
    made = {bound: ExpertParallel(backend=backend, max_tokens_per_rank=bound) for bound in bounds}
    return said_of(made[4], made[5], rank)


def called_in_another_order(rank: Rank, backend: str) -> str:
    first, second = (ExpertParallel(backend=backend, max_tokens_per_rank=4) for _ in range(2))
    return said_of(*((second, first) if rank.rank == ODD else (first, second)), rank)


def called_in_another_order_later(rank: Rank, backend: str) -> str:
    """When both hold their memory: each rank then waits in that of another."""
    first, second = (ExpertParallel(backend=backend, max_tokens_per_rank=4, timeout=1.0) for _ in range(2))
    for ep in (first, second):
        planned(ep, rank)
    return said_of(*((second, first) if rank.rank == ODD else (first, second)), rank)


def said_of(first: ExpertParallel, second: ExpertParallel, rank: Rank) -> str:
    def call_both() -> None:
        for ep in (first, second):
            planned(ep, rank)

    with pytest.raises(PeerError) as raised:
        call_both()
    for ep in (first, second):
        try:
            ep.close()
        except PeerError:
            # A kernel of it has waited in vain.
            continue
    dist.barrier()
    with ExpertParallel(backend=first.backend) as later:
        assert planned(later, rank) == [2] * rank.world_size
    return f"{raised.type.__name__}: {raised.value}"


@pytest.mark.parametrize(
    ("order", "error"),
    [
        (made_in_another_order, CollectiveMismatchError),
        (called_in_another_order, CollectiveMismatchError),
        (called_in_another_order_later, PeerError),
    ],
)
@both_backends
def test_another_order_of_objects_is_found(
    cpu_pool: RankPool, backend: str, order: Callable[[Rank, str], str], error: type[Exception]
) -> None:
    for rank, said in enumerate(cpu_pool.run(order, backend, world_size=2)):
        assert f"rank {rank} of 2: " in said
        assert f"rank {1 - rank} " in said
        assert error is PeerError or said.startswith(error.__name__)


def closed_before_its_graph(rank: Rank) -> list[int]:
    """Maps of shared files before, while a backward may come, and after close(), when it is refused."""
    gc.collect()
    at_first = Holdings.now(rank.device).maps
    ep = ExpertParallel(backend="fast", max_tokens_per_rank=TOKENS)
    y = ep.moe(*layer_of(rank), TOP_K).y
    meanwhile = Holdings.now(rank.device).maps
    ep.close()
    after = Holdings.now(rank.device).maps
    assert y.requires_grad
    return [at_first, meanwhile, after]


@pytest.mark.fast
def test_close_gives_memory_back_while_a_graph_lives(cpu_pool: RankPool) -> None:
    for at_first, meanwhile, after in cpu_pool.run(closed_before_its_graph, world_size=2):
        assert meanwhile > at_first
        assert after == at_first
