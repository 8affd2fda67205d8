"""Activations, and the layouts of gate and up. Computed in fp32 (fp64 for fp64), rounded once to the input's dtype."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GateLayout:
    """Where gate and up lie in the 2I outputs of the up-projection: an einops pattern, (..., 2I) to (2, ..., I)."""

    name: str
    pattern: str

    def split(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up, each (..., I), as views of ``hidden`` (..., 2I).

        >>> GATE_LAYOUTS["interleaved"].split(torch.tensor([1, 2, 3, 4]))
        (tensor([1, 3]), tensor([2, 4]))
        >>> GATE_LAYOUTS["concat"].split(torch.tensor([1, 2, 3, 4]))
        (tensor([1, 2]), tensor([3, 4]))
        """
        gate, up = rearrange(hidden, self.pattern, two=2)
        return gate, up


@dataclass(frozen=True, kw_only=True)
class Activation:
    """``pointwise(hidden)`` or, if gated, ``up * pointwise(gate)``."""

    name: str
    gated: bool
    pointwise: Callable[[Tensor], Tensor]

    def up_width(self, intermediate_size: int) -> int:
        """Outputs of the up-projection: 2I if gated, else I."""
        return 2 * intermediate_size if self.gated else intermediate_size

    def __call__(self, hidden: Tensor, layout: GateLayout) -> Tensor:
        """(..., 2I or I) to (..., I), in the dtype of ``hidden``. ``layout`` is used by gated activations only."""
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if not self.gated:
            return self.pointwise(wide).to(hidden.dtype)
        gate, up = layout.split(wide)
        return (up * self.pointwise(gate)).to(hidden.dtype)


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


_gelu_tanh = partial(F.gelu, approximate="tanh")
_ALL = (
    Activation(name="swiglu", gated=True, pointwise=F.silu),
    Activation(name="geglu", gated=True, pointwise=_gelu_tanh),
    Activation(name="reglu", gated=True, pointwise=F.relu),
    Activation(name="silu", gated=False, pointwise=F.silu),
    Activation(name="gelu", gated=False, pointwise=_gelu_tanh),
    Activation(name="relu", gated=False, pointwise=F.relu),
    Activation(name="relu_sq", gated=False, pointwise=_relu_squared),
)
ACTIVATIONS: Mapping[str, Activation] = MappingProxyType({activation.name: activation for activation in _ALL})

_INTERLEAVED = GateLayout(name="interleaved", pattern="... (i two) -> two ... i")
_CONCAT = GateLayout(name="concat", pattern="... (two i) -> two ... i")
GATE_LAYOUTS: Mapping[str, GateLayout] = MappingProxyType({"interleaved": _INTERLEAVED, "concat": _CONCAT})
