"""Profiles of small shapes, for the tests of the profiler."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from sonic_ep import EPConfig, ExpertParallel, NetworkProfiler, ProfileReport
from sonic_ep.cost import LinkBandwidth
from sonic_ep.testing import Rank

SIZES = {"hidden": 16, "top_k": 2, "num_experts": 6, "dtype": torch.bfloat16}


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


def profile_on_rank(rank: Rank, asked: Asked) -> ProfileReport:
    """``profile``, on a rank of a pool."""
    return profile(asked, rank.rank, rank.device)


def said_by(rank: Rank, asked: Asked, error: type[Exception], patch: Callable[[Any, int], None] | None = None) -> str:
    """What this rank raises."""
    with pytest.MonkeyPatch.context() as patched:
        if patch is not None:
            patch(patched, rank.rank)
        with pytest.raises(error) as raised:
            profile(asked, rank.rank, rank.device)
    assert type(raised.value) is error
    return str(raised.value)
