"""A layer drawn at random for this rank: its inputs, its options, and how its router is made to route."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor

from sonic_ep.activation import ACTIVATIONS
from sonic_ep.api import ExpertParallel, MoEOutput
from sonic_ep.benchmark.workload import Shape
from sonic_ep.config import RouterOptions, ScoreOrder
from sonic_ep.distributed.group import EPGroup
from sonic_ep.reference.router import choose_experts

# Routers that round differently choose alike where the least logit chosen is so far above the next one.
APART = 1e-3
# How often tokens are drawn anew. Of a router of one column they all have near ties or none has.
MOST_DRAWS = 1000
# Logits are about normal with deviation 1; what stands so far above the others is always chosen.
FAR = 16.0


class RoutingKind(str, Enum):
    """Where a router sends tokens: anywhere alike; to expert j the less the larger j is; to the last rank alone."""

    UNIFORM = "uniform"
    SKEWED = "skewed"
    ONE_RANK = "one_rank"


def logit_offsets(kind: RoutingKind, num_experts: int, world_size: int) -> Tensor | None:
    """What is added to the logits of each expert, (E,) fp32; None for nothing.

    Skewed: -log(j + 1) to expert j. One rank: ``FAR`` to the experts of the last of ``world_size`` ranks.

    >>> logit_offsets(RoutingKind.ONE_RANK, 4, 2)
    tensor([ 0.,  0., 16., 16.])
    """
    if kind is RoutingKind.UNIFORM:
        return None
    expert_E = torch.arange(num_experts, dtype=torch.float32)
    if kind is RoutingKind.SKEWED:
        return -(expert_E + 1).log()
    return FAR * (expert_E >= num_experts - num_experts // world_size)


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Options of a layer besides its shape; those of ``ExpertParallel.moe``. routing: where tokens go."""

    activation: str = "swiglu"
    gate_layout: str = "interleaved"
    score_order: ScoreOrder = ScoreOrder.TOPK_THEN_SOFTMAX
    norm_topk_probs: bool = False
    biased: bool = False
    routing: RoutingKind = RoutingKind.UNIFORM

    def up_width(self, intermediate: int) -> int:
        """Rows of an expert's w1: 2I or I."""
        return ACTIVATIONS[self.activation].up_width(intermediate)

    def router(self, top_k: int) -> RouterOptions:
        """What the router is asked for."""
        return RouterOptions(top_k=top_k, score_order=self.score_order, norm_topk_probs=self.norm_topk_probs)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerInputs:
    """What a layer is called with: leaves that require gradients, and the gradient of its output.

    x, out_grad (T, H); router_w (E, H); w1 (e, 2I or I, H), w2 (e, H, I); b1 (e, 2I or I) and b2 (e, H), or None.
    """

    x: Tensor
    out_grad: Tensor
    router_w: Tensor
    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None

    @property
    def leaves(self) -> dict[str, Tensor]:
        """All of them but for ``out_grad``, by name."""
        return {name: tensor for name, tensor in tensors_of(self).items() if name != "out_grad"}

    @property
    def experts(self) -> dict[str, Tensor]:
        """Weights and biases of the experts, by name."""
        return {name: tensor for name, tensor in self.leaves.items() if name not in ("x", "router_w")}


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What a layer gives: y (T, H) and logits (T, E) fp32, and behind a backward the gradient of every leaf."""

    y: Tensor
    logits: Tensor
    x_grad: Tensor | None = None
    router_w_grad: Tensor | None = None
    w1_grad: Tensor | None = None
    w2_grad: Tensor | None = None
    b1_grad: Tensor | None = None
    b2_grad: Tensor | None = None

    @property
    def forward(self) -> Outcome:
        """What there is of it without a backward."""
        return Outcome(y=self.y, logits=self.logits)


def tensors_of(given: LayerInputs | Outcome) -> dict[str, Tensor]:
    """Those that there are, by name."""
    found = {of_given.name: getattr(given, of_given.name) for of_given in fields(given)}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def gradients_by_name(leaves: Mapping[str, Tensor], found: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The fields of an ``Outcome`` that the gradients of ``leaves``, in their order, are."""
    return {f"{name}_grad": gradient for name, gradient in zip(leaves, found, strict=True)}


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerProblem:
    """A layer drawn for this rank: the router alike on every rank, tokens and experts its own.

    Where routing is not uniform, the first element of every token is 1, and the router's weight of it is what it adds
    to the logits of each expert. ranks_of_routing: those that it is about, if they are not the group's.
    """

    shape: Shape
    group: EPGroup
    device: torch.device
    options: LayerOptions = field(default_factory=LayerOptions)
    ranks_of_routing: int | None = None

    @cached_property
    def inputs(self) -> LayerInputs:
        """Normally distributed, weights scaled to keep the size of what they multiply, no near ties in the router."""
        shape, held, biased = self.shape, self.shape.num_experts // self.group.world_size, self.options.biased
        assert shape.intermediate is not None, "a shape without experts"
        width = self.options.up_width(shape.intermediate)
        router_w = self._router()
        return LayerInputs(
            x=self._tokens_apart(router_w).requires_grad_(),
            out_grad=self._normal((shape.tokens, shape.hidden), 2),
            router_w=router_w.requires_grad_(),
            w1=self._normal((held, width, shape.hidden), 3, shape.hidden**-0.5).requires_grad_(),
            w2=self._normal((held, shape.hidden, shape.intermediate), 4, shape.intermediate**-0.5).requires_grad_(),
            b1=self._normal((held, width), 5, 0.1).requires_grad_() if biased else None,
            b2=self._normal((held, shape.hidden), 6, 0.1).requires_grad_() if biased else None,
        )

    def inference(self, ep: ExpertParallel, inputs: LayerInputs) -> Outcome:
        """``ep.moe`` without gradients."""
        with torch.no_grad():
            return self._outcome(ep, inputs)

    def training_forward(self, ep: ExpertParallel, inputs: LayerInputs) -> Outcome:
        """``ep.moe`` that keeps what a backward would need, and lets go of it."""
        with torch.enable_grad():
            return self._outcome(ep, inputs)

    def forward_backward(self, ep: ExpertParallel, inputs: LayerInputs) -> Outcome:
        """``ep.moe`` and the gradients of all leaves."""
        with torch.enable_grad():
            out = self._moe(ep, inputs)
            found = torch.autograd.grad(out.y, list(inputs.leaves.values()), inputs.out_grad)
        gradients = gradients_by_name(inputs.leaves, found)
        return Outcome(y=out.y.detach(), logits=out.router_logits.detach(), **gradients)

    def choices(self, outcome: Outcome) -> Tensor:
        """The experts that a router has chosen, (T, K) int64."""
        return choose_experts(outcome.logits, self.shape.top_k)

    def _outcome(self, ep: ExpertParallel, inputs: LayerInputs) -> Outcome:
        out = self._moe(ep, inputs)
        return Outcome(y=out.y.detach(), logits=out.router_logits.detach())

    def _moe(self, ep: ExpertParallel, inputs: LayerInputs) -> MoEOutput:
        return ep.moe(
            inputs.x,
            inputs.router_w,
            inputs.w1,
            inputs.w2,
            self.shape.top_k,
            b1=inputs.b1,
            b2=inputs.b2,
            activation=self.options.activation,
            gate_layout=self.options.gate_layout,
            score_order=self.options.score_order,
            norm_topk_probs=self.options.norm_topk_probs,
        )

    @cached_property
    def _offsets(self) -> Tensor | None:
        ranks = self.ranks_of_routing or self.group.world_size
        return logit_offsets(self.options.routing, self.shape.num_experts, ranks)

    def _router(self) -> Tensor:
        """(E, H)."""
        size = (self.shape.num_experts, self.shape.hidden)
        router_w = self._normal(size, 1, self.shape.hidden**-0.5, alike=True)
        if self._offsets is not None:
            router_w[:, 0] = self._offsets.to(router_w)
        return router_w

    def _tokens_apart(self, router_w: Tensor) -> Tensor:
        """Tokens (T, H), those with a near tie where the choice ends drawn anew. Raises ``ValueError`` if some stay."""
        shape, generator = self.shape, self._generator(0)
        x_TH = torch.empty((shape.tokens, shape.hidden), dtype=shape.dtype, device=self.device)
        near_T = torch.ones(shape.tokens, dtype=torch.bool, device=self.device)
        for _ in range(MOST_DRAWS):
            x_TH[near_T] = x_TH[near_T].normal_(generator=generator)
            if self._offsets is not None:
                x_TH[:, 0] = 1
            near_T = near_ties(x_TH.float() @ router_w.float().t(), shape.top_k)
            if not bool(near_T.any()):
                return x_TH
        raise ValueError(
            f"{self.group}: H: got {shape.hidden}, expected so many that the logits of {shape.num_experts} experts "
            f"can be told apart: {int(near_T.sum())} of {shape.tokens} tokens were drawn {MOST_DRAWS} times in vain"
        )

    def _normal(self, size: tuple[int, ...], stream: int, scale: float = 1.0, *, alike: bool = False) -> Tensor:
        generator = self._generator(stream, alike=alike)
        return torch.empty(size, dtype=self.shape.dtype, device=self.device).normal_(0, scale, generator=generator)

    def _generator(self, stream: int, *, alike: bool = False) -> torch.Generator:
        """Random numbers of this rank, or ``alike`` on all of them, for one of its tensors."""
        return torch.Generator(self.device).manual_seed(100_000 + 1000 * stream + (0 if alike else self.group.rank))


def single_rank(problem: LayerProblem, alone: EPGroup) -> LayerProblem:
    """The layer with the same router and as many tokens, all of its experts on the one rank of ``alone``."""
    return replace(problem, group=alone, ranks_of_routing=problem.group.world_size)


def near_ties(logits_TE: Tensor, top_k: int) -> Tensor:
    """Which tokens, (T,) bool, have a logit not chosen that is less than ``APART`` below one that is.

    >>> near_ties(torch.tensor([[3.0, 1.0, 2.0], [3.0, 2.0, 2.0]]), 2)
    tensor([False,  True])
    """
    if top_k == logits_TE.shape[1]:
        return torch.zeros(logits_TE.shape[0], dtype=torch.bool, device=logits_TE.device)
    largest = logits_TE.topk(top_k + 1, dim=1).values
    return largest[:, top_k - 1] - largest[:, top_k] < APART
