"""The all-gather by copy engine: an asynchronous handle, and on GPUs the proof that no kernel takes part."""

import time

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sonic_ep.distributed.group import resolve_group
from sonic_ep.testing import Rank, RankPool, assert_bitwise

HIDDEN = 24
pytestmark = pytest.mark.fast


def tokens_of(rank: int, iteration: int, device: torch.device) -> Tensor:
    """T differs from rank to rank and from call to call; one rank may have none."""
    count = (3 * rank + iteration) % 5
    generator = torch.Generator().manual_seed(100 * iteration + rank)
    return torch.randn(count, HIDDEN, generator=generator).to(device, torch.bfloat16)


def gathered(rank: Rank, forget: bool) -> None:
    from sonic_ep.fast.copy_engine import CopyEngineGather
    from sonic_ep.fast.workspace import Workspace

    workspace = Workspace(resolve_group(None), rank.device)
    gather = CopyEngineGather(workspace, "gathered")
    max_tokens = 4
    gather.reserve(max_tokens, HIDDEN * 2)
    for iteration in range(6):
        if rank.rank == iteration % rank.world_size:
            time.sleep(0.02)
        workspace.enter()
        x = tokens_of(rank.rank, iteration, rank.device)
        handle = gather.start(x, max_tokens)
        # Staged is staged: what becomes of x now is nobody's business.
        x.fill_(float("nan"))
        if forget and iteration % 2 == 0:
            continue
        found = handle.wait().view(rank.world_size, max_tokens, HIDDEN)
        for other in range(rank.world_size):
            expected = tokens_of(other, iteration, rank.device)
            assert_bitwise(found[other, : len(expected)], expected, f"tokens of rank {other}")
        assert_bitwise(handle.wait(), found.flatten(0, 1))
    workspace.close()


@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_tokens_of_all_ranks_arrive(pool: RankPool, world_size: int, forget: bool) -> None:
    pool.run(gathered, forget, world_size=world_size)


def beside_a_full_gpu(rank: Rank) -> list[str]:
    """Copies arrive while a kernel sits on every multiprocessor and waits; a kernel would find no place to run."""
    from _kernels_under_test import occupy_kernel

    from sonic_ep.fast.collectives import stage_tokens
    from sonic_ep.fast.copy_engine import CopyEngineGather
    from sonic_ep.fast.launch import launch
    from sonic_ep.fast.workspace import Workspace

    max_tokens = 4096
    workspace = Workspace(resolve_group(None), rank.device)
    gather = CopyEngineGather(workspace, "gathered")
    x = torch.full((max_tokens, 4096), float(rank.rank + 1), device=rank.device, dtype=torch.bfloat16)
    workspace.enter()
    gather.start(x, max_tokens).wait()
    staged = stage_tokens(x, max_tokens, workspace, "gathered")
    # Memory for the result is at hand, so that nothing has to be allocated, or filled by a kernel, beside a full GPU.
    torch.utils.deterministic.fill_uninitialized_memory = False
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gather.bring(x[:0], staged, max_tokens).wait()
    torch.cuda.synchronize()
    # As many one-warp programs as a multiprocessor holds blocks, on every one of them.
    programs = 32 * torch.cuda.get_device_properties(rank.device).multi_processor_count
    state = torch.zeros(2, dtype=torch.int32, pin_memory=True)
    running = torch.zeros(1, dtype=torch.int32, device=rank.device)
    busy = torch.cuda.Stream()
    arrived, finished = torch.cuda.Event(), torch.cuda.Event()
    # The profiler waits for the GPU when it stops, so the kernel has to be gone by then.
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        with torch.cuda.stream(busy):
            launch(occupy_kernel, (programs,), state, running, programs, device=rank.device, num_warps=1)
            finished.record()
        try:
            expect_soon(lambda: int(state[1]) == 1, "the kernel sits everywhere")
            with torch.cuda.stream(side):
                found = gather.bring(x[:0], staged, max_tokens).wait()
                arrived.record()
            expect_soon(arrived.query, "the copies have arrived")
            assert not finished.query(), "and the kernel is still there"
        finally:
            state[0] = 1
            torch.utils.deterministic.fill_uninitialized_memory = True
    torch.cuda.synchronize()
    theirs = found.view(rank.world_size, max_tokens, 4096)[1 - rank.rank]
    assert bool((theirs == 2 - rank.rank).all())
    return sorted({event.name for event in seen.events() if event.device_type == DeviceType.CUDA})


def expect_soon(holds, what: str) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, f"not within 10 s: {what}"
        time.sleep(0.001)


def test_copies_need_no_multiprocessor(cuda_pool: RankPool) -> None:
    for names in cuda_pool.run(beside_a_full_gpu, world_size=2):
        copies = {name for name in names if name.startswith("Memcpy")}
        assert copies, names
        assert set(names) - copies == {"occupy_kernel"}, names
