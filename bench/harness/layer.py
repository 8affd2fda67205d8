"""A layer under test: its right answer, the least that it costs, each of its passes as a case, and its baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from harness.context import BenchCase, BenchContext, Comparison, other_inputs
from harness.products import Products
from sonic_ep.api import ExpertParallel
from sonic_ep.config import CombineMode, DispatchMode, EPConfig, ModePair
from sonic_ep.cost import WAY_OF_COMBINE, WAY_OF_DISPATCH, combine_traffic, dispatch_traffic
from sonic_ep.distributed.group import EPGroup, resolve_group
from sonic_ep.plan import RoutingPlan
from sonic_ep.profiler.agreement import WrongResultError, in_step
from sonic_ep.profiler.problem import RoutingProblem, Shape
from sonic_ep.profiler.verification import assert_bitwise, expect
from sonic_ep.reference.dense import dense_scores
from sonic_ep.reference.router import choose_experts
from sonic_ep.testing.answer import Answer, faults_of, judge, oracle_of
from sonic_ep.testing.layer_problem import LayerProblem
from sonic_ep.testing.oracle import LOGITS, LayerCall, Oracle, Outcome, RoutedCall


def modes_of(config: EPConfig) -> ModePair:
    """The modes of a configuration without ``"auto"``."""
    return ModePair(dispatch=DispatchMode(config.dispatch), combine=CombineMode(config.combine))


class Pass(str, Enum):
    """What is timed of a layer."""

    INFERENCE = "forward, inference"
    TRAINING = "forward, training"
    STEP = "forward and backward"

    @property
    def trips(self) -> int:
        """How often rows go there and back over the link."""
        return 2 if self is Pass.STEP else 1

    def run(self, call: LayerCall, ep: ExpertParallel) -> Outcome:
        """This pass of the call."""
        return call.run(ep, training=self is not Pass.INFERENCE, backward=self is Pass.STEP)

    def part_of(self, outcome: Outcome) -> Outcome:
        """What this pass gives of the outcome of a forward and backward."""
        return {name: out for name, out in outcome.items() if self is Pass.STEP or not name.startswith("d")}


@dataclass(frozen=True, kw_only=True, eq=False)
class ProvenCall:
    """A call and the outcome that was found right, whose bits every later call has to give."""

    shape: Shape
    call: LayerCall
    outcome: Outcome
    flops: Mapping[Pass, float] | None = None

    def case(self, name: str, ep: ExpertParallel, which: Pass) -> BenchCase:
        """A pass of it over ``ep``."""
        call, expected = self.call, which.part_of(self.outcome)

        def check(got: Outcome) -> None:
            expect(got.keys() == expected.keys(), f"got {', '.join(got)}, expected {', '.join(expected)}")
            for part, right in expected.items():
                assert_bitwise(got[part], right, part)

        return BenchCase(
            name=name,
            shape=self.shape,
            run=lambda: which.run(call, ep),
            check=check,
            other_inputs=lambda: other_inputs(*call.leaves.values(), call.dy),
            flops=None if self.flops is None else self.flops[which],
        )


def expect_everywhere(context: BenchContext, answer: Answer, name: str = "") -> None:
    """Collective. Raises ``WrongResultError`` on every rank of the context if the answer is wrong on any of them."""
    faults = answer.faults
    in_step(context.group, lambda: expect(not faults, name + "; ".join(faults)), AssertionError, WrongResultError)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerUnderTest:
    """A random layer, and the backend and configuration whose answer counts; its group may be this rank alone."""

    context: BenchContext
    problem: LayerProblem
    oracle: Oracle
    backend: str
    config: EPConfig

    @staticmethod
    def of(context: BenchContext, problem: LayerProblem, backend: str, config: EPConfig) -> LayerUnderTest:
        """With an oracle of its own."""
        oracle = oracle_of(problem.call, problem.group)
        return LayerUnderTest(context=context, problem=problem, oracle=oracle, backend=backend, config=config)

    @property
    def shape(self) -> Shape:
        """T of this rank, H, I, E and K."""
        return self.problem.shape

    def over(self, config: EPConfig | None = None, backend: str | None = None) -> ExpertParallel:
        """An ``ExpertParallel`` for the layer, by default of the configuration that counts."""
        group, most = self.problem.group.process_group, max(1, self.shape.tokens)
        return ExpertParallel(group, backend or self.backend, config or self.config, max_tokens_per_rank=most)

    @cached_property
    def judged(self) -> Answer:
        """Collective: the answer, right or wrong. The reference says how accurate other backends have to be."""
        reference = None
        with self.over() as ep:
            outcome = self.problem.call.run(ep)
        if self.backend != "reference":
            # Exact sizes, so that the reference fits at large shapes.
            exact = replace(self.config, redispatch_x_in_backward=False, cpu_sync_on_runtime=True)
            with self.over(exact, "reference") as ep:
                reference = self.problem.call.run(ep)
        answer = judge(self.oracle, outcome, reference)
        self.context.free_cached_memory()
        return answer

    @property
    def answer(self) -> Answer:
        """Collective. Raises ``WrongResultError`` on every rank if it is wrong on any."""
        expect_everywhere(self.context, self.judged)
        return self.judged

    @property
    def choices(self) -> Tensor:
        """The experts that the layer's router has chosen, (T, K) int64."""
        return choose_experts(self.judged.outcome[LOGITS], self.shape.top_k)

    @cached_property
    def routing(self) -> RoutingProblem:
        """Where the layer's router sends its tokens."""
        problem = self.problem
        return RoutingProblem(shape=problem.shape, group=problem.group, device=problem.device, routing=self.choices)

    def products(self) -> Products:
        """The GEMMs over this rank's rows. Operands are as large as those of the layer: the caller frees them."""
        return Products(self.problem, self.routing.plan.group_ends, self.routing.valid_rows)

    @cached_property
    def flops(self) -> Mapping[Pass, float]:
        """Operations of a rank's GEMMs, the mean over the ranks: 2 for each number of a weight and row, 3 passes."""
        experts = self.problem.call.experts
        per_row = sum(weight[0].numel() for weight in (*experts.up_weights, experts.w2))
        rows = self.routing.mean(lambda counts: counts.rows)
        return {which: (6.0 if which is Pass.STEP else 2.0) * per_row * rows for which in Pass}

    def link_seconds(self, modes: ModePair, which: Pass) -> float | None:
        """Seconds of the busiest rank's rows at the ceilings, both ways in each trip of a pass; None without ceilings.

        Ids, scores and their gradients, and x where it is gathered again, are not counted.
        """
        if self.context.group.world_size == 1:
            return 0.0
        row_bytes, counts = self.shape.row_bytes, self.routing.counts
        there = [dispatch_traffic(of_rank, row_bytes)[modes.dispatch] for of_rank in counts]
        back = [combine_traffic(of_rank, row_bytes)[modes.combine] for of_rank in counts]
        seconds = 0.0
        for moved, way in ((there, WAY_OF_DISPATCH[modes.dispatch]), (back, WAY_OF_COMBINE)):
            traffic = self.context.traffic(max(max(of_rank.link_in, of_rank.link_out) for of_rank in moved), way)
            if traffic is None or traffic.floor is None:
                return None
            seconds += which.trips * traffic.floor[0]
        return seconds

    def case(self, name: str, ep: ExpertParallel, which: Pass, compared_with: tuple[Comparison, ...] = ()) -> BenchCase:
        """A pass over ``ep``, checked for the bits of the answer, or on another backend for its accuracy."""
        answer = self.answer
        proven = ProvenCall(shape=self.shape, call=self.problem.call, outcome=answer.outcome, flops=self.flops)
        case = replace(proven.case(name, ep, which), compared_with=compared_with if self.context.on_gpu else ())
        if ep.backend == self.backend:
            return case

        def check(got: Outcome) -> None:
            faults = faults_of(got, which.part_of(answer.truth), answer.plain)
            expect(not faults, "; ".join(faults))

        return replace(case, check=check)

    def products_alone(self, name: str, which: Pass, products: Products) -> BenchCase:
        """The GEMMs, of random numbers."""
        return replace(products.case(name, self.shape, backward=which is Pass.STEP), flops=self.flops[which])

    def given_routing(self) -> RoutedCall:
        """The layer's own tokens, experts and choices, without its router."""
        call, chosen = self.problem.call, self.choices
        scores = dense_scores(self.answer.outcome[LOGITS], chosen, call.options).detach().requires_grad_()
        return RoutedCall(x=call.x, dy=call.dy, experts=call.experts, topk_idx=chosen, topk_scores=scores)

    def same_rows(self) -> RoutedCall:
        """A call of this rank alone whose experts get as many rows as in the group: nothing but the link is missing."""
        problem, shape = self.problem, self.shape
        generator = torch.Generator(problem.device).manual_seed(7 + problem.group.rank)
        topk_idx = experts_of_rows(self.routing.plan, generator)

        def normal(dtype: torch.dtype, width: int) -> Tensor:
            return torch.randn((topk_idx.shape[0], width), generator=generator, device=problem.device).to(dtype)

        return RoutedCall(
            x=normal(shape.dtype, shape.hidden).requires_grad_(),
            dy=normal(shape.dtype, shape.hidden),
            experts=problem.call.experts,
            topk_idx=topk_idx,
            topk_scores=normal(torch.float32, topk_idx.shape[1]).softmax(dim=1).requires_grad_(),
        )

    def prove_routed(self, call: RoutedCall, group: EPGroup) -> ProvenCall:
        """Collective: a call of ``moe_routed`` over ``group`` with the backend, modes and FLOPs of the layer."""
        experts = self.shape.num_experts // self.problem.group.world_size * group.world_size
        shape = replace(self.shape, tokens=call.x.shape[0], top_k=call.top_k, num_experts=experts)
        with ExpertParallel(group.process_group, self.backend, self.config) as ep:
            return replace(prove_call(self.context, shape, call, ep), flops=self.flops)

    def prove_one_gpu(self, alone: EPGroup) -> ProvenCall:
        """Collective: the layer with all of its experts on this rank, and as many tokens as a rank of the group has.

        Raises ``WrongResultError`` on every rank if it is wrong on any. Only the outcome is kept: experts are large.
        """
        whole = LayerUnderTest.of(self.context, self.problem.on_one_rank(alone), self.backend, self.config)
        expect_everywhere(self.context, whole.judged, "all experts on one rank: ")
        return ProvenCall(shape=whole.shape, call=whole.problem.call, outcome=whole.judged.outcome, flops=whole.flops)


