"""What the link between GPUs and a GPU's memory carry, measured: the rates that everything else is held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from sonic_ep.backend import unavailable_reasons
from sonic_ep.cost import LinkCeilings
from sonic_ep.distributed.group import EPGroup
from sonic_ep.testing.checks import expect
from sonic_ep.testing.timing import BUSY_SECONDS, keep_busy, measure

if TYPE_CHECKING:
    from sonic_ep.fast.link import Stopwatch

ROUNDS, WARMUP = 50, 5
# Where ranks share a GPU, every meeting of all takes milliseconds.
ROUNDS_OF_SHARED_GPUS = 3
# Over the link, each way.
LINK_BYTES = 2**27
# Ten times what a cache holds.
COPIED_BYTES = 2**29


def meeting(
    barrier_before_write: Callable[[], object], device: torch.device, *, ahead: bool, busy_seconds: float = BUSY_SECONDS
) -> Callable[[], None]:
    """All ranks meet by the barrier. ``ahead``: the GPU is kept busy first, so that the host gets ahead of it."""

    def enter() -> None:
        if ahead:
            keep_busy(device, busy_seconds)
        barrier_before_write()

    return enter


def stopwatch(
    barrier_before_write: Callable[[], object], device: torch.device, group: EPGroup, rounds: int = ROUNDS
) -> Stopwatch:
    """The median over rounds of what a piece of work takes the slowest rank, behind the barrier."""
    enter = meeting(barrier_before_write, device, ahead=True)
    warmup = min(WARMUP, rounds)
    return lambda work: measure(work, rounds=rounds, warmup=warmup, device=device, group=group, enter=enter).median


def measured_ceilings(
    group: EPGroup, device: torch.device, nbytes: int = LINK_BYTES, rounds: int = ROUNDS
) -> LinkCeilings | None:
    """Collective: the ceilings of the link between GPUs, for about ``nbytes`` each way.

    None where there is no link to measure: on one rank, on the CPU, or where GPUs cannot map each other's memory.
    """
    if group.world_size == 1 or device.type != "cuda" or unavailable_reasons("fast", group):
        return None
    # Imported here: it needs triton, which the reference does without.
    from sonic_ep.fast.link import LARGEST_PIECE, link_ceilings
    from sonic_ep.fast.workspace import Workspace

    workspace = Workspace(group, device)
    pieces = max(1, nbytes // LARGEST_PIECE)
    try:
        return link_ceilings(
            workspace, pieces * LARGEST_PIECE, stopwatch(workspace.barrier_before_write, device, group, rounds)
        )
    finally:
        workspace.close()


def memory_rate(device: torch.device, seconds: Stopwatch, nbytes: int = COPIED_BYTES) -> float:
    """What the memory of ``device`` moves in a copy of ``nbytes``, reads and writes, in bytes/s.

    seconds: what a copy takes. Raises ``AssertionError`` if it did not arrive.
    """
    source = torch.randint(-(2**31), 2**31 - 1, (nbytes // 4,), dtype=torch.int32, device=device)
    target = torch.zeros_like(source)

    def copy() -> None:
        target.copy_(source)

    taken = seconds(copy)
    expect(torch.equal(source, target), "memory: a copy is not what was copied")
    return (source.nbytes + target.nbytes) / taken
