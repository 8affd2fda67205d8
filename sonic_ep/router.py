"""The router of a layer: its weights and options. ``ExpertParallel.moe`` computes with them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sonic_ep.config import RouterConfig
from sonic_ep.distributed.group import EPGroup
from sonic_ep.sharding import Share, originals

SEEDS = 2**62


class Router(nn.Module):
    """weight (E, H), the same on every rank; bias (E,) or None; the buffer correction_bias (E,) fp32 or None.

    ``correction_bias`` takes part in the choice only, and no gradient reaches it: a training loop moves it. The bias
    and it begin at zero. config, top_k, reduce_grad: of ``ExpertParallel.moe``. It has no forward of its own: the layer
    computes logits, choices and scores in one call with the experts.
    """

    correction_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        config: RouterConfig,
        *,
        bias: bool = False,
        correction_bias: bool = False,
        reduce_grad: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.top_k, self.config, self.reduce_grad = top_k, config, reduce_grad
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        zeros = torch.zeros(num_experts, device=device, dtype=torch.float32) if correction_bias else None
        self.register_buffer("correction_bias", zeros)

    def arguments(self) -> dict[str, Any]:
        """The arguments of ``ExpertParallel.moe`` that are the router's."""
        weights = {"router_w": self.weight, "router_b": self.bias, "correction_bias": self.correction_bias}
        return {**weights, "top_k": self.top_k, "router": self.config, "reduce_router_grad": self.reduce_grad}

    @torch.no_grad()
    def fill(self, where: EPGroup | str, seed: int) -> None:
        """The weight normal with variance 1/H, from ``seed``; biases zero."""
        held = originals(where, self, ("weight", "bias"))
        Share.of(held["weight"]).fill(lambda whole: normal(whole, seed))
        for zeros in (held.get("bias"), self.correction_bias):
            if zeros is not None:
                zeros.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """As of every module, but ``to(torch.bfloat16)`` leaves correction_bias in fp32: its updates are small."""
        exact = self.correction_bias
        super()._apply(fn, recurse)
        if exact is not None and self.correction_bias is not None and self.correction_bias.dtype != exact.dtype:
            self.correction_bias = exact.to(self.correction_bias.device)
        return self

    def extra_repr(self) -> str:
        """The sizes, for ``print(layer)``."""
        experts, hidden = self.weight.shape
        return f"hidden_size={hidden}, num_experts={experts}, top_k={self.top_k}, {self.config}"


def normal(weight: Tensor, seed: int) -> None:
    """Fill with normal numbers of variance 1 over the last extent, from ``seed``."""
    generator = torch.Generator(weight.device).manual_seed(seed)
    weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
