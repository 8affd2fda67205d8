"""What a layer is held against: its routing given, the same rows without a link, and all experts on one GPU.

What these compute is checked on some of their tokens against the dense oracle: they are the layer itself, over other
groups, and a check of all of it would take longer than the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from sonic_ep.activation import ACTIVATIONS, GATE_LAYOUTS
from sonic_ep.api import ExpertParallel
from sonic_ep.backend import Experts
from sonic_ep.benchmark.arena import Work
from sonic_ep.benchmark.layer import LayerUnderTest, Pass, runner
from sonic_ep.benchmark.layer_problem import LayerOptions, LayerProblem, Outcome, single_rank
from sonic_ep.benchmark.oracle import wider
from sonic_ep.benchmark.workload import Shape
from sonic_ep.config import RouterOptions
from sonic_ep.group import EPGroup
from sonic_ep.plan import RoutingPlan
from sonic_ep.reference.dense import dense_moe, dense_scores
from sonic_ep.reference.router import choose_experts
from sonic_ep.testing.checks import assert_as_accurate, expect

# Tokens of which the answer is checked.
CHECKED = 64


def group_of_this_rank(group: EPGroup) -> dist.ProcessGroup | None:
    """Collective: a process group of this rank alone; None where there is no other rank."""
    if group.world_size == 1:
        return group.process_group
    members = dist.get_process_group_ranks(group.process_group)
    groups: list[dist.ProcessGroup] = [dist.new_group([member]) for member in members]
    return groups[group.rank]


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
    leaves: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.leaves[:] = [self.x, self.topk_scores, *self.experts.values()]

    def run(self, ep: ExpertParallel, which: Pass) -> list[Tensor]:
        """The output (T, H), and behind a backward the gradients of x, the scores and the experts."""
        with torch.set_grad_enabled(which is not Pass.INFERENCE):
            y = self.forward(ep)
            found = torch.autograd.grad(y, self.leaves, self.out_grad) if which is Pass.STEP else ()
        return [y.detach(), *found]

    def in_fp32(self) -> RoutedCall:
        """The same numbers in fp32."""
        experts = {name: weight.detach().float().requires_grad_() for name, weight in self.experts.items()}
        x, scores = (tensor.detach().float().requires_grad_() for tensor in (self.x, self.topk_scores))
        return replace(self, x=x, topk_scores=scores, experts=experts, out_grad=self.out_grad.float(), leaves=[])

    def forward(self, ep: ExpertParallel) -> Tensor:
        """The output, (T, H)."""
        names = {"activation": self.options.activation, "gate_layout": self.options.gate_layout}
        return ep.moe_routed(self.x, self.topk_idx, self.topk_scores, **self.experts, **names)  # type: ignore[arg-type]

    def work(self, name: str, ep: ExpertParallel, which: Pass, flops: float) -> Work:
        """A pass, checked by ``expect_of_some``; on several ranks only for finite numbers: the layer is checked."""

        def check(got: list[Tensor]) -> None:
            expect(all(bool(tensor.isfinite().all()) for tensor in got), "what came is not finite")
            if ep.world_size == 1:
                expect_of_some(got[0], self.x, self.topk_idx, self.topk_scores, self.oracle_experts)

        inputs = (self.x, self.out_grad, *self.experts.values())
        function = lambda: self.run(ep, which)  # noqa: E731
        return Work(name=name, shape=self.shape, function=function, check=check, inputs=inputs, flops=flops)

    @property
    def oracle_experts(self) -> Experts:
        """The experts as the oracle wants them."""
        return experts_of(self.experts, self.options)


def given_routing(layer: LayerUnderTest) -> RoutedCall:
    """The layer's own tokens, experts and choices, without its router."""
    problem, answer = layer.problem, layer.answer
    chosen = problem.choices(answer.outcome)
    scores = dense_scores(answer.outcome.logits, chosen, problem.options.router(problem.shape.top_k))
    return RoutedCall(
        shape=problem.shape,
        options=problem.options,
        x=problem.inputs.x,
        out_grad=problem.inputs.out_grad,
        topk_idx=chosen,
        topk_scores=scores.detach().requires_grad_(),
        experts=problem.inputs.experts,
    )


def same_rows(layer: LayerUnderTest) -> RoutedCall:
    """A layer of this rank alone whose experts get as many rows as in the group: nothing but the link is missing.

    With ends [2, 3] of two experts and K=2 there are 3 slots, so two tokens, one slot of them dropped.
    """
    problem, plan = layer.problem, layer.routed.plan
    generator = torch.Generator(problem.device).manual_seed(7 + problem.group.rank)
    topk_idx = experts_of_rows(plan, generator)
    tokens = topk_idx.shape[0]

    def normal(dtype: torch.dtype, width: int) -> Tensor:
        return torch.randn((tokens, width), generator=generator, device=problem.device).to(dtype)

    shape = replace(problem.shape, tokens=tokens, num_experts=plan.experts_per_rank)
    return RoutedCall(
        shape=shape,
        options=problem.options,
        x=normal(shape.dtype, shape.hidden).requires_grad_(),
        out_grad=normal(shape.dtype, shape.hidden),
        topk_idx=topk_idx,
        topk_scores=normal(torch.float32, shape.top_k).softmax(dim=1).requires_grad_(),
        experts=problem.inputs.experts,
    )


