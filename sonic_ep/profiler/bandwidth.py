"""Measured bandwidth of the link between GPUs and of GPU memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sonic_ep.backend import unavailable_reasons
from sonic_ep.cost import LinkBandwidth
from sonic_ep.distributed.group import EPGroup
from sonic_ep.profiler.timing import RoundTimer
from sonic_ep.profiler.verification import expect

# Seconds that work takes, all ranks having entered each round together.
Stopwatch = Callable[[Callable[[], object]], float]

ROUNDS = 50
# Where ranks share a GPU, every barrier takes milliseconds.
ROUNDS_OF_SHARED_GPUS = 3
# Over the link, each way.
LINK_BYTES = 2**27
# Ten times what a cache holds.
COPIED_BYTES = 2**29


def measured_bandwidth(
    group: EPGroup, device: torch.device, nbytes: int = LINK_BYTES, rounds: int = ROUNDS
) -> LinkBandwidth | None:
    """Collective. Bandwidth of the link between GPUs, in transfers of about ``nbytes`` each way.

    None on one rank, on the CPU, and where GPUs cannot map each other's memory.
    """
    if group.world_size == 1 or device.type != "cuda" or unavailable_reasons("fast", group):
        return None
    # They need triton, which the reference does without.
    from sonic_ep.fast.workspace import Workspace
    from sonic_ep.profiler.link_kernels import LARGEST_BLOCK, link_bandwidth

    workspace = Workspace(group, device)
    timer = RoundTimer(group=group, device=device, barrier=workspace.barrier_before_write)
    whole_blocks = max(1, nbytes // LARGEST_BLOCK) * LARGEST_BLOCK
    try:
        return link_bandwidth(workspace, whole_blocks, lambda transfer: timer.median(transfer, rounds))
    finally:
        workspace.close()


def memory_rate(device: torch.device, seconds: Stopwatch, nbytes: int = COPIED_BYTES) -> float:
    """Bytes/s read and written by a copy of ``nbytes`` on ``device``. ``AssertionError`` if the copy is wrong."""
    source = torch.randint(-(2**31), 2**31 - 1, (nbytes // 4,), dtype=torch.int32, device=device)
    target = torch.zeros_like(source)
    taken = seconds(lambda: target.copy_(source))
    expect(torch.equal(source, target), "memory: the copy differs from its source")
    return (source.nbytes + target.nbytes) / taken