def group_of_this_rank(group: EPGroup) -> EPGroup:
    """Collective: a group of this rank alone."""
    if group.world_size == 1:
        return group
    groups = [dist.new_group([member]) for member in dist.get_process_group_ranks(group.process_group)]
    return resolve_group(groups[group.rank])


def experts_of_rows(plan: RoutingPlan, generator: torch.Generator) -> Tensor:
    """The expert of each row of this rank, in random order, min(K, e) to a token; -1 fills the last token up.

    With ends [2, 3] of two experts and K=2 there are 3 slots, so two tokens, one slot of them dropped.
    """
    ends_e = plan.group_ends.long()
    sizes_e = ends_e.diff(prepend=ends_e.new_zeros(1))
    expert_N = torch.repeat_interleave(torch.arange(len(sizes_e), device=ends_e.device), sizes_e)
    order = torch.randperm(len(expert_N), generator=generator, device=ends_e.device)
    # A token cannot choose more experts than there are.
    slots_of_token = min(plan.top_k, len(sizes_e))
    slots = expert_N.new_full((-(-len(expert_N) // slots_of_token), slots_of_token), -1)
    slots.view(-1)[: len(expert_N)] = expert_N[order]
    return slots


def prove_call(context: BenchContext, shape: Shape, call: RoutedCall, ep: ExpertParallel) -> ProvenCall:
    """Collective: hold a call against the oracle. Raises ``WrongResultError`` on every rank if it is wrong on any."""
    answer = judge(oracle_of(call, ep.group), call.run(ep))
    context.free_cached_memory()
    expect_everywhere(context, answer)
    return ProvenCall(shape=shape, call=call, outcome=answer.outcome)
