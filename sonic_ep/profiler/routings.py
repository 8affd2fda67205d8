"""Random routings: which experts each token chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

RoutingName = Literal["uniform", "skewed", "one_rank"]
# Draws the experts of T tokens: (generator, T, anything with num_experts and top_k, W) to (T, K) int64.
Chooser = Callable[[torch.Generator, int, Any, int], Tensor]


@dataclass(frozen=True)
class Weighted:
    """K distinct experts a token, each drawn as likely as its weight among those left; weights(E, W): (E,) fp32."""

    weights: Callable[[int, int], Tensor]

    def __call__(self, generator: torch.Generator, tokens: int, sizes: Any, world_size: int) -> Tensor:
        """The first K of exponential waiting times whose rates are the weights."""
        times_TE = -torch.rand(tokens, sizes.num_experts, generator=generator).neg().log1p()
        return (times_TE / self.weights(sizes.num_experts, world_size)).argsort(dim=1)[:, : sizes.top_k]


# Functions with names, which can be pickled.
def _alike(num_experts: int, world_size: int) -> Tensor:
    return torch.ones(num_experts)


def _falling(num_experts: int, world_size: int) -> Tensor:
    return 1 / torch.arange(1, num_experts + 1)


def _of_last_rank(num_experts: int, world_size: int) -> Tensor:
    return (torch.arange(num_experts) >= num_experts - num_experts // world_size).float()


uniform, skewed, one_rank = Weighted(_alike), Weighted(_falling), Weighted(_of_last_rank)

ROUTINGS: Mapping[str, Weighted] = MappingProxyType({"uniform": uniform, "skewed": skewed, "one_rank": one_rank})
