"""What a layer is compared with: its routing given, the same rows without a link, and all experts on one GPU."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from harness.context import BenchContext
from harness.layer import LayerUnderTest, ProvenCall, expect_everywhere
from sonic_ep.api import ExpertParallel
from sonic_ep.distributed.group import EPGroup, resolve_group
from sonic_ep.plan import RoutingPlan
from sonic_ep.profiler.problem import Shape
from sonic_ep.reference.dense import dense_scores
from sonic_ep.testing.answer import judge, oracle_of
from sonic_ep.testing.oracle import LOGITS, RoutedCall


def group_of_this_rank(group: EPGroup) -> EPGroup:
    """Collective: a group of this rank alone."""
    if group.world_size == 1:
        return group
    members = dist.get_process_group_ranks(group.process_group)
    groups: list[dist.ProcessGroup] = [dist.new_group([member]) for member in members]
    return resolve_group(groups[group.rank])


def given_routing(layer: LayerUnderTest) -> RoutedCall:
    """The layer's own tokens, experts and choices, without its router."""
    call, chosen = layer.problem.call, layer.choices
    scores = dense_scores(layer.answer.outcome[LOGITS], chosen, call.options)
    return RoutedCall(
        x=call.x, dy=call.dy, experts=call.experts, topk_idx=chosen, topk_scores=scores.detach().requires_grad_()
    )


def same_rows(layer: LayerUnderTest) -> RoutedCall:
    """A call of this rank alone whose experts get as many rows as in the group: nothing but the link is missing.

    With ends [2, 3] of two experts and K=2 there are 3 slots, so two tokens, one slot of them dropped.
    """
    problem, plan, shape = layer.problem, layer.routing.plan, layer.shape
    generator = torch.Generator(problem.device).manual_seed(7 + problem.group.rank)
    topk_idx = experts_of_rows(plan, generator)

    def normal(dtype: torch.dtype, width: int) -> Tensor:
        return torch.randn((topk_idx.shape[0], width), generator=generator, device=problem.device).to(dtype)

    return RoutedCall(
        x=normal(shape.dtype, shape.hidden).requires_grad_(),
        dy=normal(shape.dtype, shape.hidden),
        experts=problem.call.experts,
        topk_idx=topk_idx,
        topk_scores=normal(torch.float32, topk_idx.shape[1]).softmax(dim=1).requires_grad_(),
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


def prove_routed(layer: LayerUnderTest, call: RoutedCall, group: EPGroup) -> ProvenCall:
    """Collective: a call of ``moe_routed`` over ``group`` with the backend, modes and FLOPs of the layer."""
    experts = layer.shape.num_experts // layer.problem.group.world_size * group.world_size
    shape = replace(layer.shape, tokens=call.x.shape[0], top_k=call.top_k, num_experts=experts)
    with ExpertParallel(group.process_group, layer.backend, layer.config) as ep:
        return replace(prove_call(layer.context, shape, call, ep), flops=layer.flops)


def prove_call(context: BenchContext, shape: Shape, call: RoutedCall, ep: ExpertParallel) -> ProvenCall:
    """Collective: hold a call against the oracle. Raises ``WrongResultError`` on every rank if it is wrong on any."""
    answer = judge(oracle_of(call, ep.group), call.run(ep))
    context.free_cached_memory()
    expect_everywhere(context, answer.faults)
    return ProvenCall(shape=shape, call=call, outcome=answer.outcome)


def prove_one_gpu(layer: LayerUnderTest, alone: EPGroup) -> ProvenCall:
    """Collective: the layer with all of its experts on this rank, and as many tokens as a rank of the group has.

    Raises ``WrongResultError`` on every rank if it is wrong on any. Only the outcome is kept: all experts are large.
    """
    whole = LayerUnderTest.of(layer.context, layer.problem.on_one_rank(alone), layer.backend, layer.config)
    expect_everywhere(layer.context, whole.judged.faults, "all experts on one rank: ")
    return ProvenCall(shape=whole.shape, call=whole.problem.call, outcome=whole.judged.outcome, flops=whole.flops)
