"""An error after a call has begun names rank and place, and ends the object, on every rank, where there are several."""

from collections.abc import Callable
from functools import partial
from itertools import product
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from backends import both_backends
from calls import HIDDEN, call_of, good_call, with_trained_experts
from limits import HANG_SECONDS
from new_group import own_process_group
from on_ranks import on_ranks
from promises import promise

from sonic_ep import ExpertParallel
from sonic_ep.testing import Rank

ODD = 1
# A rank that waited that long would raise PeerTimeoutError; the abandoned collective of a failed group lasts as long.
PATIENT_SECONDS = 100.0


SHORT = "tried to allocate 2.00 GiB"
# The library's own errors begin with the rank. Those of a hook on saved tensors, or of a model run again, need not.
OF_MEMORY = (torch.OutOfMemoryError(SHORT), "OutOfMemoryError: rank 1 of 3: out of")
INTERRUPT = (KeyboardInterrupt(), "KeyboardInterrupt")
OF_A_HOOK = (ValueError("a hook of one rank"), "ValueError: a hook of one rank")
# What exchanges rows: in a call, and in a backward.
EXCHANGES = {
    "fast": ("sonic_ep.fast.moe_function._pulled", "sonic_ep.fast.exchange.Exchange.rows"),
    "reference": ("sonic_ep.reference.exchange.Exchange.rows",),
}


def told(work: Callable[[], object]) -> str:
    with pytest.raises((RuntimeError, KeyboardInterrupt, ValueError)) as raised:
        work()
    return f"{raised.type.__name__}: {raised.value}"


@promise("ended-object")
@pytest.mark.parametrize(("error", "backward"), [*product((OF_MEMORY, INTERRUPT), (False, True)), (OF_A_HOOK, True)])
@both_backends
@on_ranks(3, pool="cpu_pool")
def test_an_error_of_one_rank_ends_the_object_on_all(
    rank: Rank, backend: str, error: tuple[BaseException, str], backward: bool
) -> None:
    """What the second call, or its backward, raises on each rank, and what everything raises that follows."""
    with own_process_group(rank) as group, pytest.MonkeyPatch.context() as patch:
        # The store of a busy machine may be slow to tell why a rank has left.
        patch.setattr("sonic_ep.distributed.rank_status.ANSWER_SECONDS", HANG_SECONDS)
        ep = ExpertParallel(group, backend=backend, timeout=PATIENT_SECONDS)
        call = partial(ep.moe, **with_trained_experts(call_of(rank.world_size)))
        first = call().y.sum()

        def use() -> None:
            y = call().y.sum() if backward else None
            for exchange in EXCHANGES[backend] if rank.rank == ODD else ():
                patch.setattr(exchange, Mock(side_effect=error[0]))
            y.backward() if backward else call().y.sum().backward()
            call()

        said = [told(work) for work in (use, call, first.backward, ep.check)]
        # What it holds is given back all the same.
        ep.close()
        assert told(call) == said[1]
    found = [said] * rank.world_size
    dist.all_gather_object(found, said)
    (first, *later), why = said, found[ODD][0]
    assert why.startswith(error[1])
    if rank.rank != ODD:
        # Or the third rank, which has heard of it before, has left by that.
        assert first.startswith(f"PeerLostError: rank {rank.rank} of 3: ")
        assert f"rank 1 left ({why}) while it was waited for in" in first
    ended = f"ClosedError: rank {rank.rank} of 3: this ExpertParallel has ended: {first}; make a new one after the"
    assert all(words.startswith(ended) for words in later), later


@promise("usable-after-errors", "out-of-memory")
@both_backends
@on_ranks(1, pool="cpu_pool")
def test_memory_that_runs_out_is_told_with_the_place(rank: Rank, backend: str) -> None:
    """That of the CPU in a call, and what runs out in its backward."""
    arguments = with_trained_experts(call_of(1))
    with ExpertParallel(backend=backend) as ep:
        if backend == "reference":
            huge = good_call(x=torch.zeros(1, HIDDEN).expand(2**44, HIDDEN))
            with pytest.raises(torch.OutOfMemoryError, match=r"rank 0 of 1: out of memory in phase .* of step \d"):
                ep.moe(**huge)
        ep.moe(**arguments)
        y = ep.moe(**arguments).y
        expected = rf"rank 0 of 1: out of memory in phase .* of step \d: {SHORT}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EXCHANGES[backend][-1], Mock(side_effect=torch.OutOfMemoryError(SHORT)))
            with pytest.raises(torch.OutOfMemoryError, match=expected):
                y.sum().backward()
        ep.moe(**arguments).y.sum().backward()


@promise("out-of-memory")
@both_backends
@on_ranks(1, pool="cuda_pool")
def test_gpu_memory_that_runs_out_is_told_with_rank_and_place(rank: Rank, backend: str) -> None:
    """The third call wants more than this process may have any more."""
    weights = {name: call_of(rank.world_size)[name].to(rank.device) for name in ("router_w", "w1", "w2")}
    x = torch.randn(2**20, HIDDEN, device=rank.device)
    with ExpertParallel(backend=backend, max_tokens_per_rank=len(x)) as ep:
        for tokens in (x[:8], x[:8]):
            ep.moe(tokens, **weights, top_k=2)
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(rank.device).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total, rank.device)
        said = "rank 0 of 1: out of memory in phase .* of step 3: CUDA out of memory"
        try:
            with pytest.raises(torch.OutOfMemoryError, match=said):
                ep.moe(x, **weights, top_k=2)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, rank.device)
