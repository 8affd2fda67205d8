"""An error of one rank after a call has begun ends the object: named by later calls, backwards and peers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist
from backends import both_backends
from calls import call_of, memory_short, with_trained_experts
from promises import promise

from sonic_ep import ClosedError, ExpertParallel
from sonic_ep.testing import Rank, RankPool

ODD = 1
# Whoever waited that long would raise PeerTimeoutError.
PATIENT_SECONDS = 600.0


def interrupted(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


# What exchanges rows: in a call, and in a backward.
EXCHANGES = {
    "fast": ("sonic_ep.fast.moe_function._pulled", "sonic_ep.fast.exchange.Exchange.rows"),
    "reference": ("sonic_ep.reference.exchange.Exchange.rows",),
}


@contextmanager
def failing(ep: ExpertParallel, fail: Callable[..., None], *, here: bool) -> Iterator[None]:
    """The next exchange of rows ends in an error, if that is to be ``here``."""
    with pytest.MonkeyPatch.context() as patch:
        for exchange in EXCHANGES[ep.backend] if here else ():
            patch.setattr(exchange, fail)
        yield


def fails_once(rank: Rank, backend: str, fail: Callable[..., None], backward: bool) -> list[str]:
    """What the second call, or its backward, raises on each rank, and what everything raises that follows."""
    group = dist.new_group(list(range(rank.world_size)))
    ep = ExpertParallel(group, backend=backend, timeout=PATIENT_SECONDS)
    arguments = with_trained_experts(call_of(rank.world_size))
    first = ep.moe(**arguments).y.sum()

    def use() -> None:
        with failing(ep, fail, here=rank.rank == ODD and not backward):
            y = ep.moe(**arguments).y.sum()
        with failing(ep, fail, here=rank.rank == ODD and backward):
            y.backward()
        ep.moe(**arguments)

    said = [told(use)]
    said += [told(call) for call in (lambda: ep.moe(**arguments), lambda: first.backward(), lambda: ep.check())]
    # What it holds is given back all the same.
    ep.close()
    assert told(lambda: ep.moe(**arguments)) == said[1]
    dist.barrier()
    dist.destroy_process_group(group)
    return said


def told(work: Callable[[], object]) -> str:
    with pytest.raises((RuntimeError, KeyboardInterrupt, ClosedError)) as raised:
        work()
    return f"{raised.type.__name__}: {raised.value}"


@promise("ended-object")
@pytest.mark.parametrize("backward", [False, True], ids=["call", "backward"])
@pytest.mark.parametrize("fail", [memory_short, interrupted])
@both_backends
def test_an_error_of_one_rank_ends_the_object_on_all(
    cpu_pool: RankPool, backend: str, fail: Callable[..., None], backward: bool
) -> None:
    found = cpu_pool.run(fails_once, backend, fail, backward, world_size=3)
    why = found[ODD][0]
    assert why.startswith(
        "KeyboardInterrupt" if fail is interrupted else "OutOfMemoryError: rank 1 of 3: out of memory in"
    )
    for rank, (first, *later) in enumerate(found):
        if rank != ODD:
            assert first.startswith(f"PeerLostError: rank {rank} of 3: rank 1 left ({why}) while it was waited for in")
        ended = (
            f"ClosedError: rank {rank} of 3: this ExpertParallel has ended: {first}; make a new one after the process"
        )
        assert all(words.startswith(ended) for words in later), later
