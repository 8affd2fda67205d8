"""Memory that runs out is told with the rank and the place, in a call and in a backward; and the next call is right."""

import pytest
import torch
from backends import both_backends
from calls import EXPERTS, HIDDEN, call_of, good_call, memory_short, with_trained_experts
from on_ranks import on_ranks
from promises import promise

from sonic_ep import ExpertParallel
from sonic_ep.testing import Rank


def test_memory_that_runs_out_is_told_with_the_place() -> None:
    with ExpertParallel(backend="reference") as ep:
        ep.plan(torch.zeros(1, 1, dtype=torch.int64), EXPERTS)
        expected = "rank 0 of 1: out of memory in phase exchange of step 1: tried to allocate 2.00 GiB"
        with pytest.raises(torch.OutOfMemoryError, match=expected), ep._call_guard.one():
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        ep.moe(**good_call())


@promise("usable-after-errors", "out-of-memory")
@pytest.mark.parametrize(
    ("backend", "exchange"), [("reference", "sonic_ep.reference.backend"), ("fast", "sonic_ep.fast.exchange")]
)
@on_ranks(1, pool="cpu_pool")
def test_memory_that_runs_out_in_backward_is_told_with_the_place(rank: Rank, backend: str, exchange: str) -> None:
    arguments = with_trained_experts(call_of(1))
    with ExpertParallel(backend=backend) as ep:
        ep.moe(**arguments)
        y = ep.moe(**arguments).y
        expected = "rank 0 of 1: out of memory in phase .* of step 2: tried to allocate 2.00 GiB"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{exchange}.Exchange.rows", memory_short)
            with pytest.raises(torch.OutOfMemoryError, match=expected):
                y.sum().backward()
        ep.moe(**arguments).y.sum().backward()


@promise("out-of-memory")
@both_backends
@on_ranks(1, pool="cuda_pool")
def test_gpu_memory_that_runs_out_is_told_with_rank_and_place(rank: Rank, backend: str) -> None:
    """The third call wants more than this process may have any more."""
    weights = {name: value.to(rank.device) for name, value in call_of(rank.world_size).items() if name != "top_k"}
    x = torch.randn(2**20, HIDDEN, device=rank.device)
    with ExpertParallel(backend=backend, max_tokens_per_rank=len(x)) as ep:
        for tokens in (x[:8], x[:8]):
            ep.moe(**{**weights, "x": tokens}, top_k=2)
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(rank.device).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total, rank.device)
        said = "rank 0 of 1: out of memory in phase .* of step 3: CUDA out of memory"
        try:
            with pytest.raises(torch.OutOfMemoryError, match=said):
                ep.moe(**{**weights, "x": x}, top_k=2)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, rank.device)


@promise("out-of-memory")
def test_memory_of_the_cpu_that_runs_out_is_told_with_the_place() -> None:
    with ExpertParallel(backend="reference") as ep:
        x = torch.zeros(1, HIDDEN).expand(2**44, HIDDEN)
        with pytest.raises(torch.OutOfMemoryError, match="rank 0 of 1: out of memory in phase"):
            ep.moe(**{**good_call(), "x": x})
        ep.moe(**good_call())
