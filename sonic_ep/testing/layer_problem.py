"""A random layer for this rank: a call of ``moe`` whose router has no near ties and routes as it is asked to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from sonic_ep.config import RouterOptions, ScoreOrder
from sonic_ep.distributed.group import EPGroup
from sonic_ep.profiler.problem import Shape, generator_of
from sonic_ep.profiler.routings import ROUTINGS, RoutingName
from sonic_ep.testing.cases import random_experts
from sonic_ep.testing.oracle import RouterCall

# Routers that round differently choose alike where the least logit chosen is so far above the next one.
LEAST_GAP = 1e-3
# How often tokens are drawn anew. With a router of one column all tokens have near ties, or none has.
MOST_DRAWS = 1000
# Logits are about normal with deviation 1: experts this far below others are never chosen.
FAR = 16.0


def normal(generator: torch.Generator, dtype: torch.dtype, *size: int, scale: float = 1.0) -> Tensor:
    """Normally distributed numbers, drawn where they live."""
    return torch.empty(size, dtype=dtype, device=generator.device).normal_(0, scale, generator=generator)


def near_ties(logits_TE: Tensor, top_k: int) -> Tensor:
    """Which tokens, (T,) bool, have a logit not chosen that is less than ``LEAST_GAP`` below one that is.

    >>> near_ties(torch.tensor([[3.0, 1.0, 2.0], [3.0, 2.0, 2.0]]), 2)
    tensor([False,  True])
    """
    if top_k == logits_TE.shape[1]:
        return torch.zeros(logits_TE.shape[0], dtype=torch.bool, device=logits_TE.device)
    largest = logits_TE.topk(top_k + 1, dim=1).values
    return largest[:, top_k - 1] - largest[:, top_k] < LEAST_GAP


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Options of ``ExpertParallel.moe`` besides the shape, and where tokens go."""

    activation: str = "swiglu"
    gate_layout: str = "interleaved"
    score_order: ScoreOrder = ScoreOrder.TOPK_THEN_SOFTMAX
    norm_topk_probs: bool = False
    biased: bool = False
    routing: RoutingName = "uniform"


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerProblem:
    """A layer drawn for this rank: the router alike on every rank, tokens and experts its own.

    Where routing is not uniform, the first element of every token is 1, and the router's weight of it is the logarithm
    of how likely each expert is. ranks_of_routing: the number of ranks that it is about, if not the group's.
    """

    shape: Shape
    group: EPGroup
    device: torch.device
    options: LayerOptions = field(default_factory=LayerOptions)
    ranks_of_routing: int | None = None

    @cached_property
    def call(self) -> RouterCall:
        """Normally distributed, weights scaled to keep the size of what they multiply, no near ties in the router."""
        shape, options = self.shape, self.options
        alike, own = (generator_of(self.device, stream, rank) for stream, rank in ((4, 0), (5, self.group.rank)))
        drawn = partial(normal, own, shape.dtype)
        router_w = self._router(alike)
        held, sizes = shape.num_experts // self.group.world_size, (shape.hidden, shape.expert_width)
        call = RouterCall(
            x=self._tokens_without_ties(own, router_w),
            dy=drawn(shape.tokens, shape.hidden),
            router_w=router_w,
            experts=random_experts(drawn, held, *sizes, options.activation, options.gate_layout, bias=options.biased),
            options=RouterOptions(
                top_k=shape.top_k, score_order=options.score_order, norm_topk_probs=options.norm_topk_probs
            ),
        )
        for leaf in call.leaves.values():
            leaf.requires_grad_()
        return call

    def on_one_rank(self, alone: EPGroup) -> LayerProblem:
        """The layer with the same router and as many tokens, all of its experts on the one rank of ``alone``."""
        return replace(self, group=alone, ranks_of_routing=self.group.world_size)

    def _router(self, generator: torch.Generator) -> Tensor:
        """(E, H)."""
        num_experts, hidden = self.shape.num_experts, self.shape.hidden
        router_w = normal(generator, self.shape.dtype, num_experts, hidden, scale=hidden**-0.5)
        if self.options.routing != "uniform":
            ranks = self.ranks_of_routing or self.group.world_size
            weights_E = ROUTINGS[self.options.routing].weights(num_experts, ranks)
            router_w[:, 0] = weights_E.log().clamp(min=-FAR).to(router_w)
        return router_w

    def _tokens_without_ties(self, generator: torch.Generator, router_w: Tensor) -> Tensor:
        """Tokens (T, H), those with near ties drawn anew. Raises ``ValueError`` if some stay."""
        shape = self.shape
        x_TH = torch.empty((shape.tokens, shape.hidden), dtype=shape.dtype, device=self.device)
        near_T = torch.ones(shape.tokens, dtype=torch.bool, device=self.device)
        for _ in range(MOST_DRAWS):
            x_TH[near_T] = x_TH[near_T].normal_(generator=generator)
            if self.options.routing != "uniform":
                x_TH[:, 0] = 1
            near_T = near_ties(x_TH.float() @ router_w.float().t(), shape.top_k)
            if not bool(near_T.any()):
                return x_TH
        raise ValueError(
            f"{self.group}: H: got {shape.hidden}, expected so many that the logits of {shape.num_experts} experts "
            f"differ: {int(near_T.sum())} of {shape.tokens} tokens have near ties after {MOST_DRAWS} draws"
        )
