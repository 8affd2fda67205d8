"""Random routings: which experts each token chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

# Draws the experts of T tokens: (generator, T, anything with num_experts and top_k, W) to (T, K) int64.
Chooser = Callable[[torch.Generator, int, Any, int], Tensor]


def uniform(generator: torch.Generator, tokens: int, sizes: Any, world_size: int) -> Tensor:
    """K distinct experts, each set as likely as any other."""
    return torch.rand(tokens, sizes.num_experts, generator=generator).argsort(dim=1)[:, : sizes.top_k]


def skewed(generator: torch.Generator, tokens: int, sizes: Any, world_size: int) -> Tensor:
    """K distinct experts, expert j about as likely as 1/(j + 1)."""
    weights = 1 / torch.arange(1, sizes.num_experts + 1)
    # The Gumbel trick: the K largest of log-weight plus noise are a draw without replacement.
    noise = -(-torch.rand(tokens, sizes.num_experts, generator=generator).clamp(1e-9).log()).log()
    return (weights.log() + noise).argsort(dim=1, descending=True)[:, : sizes.top_k]


def one_rank(generator: torch.Generator, tokens: int, sizes: Any, world_size: int) -> Tensor:
    """Every expert chosen lives on the last rank."""
    held: int = sizes.num_experts // world_size
    first: int = sizes.num_experts - held
    local = torch.rand(tokens, held, generator=generator).argsort(dim=1)[:, : sizes.top_k]
    return first + local


ROUTINGS: Mapping[str, Chooser] = MappingProxyType({"uniform": uniform, "skewed": skewed, "one_rank": one_rank})
