"""The all-gather by copy engine: its asynchronous handle, and on GPUs that no kernel takes part."""

import time

import pytest
import torch
from on_ranks import on_ranks
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from workspaces import workspace_of

from sonic_ep.testing import Rank, assert_bitwise

# Only ranks launch anything: this process need not interpret.
pytest.importorskip("triton")
from sonic_ep.fast.collectives import stage_tokens
from sonic_ep.fast.copy_engine import CopyEngineGather

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


@on_ranks(2, pool="cuda_pool")
def test_no_kernel_takes_part_in_the_copies(rank: Rank) -> None:
    max_tokens = 4096
    with workspace_of(rank) as workspace, pytest.MonkeyPatch.context() as patch:
        gather = CopyEngineGather(workspace, "gathered")
        x = torch.full((max_tokens, 4096), float(rank.rank + 1), device=rank.device, dtype=torch.bfloat16)
        workspace.enter()
        gather.start(x, max_tokens).wait()
        staged = stage_tokens(x, max_tokens, workspace, "gathered")
        # A kernel of PyTorch's would fill the result.
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            found = gather.bring(x[:0], staged, max_tokens).wait()
        torch.cuda.synchronize()
        theirs = found.view(rank.world_size, max_tokens, 4096)[1 - rank.rank]
        assert bool((theirs == 2 - rank.rank).all())
    names = {event.name for event in seen.events() if event.device_type == DeviceType.CUDA}
    assert names
    assert all(name.startswith("Memcpy") for name in names), names
