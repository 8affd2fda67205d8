"""What a layer is held against: its routing given, the same rows without a link, and all experts on one GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from sonic_ep.api import ExpertParallel
from sonic_ep.benchmark.arena import Work, agree
from sonic_ep.benchmark.layer import LayerUnderTest, Pass, bitwise_work
from sonic_ep.benchmark.layer_problem import LayerProblem, Outcome, single_rank
from sonic_ep.benchmark.oracle import Oracle
from sonic_ep.benchmark.routed_call import RoutedCall
from sonic_ep.group import EPGroup, resolve_group
from sonic_ep.plan import RoutingPlan
from sonic_ep.reference.dense import dense_scores
from sonic_ep.testing.checks import expect


def group_of_this_rank(group: EPGroup) -> EPGroup:
    """Collective: a group of this rank alone."""
    if group.world_size == 1:
        return group
    members = dist.get_process_group_ranks(group.process_group)
    groups: list[dist.ProcessGroup] = [dist.new_group([member]) for member in members]
    return resolve_group(groups[group.rank])


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
    tokens, top_k = topk_idx.shape

    def normal(dtype: torch.dtype, width: int) -> Tensor:
        return torch.randn((tokens, width), generator=generator, device=problem.device).to(dtype)

    shape = replace(problem.shape, tokens=tokens, top_k=top_k, num_experts=plan.experts_per_rank)
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
    """The expert of each row of this rank, in random order, min(K, e) to a token; -1 fills the last token up."""
    ends_e = plan.group_ends.long()
    sizes_e = ends_e.diff(prepend=ends_e.new_zeros(1))
    expert_N = torch.repeat_interleave(torch.arange(len(sizes_e), device=ends_e.device), sizes_e)
    order = torch.randperm(len(expert_N), generator=generator, device=ends_e.device)
    # A token cannot choose more experts than there are.
    slots_of_token = min(plan.top_k, len(sizes_e))
    tokens = -(-len(expert_N) // slots_of_token)
    slots = expert_N.new_full((tokens * slots_of_token,), -1)
    slots[: len(expert_N)] = expert_N[order]
    return slots.view(tokens, slots_of_token)


@dataclass(frozen=True, kw_only=True, eq=False)
class OneGpu:
    """A layer with all of its experts on one rank, and the outcome that was found right."""

    problem: LayerProblem
    outcome: Outcome
    flops: Mapping[Pass, float]

    @staticmethod
    def of(layer: LayerUnderTest, alone: EPGroup) -> OneGpu:
        """Collective: with as many tokens as a rank of the group has. Raises ``WrongError`` on all if it is wrong.

        alone: the group of this rank. What it was held against is let go: all experts are large.
        """
        problem = single_rank(layer.problem, alone)
        whole = replace(layer, arena=replace(layer.arena, group=alone), oracle=Oracle(problem=problem))
        faults = whole.judged.faults
        agree(layer.arena.group, lambda: expect(not faults, f"all experts on one rank: {'; '.join(faults)}"))
        return OneGpu(
            problem=problem,
            outcome=whole.judged.outcome,
            flops={which: whole.flops(which) for which in Pass},
        )

    def work(self, name: str, ep: ExpertParallel, which: Pass) -> Work:
        """A pass of it."""
        work = bitwise_work(name, self.problem, self.outcome, ep, which)
        return replace(work, flops=self.flops[which])
