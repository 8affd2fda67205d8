"""The place where a benchmark runs: its group, its rates, measured first, and what the machine is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sonic_ep.api import ExpertParallel
from sonic_ep.benchmark.arena import Arena
from sonic_ep.benchmark.results import Results, environment
from sonic_ep.ceilings import ROUNDS, ROUNDS_OF_SHARED_GPUS, measured_ceilings, memory_rate, stopwatch

# A forward and backward are launched in less.
BUSY_SECONDS = 5e-3


@contextmanager
def arena_at(device: torch.device, backend: str, commit: str | None, command: str) -> Iterator[Arena]:
    """Collective: an arena for the world, whose ranks meet by ``backend``."""
    with ExpertParallel(backend=backend) as ep, torch.no_grad():
        group = ep.group

        def fence() -> None:
            ep.meet(device)

        shared = device.type == "cuda" and group.world_size > torch.cuda.device_count()
        rounds = ROUNDS_OF_SHARED_GPUS if shared else ROUNDS
        results = Results(
            environment=environment(device, group.world_size, commit, command),
            ceilings=measured_ceilings(group, device, rounds=rounds),
            memory_rate=memory_rate(device, stopwatch(fence, device, group, rounds)) if device.type == "cuda" else None,
        )
        with torch.enable_grad():
            yield Arena(group=group, device=device, fence=fence, results=results, busy_seconds=BUSY_SECONDS)
