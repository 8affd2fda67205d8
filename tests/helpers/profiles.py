"""Profiles of small shapes, for the tests of the profiler."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from sonic_ep import EPConfig, ExpertParallel, NetworkProfiler, ProfileReport
from sonic_ep.cost import LinkBandwidth
from sonic_ep.testing import Rank, RankPool

SIZES = {"hidden": 16, "top_k": 2, "num_experts": 6, "dtype": torch.bfloat16}
Patch = Callable[[pytest.MonkeyPatch, int], None]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What ranks ask for. tokens: T of rank r is ``tokens[r % len(tokens)]``; changed: of single ranks."""

    backend: str = "reference"
    config: EPConfig = field(default_factory=EPConfig)
    tokens: tuple[int, ...] = (5, 3)
    rounds: int | None = 1
    cache: Path | None = None
    rates: LinkBandwidth | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    changed: dict[int, dict[str, Any]] = field(default_factory=dict)


def profile(asked: Asked, rank: int = 0, device: torch.device | None = None) -> ProfileReport:
    """The profile of this rank."""
    arguments = {"tokens": asked.tokens[rank % len(asked.tokens)], **SIZES, **asked.arguments}
    arguments |= asked.changed.get(rank, {})
    with ExpertParallel(backend=asked.backend, config=arguments.pop("config", asked.config)) as ep:
        options = {name: arguments.pop(name, getattr(asked, name)) for name in ("rounds", "rates")}
        profiler = NetworkProfiler(ep, cache=asked.cache, **options)
        return profiler.profile(device=device or torch.device("cpu"), **arguments)


def profile_on_rank(rank: Rank, asked: Asked, patch: Patch | None = None) -> ProfileReport:
    """``profile`` on a rank of a pool."""
    with pytest.MonkeyPatch.context() as patched:
        if patch is not None:
            patch(patched, rank.rank)
        return profile(asked, rank.rank, rank.device)


def profile_of_all(pool: RankPool, asked: Asked, world_size: int = 2, patch: Patch | None = None) -> ProfileReport:
    """The profile, which is the same on every rank."""
    reports = pool.run(profile_on_rank, asked, patch, world_size=world_size)
    assert all(report == reports[0] for report in reports)
    return reports[0]


def said_by(rank: Rank, asked: Asked, error: type[Exception], patch: Patch | None) -> str:
    """What this rank raises."""
    with pytest.raises(error) as raised:
        profile_on_rank(rank, asked, patch)
    assert type(raised.value) is error
    return str(raised.value)


def said_by_all(
    pool: RankPool, asked: Asked, error: type[Exception], world_size: int = 2, patch: Patch | None = None
) -> str:
    """What rank 0 raises, and every other rank, but for its own name in front."""
    said = pool.run(said_by, asked, error, patch, world_size=world_size)
    assert len({re.sub(r"^rank \d of \d: ", "", text) for text in said}) == 1, said
    return said[0]
