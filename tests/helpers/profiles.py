"""Profiles of small shapes, for the tests of the profiler."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from sonic_ep import EPConfig, ExpertParallel, NetworkProfiler, ProfileReport
from sonic_ep.cost import LinkBandwidth
from sonic_ep.distributed.group import resolve_group
from sonic_ep.profiler.agreement import gathered
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


def profile(asked: Asked, rank: Rank | None = None) -> ProfileReport:
    """The profile of ``rank``, by default one alone on the CPU."""
    number, device = (0, torch.device("cpu")) if rank is None else (rank.rank, rank.device)
    arguments = {"tokens": asked.tokens[number % len(asked.tokens)], "device": device, **SIZES, **asked.arguments}
    arguments |= asked.changed.get(number, {})
    with ExpertParallel(backend=asked.backend, config=arguments.pop("config", asked.config)) as ep:
        options = {name: arguments.pop(name, getattr(asked, name)) for name in ("rounds", "rates")}
        return NetworkProfiler(ep, cache=asked.cache, **options).profile(**arguments)


def profile_of_all(rank: Rank, asked: Asked) -> ProfileReport:
    """Collective. The profile, which is the same on every rank."""
    report = profile(asked, rank)
    assert gathered(resolve_group(None), report) == [report] * rank.world_size
    return report


def said_by_all(rank: Rank, asked: Asked, error: type[Exception]) -> str:
    """Collective. What rank 0 raises, and every other rank, but for its own name in front."""
    with pytest.raises(error) as raised:
        profile(asked, rank)
    assert type(raised.value) is error
    said = gathered(resolve_group(None), str(raised.value))
    assert len({re.sub(r"^rank \d of \d: ", "", text) for text in said}) == 1, said
    return said[0]