def experts_of_rows(plan: RoutingPlan, generator: torch.Generator) -> Tensor:
    """The expert of each row of this rank, in random order, K to a token, (T', K); -1 fills the last token up."""
    ends_e = plan.group_ends.long()
    sizes_e = ends_e.diff(prepend=ends_e.new_zeros(1))
    expert_N = torch.repeat_interleave(torch.arange(len(sizes_e), device=ends_e.device), sizes_e)
    order = torch.randperm(len(expert_N), generator=generator, device=ends_e.device)
    tokens = -(-len(expert_N) // plan.top_k)
    slots = expert_N.new_full((tokens * plan.top_k,), -1)
    slots[: len(expert_N)] = expert_N[order]
    return slots.view(tokens, plan.top_k)


@dataclass(frozen=True, kw_only=True, eq=False)
class OneGpu:
    """The layer with all of its experts on one rank, and as many tokens as a rank of the group has."""

    problem: LayerProblem

    @staticmethod
    def of(layer: LayerUnderTest) -> OneGpu:
        """Drawn anew."""
        return OneGpu(problem=single_rank(layer.problem))

    def work(self, name: str, ep: ExpertParallel, which: Pass) -> Work:
        """A pass of it, checked on some tokens."""
        problem, inputs = self.problem, self.problem.inputs
        per_row = sum(weight[0].numel() for weight in (inputs.w1, inputs.w2))
        flops = 2.0 * which.times * per_row * problem.shape.tokens * problem.shape.top_k
        function = lambda: runner(problem, which)(ep, inputs)  # noqa: E731
        given = (*inputs.leaves.values(), inputs.out_grad)
        return Work(name=name, shape=problem.shape, function=function, check=self._check, inputs=given, flops=flops)

    def _check(self, got: Outcome) -> None:
        shape, options = self.problem.shape, self.problem.options
        chosen, scores = chosen_and_scores(got.logits, options.router(shape.top_k))
        inputs = self.problem.inputs
        expect_of_some(got.y, inputs.x, chosen, scores, experts_of(inputs.experts, options))


def chosen_and_scores(logits: Tensor, options: RouterOptions) -> tuple[Tensor, Tensor]:
    """Choices and scores (T, K) that logits mean."""
    chosen = choose_experts(logits, options.top_k)
    return chosen, dense_scores(logits, chosen, options)


def experts_of(weights: dict[str, Tensor], options: LayerOptions) -> Experts:
    """Experts as the oracle wants them."""
    return Experts(
        w1=weights["w1"].detach(),
        w2=weights["w2"].detach(),
        b1=weights["b1"].detach() if "b1" in weights else None,
        b2=weights["b2"].detach() if "b2" in weights else None,
        activation=ACTIVATIONS[options.activation],
        layout=GATE_LAYOUTS[options.gate_layout],
    )


def expect_of_some(y: Tensor, x: Tensor, topk_idx: Tensor, topk_scores: Tensor, experts: Experts) -> None:
    """Raise ``AssertionError`` unless some tokens of ``y`` are as accurate as plain PyTorch's."""
    if not x.shape[0]:
        return
    some = torch.linspace(0, x.shape[0] - 1, min(CHECKED, x.shape[0]), device=x.device).long()
    # The oracle loops over all experts; one that none of these tokens has chosen adds nothing.
    chosen, few = compacted(topk_idx[some], experts)

    def dense(dtype: torch.dtype) -> Tensor:
        weights = each_weight(few, lambda weight: weight.to(dtype))
        scores = topk_scores[some].detach().to(torch.promote_types(dtype, torch.float32))
        return dense_moe(x[some].detach().to(dtype), chosen, scores, weights)

    assert_as_accurate(y[some], dense(wider(x.dtype)), dense(x.dtype), "tokens looked at")


def each_weight(experts: Experts, change: Callable[[Tensor], Tensor]) -> Experts:
    """The same with ``change`` of every weight and bias."""
    b1 = None if experts.b1 is None else change(experts.b1)
    b2 = None if experts.b2 is None else change(experts.b2)
    return replace(experts, w1=change(experts.w1), w2=change(experts.w2), b1=b1, b2=b2)


def compacted(topk_idx: Tensor, experts: Experts) -> tuple[Tensor, Experts]:
    """The choices among those experts alone that are chosen, and these.

    Choices [[4, 9], [9, -1]] become [[0, 1], [1, -1]] of experts 4 and 9.
    """
    used = topk_idx[topk_idx >= 0].unique()
    place = torch.full((experts.w1.shape[0] + 1,), -1, dtype=torch.int64, device=topk_idx.device)
    place[used] = torch.arange(len(used), device=topk_idx.device)
    # The last place is that of -1.
    return place[topk_idx.long()], each_weight(experts, lambda weight: weight[used])
