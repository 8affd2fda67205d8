"""A random layer for this rank: a call of ``moe`` whose router has no near ties and routes as it is asked to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor

from sonic_ep.activation import ACTIVATIONS, GATE_LAYOUTS
from sonic_ep.backend import Experts
from sonic_ep.config import RouterOptions, ScoreOrder
from sonic_ep.distributed.group import EPGroup
from sonic_ep.testing.oracle import RouterCall

# Routers that round differently choose alike where the least logit chosen is so far above the next one.
LEAST_GAP = 1e-3
# How often tokens are drawn anew. With a router of one column all tokens have near ties, or none has.
MOST_DRAWS = 1000
# Logits are about normal with deviation 1: experts with this offset are always chosen.
FAR = 16.0


class RoutingKind(str, Enum):
    """Where a router sends tokens: anywhere alike; to expert j the less the larger j is; to the last rank alone."""

    UNIFORM = "uniform"
    SKEWED = "skewed"
    ONE_RANK = "one_rank"


def logit_offsets(kind: RoutingKind, num_experts: int, world_size: int) -> Tensor | None:
    """What each expert's logits get, (E,) fp32: -log(j + 1) if skewed, or ``FAR`` on the last rank; None if uniform.

    >>> logit_offsets(RoutingKind.ONE_RANK, 4, 2)
    tensor([ 0.,  0., 16., 16.])
    """
    if kind is RoutingKind.UNIFORM:
        return None
    expert_E = torch.arange(num_experts, dtype=torch.float32)
    if kind is RoutingKind.SKEWED:
        return -(expert_E + 1).log()
    return FAR * (expert_E >= num_experts - num_experts // world_size)


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
class Shape:
    """T of every rank, H, E and K, the dtype of the rows, and I where there are experts."""

    tokens: int
    hidden: int
    num_experts: int
    top_k: int
    intermediate: int | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.hidden * self.dtype.itemsize

    @property
    def expert_width(self) -> int:
        """I, of a shape with experts."""
        assert self.intermediate is not None, "a shape without experts"
        return self.intermediate


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Options of ``ExpertParallel.moe`` besides the shape, and where tokens go."""

    activation: str = "swiglu"
    gate_layout: str = "interleaved"
    score_order: ScoreOrder = ScoreOrder.TOPK_THEN_SOFTMAX
    norm_topk_probs: bool = False
    biased: bool = False
    routing: RoutingKind = RoutingKind.UNIFORM


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerProblem:
    """A layer drawn for this rank: the router alike on every rank, tokens and experts its own.

    Where routing is not uniform, the first element of every token is 1, and the router's weight of it is what it adds
    to the logits of each expert. ranks_of_routing: the number of ranks that it is about, if not the group's.
    """

    shape: Shape
    group: EPGroup
    device: torch.device
    options: LayerOptions = field(default_factory=LayerOptions)
    ranks_of_routing: int | None = None

    @cached_property
    def call(self) -> RouterCall:
        """Normally distributed, weights scaled to keep the size of what they multiply, no near ties in the router."""
        shape, order, norm = self.shape, self.options.score_order, self.options.norm_topk_probs
        router_w = self._router()
        return RouterCall(
            x=self._tokens_without_ties(router_w).requires_grad_(),
            dy=self._normal((shape.tokens, shape.hidden), 2),
            router_w=router_w.requires_grad_(),
            experts=self._experts(),
            options=RouterOptions(top_k=shape.top_k, score_order=order, norm_topk_probs=norm),
        )

    def on_one_rank(self, alone: EPGroup) -> LayerProblem:
        """The layer with the same router and as many tokens, all of its experts on the one rank of ``alone``."""
        return replace(self, group=alone, ranks_of_routing=self.group.world_size)

    def _experts(self) -> Experts:
        shape, held = self.shape, self.shape.num_experts // self.group.world_size
        activation, inner = ACTIVATIONS[self.options.activation], shape.expert_width
        width = activation.up_width(inner)

        def bias(size: int, stream: int) -> Tensor | None:
            return self._normal((held, size), stream, 0.1).requires_grad_() if self.options.biased else None

        return Experts(
            w1=self._normal((held, width, shape.hidden), 3, shape.hidden**-0.5).requires_grad_(),
            w2=self._normal((held, shape.hidden, inner), 4, inner**-0.5).requires_grad_(),
            b1=bias(width, 5),
            b2=bias(shape.hidden, 6),
            activation=activation,
            layout=GATE_LAYOUTS[self.options.gate_layout],
        )

    def _router(self) -> Tensor:
        """(E, H)."""
        num_experts, hidden = self.shape.num_experts, self.shape.hidden
        router_w = self._normal((num_experts, hidden), 1, hidden**-0.5, alike=True)
        ranks = self.ranks_of_routing or self.group.world_size
        offsets = logit_offsets(self.options.routing, num_experts, ranks)
        if offsets is not None:
            router_w[:, 0] = offsets.to(router_w)
        return router_w

    def _tokens_without_ties(self, router_w: Tensor) -> Tensor:
        """Tokens (T, H), those with near ties drawn anew. Raises ``ValueError`` if some stay."""
        shape, generator = self.shape, self._generator(0)
        x_TH = torch.empty((shape.tokens, shape.hidden), dtype=shape.dtype, device=self.device)
        near_T = torch.ones(shape.tokens, dtype=torch.bool, device=self.device)
        for _ in range(MOST_DRAWS):
            x_TH[near_T] = x_TH[near_T].normal_(generator=generator)
            if self.options.routing is not RoutingKind.UNIFORM:
                x_TH[:, 0] = 1
            near_T = near_ties(x_TH.float() @ router_w.float().t(), shape.top_k)
            if not bool(near_T.any()):
                return x_TH
        raise ValueError(
            f"{self.group}: H: got {shape.hidden}, expected so many that the logits of {shape.num_experts} experts "
            f"differ: {int(near_T.sum())} of {shape.tokens} tokens have near ties after {MOST_DRAWS} draws"
        )

    def _normal(self, size: tuple[int, ...], stream: int, scale: float = 1.0, *, alike: bool = False) -> Tensor:
        generator = self._generator(stream, alike=alike)
        return torch.empty(size, dtype=self.shape.dtype, device=self.device).normal_(0, scale, generator=generator)

    def _generator(self, stream: int, *, alike: bool = False) -> torch.Generator:
        """Random numbers of this rank, or ``alike`` on all of them, for one of its tensors."""
        return torch.Generator(self.device).manual_seed(100_000 + 1000 * stream + (0 if alike else self.group.rank))
