"""The all-gather by copy engine: its asynchronous handle, and on GPUs that no kernel takes part."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from limits import HANG_SECONDS
from on_ranks import on_ranks
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from workspaces import workspace_of

from sonic_ep.testing import Rank, assert_bitwise

# Only ranks launch anything: this process need not interpret.
pytest.importorskip("triton")
import triton
import triton.language as tl

from sonic_ep.fast.collectives import stage_tokens
from sonic_ep.fast.copy_engine import CopyEngineGather
from sonic_ep.fast.launch import launch

HIDDEN = 24
pytestmark = pytest.mark.fast


def tokens_of(rank: int, iteration: int, device: torch.device) -> Tensor:
    """T differs from rank to rank and from call to call; one rank may have none."""
    generator = torch.Generator().manual_seed(100 * iteration + rank)
    return torch.randn((3 * rank + iteration) % 5, HIDDEN, generator=generator).to(device, torch.bfloat16)


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("skip_waits", [False, True])
def test_tokens_of_all_ranks_are_gathered(rank: Rank, skip_waits: bool) -> None:
    max_tokens = 4
    with workspace_of(rank) as workspace:
        gather = CopyEngineGather(workspace, "gathered")
        gather.reserve(max_tokens, HIDDEN * 2)
        for iteration in range(6):
            if rank.rank == iteration % rank.world_size:
                time.sleep(0.02)
            workspace.enter()
            x = tokens_of(rank.rank, iteration, rank.device)
            handle = gather.start(x, max_tokens)
            # x was copied by start: a later write must not be seen.
            x.fill_(float("nan"))
            if skip_waits and iteration % 2 == 0:
                continue
            found = handle.wait().view(rank.world_size, max_tokens, HIDDEN)
            for other in range(rank.world_size):
                expected = tokens_of(other, iteration, rank.device)
                assert_bitwise(found[other, : len(expected)], expected, f"tokens of rank {other}")
            assert_bitwise(handle.wait(), found.flatten(0, 1))


@triton.jit
def occupy_kernel(state_ptr, running_ptr, programs):
    """Occupy the GPU until the host sets state_ptr[0]; state_ptr[1] says that all programs run."""
    here = tl.atomic_add(running_ptr, 1) + 1
    if here == programs:
        tl.store(state_ptr + 1, 1)
    released = tl.load(state_ptr, volatile=True)
    while released == 0:
        released = tl.load(state_ptr, volatile=True)


@contextmanager
def occupied(started: Tensor) -> Iterator[Callable[[], bool]]:
    """A kernel occupies every multiprocessor until the end; yields whether it still runs. started: (1,) int32, zero."""
    # As many one-warp programs as a multiprocessor holds blocks, on every one of them.
    programs = 32 * torch.cuda.get_device_properties(started.device).multi_processor_count
    state = torch.zeros(2, dtype=torch.int32, pin_memory=True)
    finished = torch.cuda.Event()
    with torch.cuda.stream(torch.cuda.Stream()):
        launch(occupy_kernel, (programs,), state, started, programs, device=started.device, num_warps=1)
        finished.record()
    try:
        wait_until(lambda: int(state[1]) == 1)
        yield lambda: not finished.query()
    finally:
        state[0] = 1


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.own_gpus
@on_ranks(2, pool="cuda_pool")
def test_copies_need_no_multiprocessor(rank: Rank) -> None:
    """The copies complete while a kernel occupies every multiprocessor; another kernel would find no room to run."""
    max_tokens = 4096
    with workspace_of(rank) as workspace, pytest.MonkeyPatch.context() as patch:
        gather = CopyEngineGather(workspace, "gathered")
        x = torch.full((max_tokens, 4096), float(rank.rank + 1), device=rank.device, dtype=torch.bfloat16)
        workspace.enter()
        gather.start(x, max_tokens).wait()
        staged = stage_tokens(x, max_tokens, workspace, "gathered", in_turn=False)
        # The result's memory comes from the allocator's cache and is not filled: neither needs a kernel.
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        side, copied = torch.cuda.Stream(), torch.cuda.Event()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            gather.bring(x[:0], staged, max_tokens).wait()
        started = torch.zeros(1, dtype=torch.int32, device=rank.device)
        torch.cuda.synchronize()
        # The profiler waits for the GPU when it stops, so the kernel has to end before.
        with profile(activities=[ProfilerActivity.CUDA]) as seen, occupied(started) as running:
            with torch.cuda.stream(side):
                found = gather.bring(x[:0], staged, max_tokens).wait()
                copied.record()
            wait_until(copied.query)
            assert running()
        torch.cuda.synchronize()
        theirs = found.view(rank.world_size, max_tokens, 4096)[1 - rank.rank]
        assert bool((theirs == 2 - rank.rank).all())
    names = {event.name for event in seen.events() if event.device_type == DeviceType.CUDA}
    copies = {name for name in names if name.startswith("Memcpy")}
    assert copies, names
    assert names - copies == {"occupy_kernel"}, names
