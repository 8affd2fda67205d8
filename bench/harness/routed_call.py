"""A call of a layer whose routing is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sonic_ep.api import ExpertParallel
from sonic_ep.benchmark.layer_problem import LayerOptions
from sonic_ep.benchmark.workload import Shape


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedCall:
    """A call of ``moe_routed``: x and out_grad (T, H), topk_idx and topk_scores (T, K), the experts by name."""

    shape: Shape
    options: LayerOptions
    x: Tensor
    out_grad: Tensor
    topk_idx: Tensor
    topk_scores: Tensor
    experts: dict[str, Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken of, in the order of the results."""
        return [self.x, self.topk_scores, *self.experts.values()]

    def run(self, ep: ExpertParallel, *, training: bool, backward: bool) -> list[Tensor]:
        """The output (T, H), and behind a backward the gradients of x, the scores and the experts."""
        with torch.set_grad_enabled(training):
            y = self.forward(ep)
            found = torch.autograd.grad(y, self.leaves, self.out_grad) if backward else ()
        return [y.detach(), *found]

    def forward(self, ep: ExpertParallel) -> Tensor:
        """The output, (T, H)."""
        names = {"activation": self.options.activation, "gate_layout": self.options.gate_layout}
        return ep.moe_routed(self.x, self.topk_idx, self.topk_scores, **self.experts, **names)  # type: ignore[arg-type]
