"""What the device has flagged: raised by the call ``PLANS_AHEAD`` later, on every rank alike, with the host ahead."""

import time
from collections.abc import Callable

import pytest
import torch

from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.testing import Rank, RankPool

pytestmark = pytest.mark.fast

EXPERTS_PER_RANK = 2
# Cycles that keep a GPU busy for a quarter of a second or longer, at any clock.
BUSY_CYCLES = 500_000_000


def ids(rank: Rank, *, bad: bool = False) -> torch.Tensor:
    """Two tokens with an expert each; one id is out of range on the last rank if ``bad``."""
    out_of_range = 99 if bad and rank.rank == rank.world_size - 1 else 1
    return torch.tensor([[0], [out_of_range]], device=rank.device)


def raised_by(calls: list[Callable[[], object]]) -> list[int]:
    """Which of ``calls`` raised what the device had flagged."""
    found, said = [], []
    for number, call in enumerate(calls):
        try:
            call()
        except ValueError as error:
            found.append(number)
            said.append(str(error))
    assert all("expert ids out of range" in words for words in said)
    return found


def flagged_twice(rank: Rank, config: EPConfig) -> list[int]:
    """Two wrong plans in a row raise one after the other, each eight plans later."""
    from sonic_ep.fast.device_errors import PLANS_AHEAD

    experts = EXPERTS_PER_RANK * rank.world_size
    with ExpertParallel(backend="fast", config=config) as ep:
        wrong = [False, True, True, *[False] * (PLANS_AHEAD + 2)]
        found = raised_by([lambda bad=bad: ep.plan(ids(rank, bad=bad), experts) for bad in wrong])  # type: ignore[misc]
        # A call that raises makes no plan of its own: the second of the two is told by the very next.
        assert found == ([1 + PLANS_AHEAD, 2 + PLANS_AHEAD] if not config.cpu_sync_on_runtime else [1, 2])
        ep.check()
        ep.plan(ids(rank, bad=True), experts) if not config.cpu_sync_on_runtime else None
        ep.plan(ids(rank), experts)
        assert raised_by([ep.check, ep.check]) == ([0] if not config.cpu_sync_on_runtime else [])
    return found


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_was_flagged_is_raised_in_turn_on_every_rank(pool: RankPool, world_size: int, exact: bool) -> None:
    found = pool.run(flagged_twice, EPConfig(cpu_sync_on_runtime=exact), world_size=world_size)
    assert found == [found[0]] * world_size


def ahead(rank: Rank, graphed: bool) -> None:
    """While the GPU is busy the host queues plan after plan, also where an earlier plan is in a graph."""
    from sonic_ep.fast.device_errors import PLANS_AHEAD

    experts = EXPERTS_PER_RANK * rank.world_size
    with ExpertParallel(backend="fast", max_tokens_per_rank=2) as ep:
        for _ in range(2):
            ep.plan(ids(rank), experts)
        graph, static = torch.cuda.CUDAGraph(), ids(rank)
        if graphed:
            with torch.cuda.graph(graph):
                ep.plan(static, experts)
        given = ids(rank)
        # Kernels of the copy that plans take of what graphs have flagged are loaded when they first run.
        ep.plan(given, experts)
        ep.check()
        busy = torch.cuda.Event()
        torch.cuda._sleep(BUSY_CYCLES)
        busy.record()
        began = time.monotonic()
        for _ in range(PLANS_AHEAD):
            ep.plan(given, experts)
        assert not busy.query(), f"the host waited for the GPU: {time.monotonic() - began:.3f} s"
        torch.cuda.synchronize()


@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_host_is_plans_ahead_of_the_gpu(cuda_pool: RankPool, world_size: int, graphed: bool) -> None:
    cuda_pool.run(ahead, graphed, world_size=world_size)


def flagged_in_a_graph(rank: Rank) -> None:
    """A replay that goes wrong is told by the same later call on every rank, however far a rank's host is ahead."""
    from sonic_ep.fast.device_errors import PLANS_AHEAD

    experts = EXPERTS_PER_RANK * rank.world_size
    with ExpertParallel(backend="fast", max_tokens_per_rank=2) as ep:
        static, given = ids(rank), ids(rank)
        ep.plan(static, experts)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ep.plan(static, experts)
        graph.replay()
        static.copy_(ids(rank, bad=True))
        if rank.rank == 0:
            torch.cuda._sleep(BUSY_CYCLES)
        graph.replay()
        static.copy_(ids(rank))
        found = raised_by([lambda: ep.plan(given, experts)] * (2 * PLANS_AHEAD))
        assert found == [PLANS_AHEAD]
        ep.check()
        # And where no later plan comes.
        static.copy_(ids(rank, bad=True))
        graph.replay()
        static.copy_(ids(rank))
        assert raised_by([ep.check, ep.check]) == [0]
        graph.replay()
        ep.check()


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_a_replay_flagged_is_raised_by_one_call_on_every_rank(cuda_pool: RankPool, world_size: int) -> None:
    cuda_pool.run(flagged_in_a_graph, world_size=world_size)
