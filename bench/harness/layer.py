"""A layer under test: its right answer, the least that it costs, and each of its passes as a case to time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

import torch

from harness.context import BenchCase, BenchContext, Comparison, other_inputs
from harness.products import Products
from sonic_ep.api import ExpertParallel
from sonic_ep.config import CombineMode, DispatchMode, EPConfig, ModePair
from sonic_ep.cost import WAY_OF_COMBINE, WAY_OF_DISPATCH, combine_traffic, dispatch_traffic
from sonic_ep.profiler.agreement import WrongResultError, in_step
from sonic_ep.profiler.problem import RoutingProblem, Shape
from sonic_ep.profiler.verification import assert_bitwise, expect
from sonic_ep.reference.router import choose_experts
from sonic_ep.testing.answer import Answer, faults_of, judge, oracle_of
from sonic_ep.testing.layer_problem import LayerProblem
from sonic_ep.testing.oracle import LOGITS, LayerCall, Oracle, Outcome


def modes_of(config: EPConfig) -> ModePair:
    """The modes of a configuration that has them."""
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
        gradients = self is Pass.STEP
        return {name: out for name, out in outcome.items() if gradients or not name.startswith("d")}


@dataclass(frozen=True, kw_only=True, eq=False)
class ProvenCall:
    """A call and the outcome that was found right, whose bits every later call has to give."""

    shape: Shape
    call: LayerCall
    outcome: Outcome
    flops: Mapping[Pass, float] | None = None

    def case(self, name: str, ep: ExpertParallel, which: Pass) -> BenchCase:
        """A pass of it over ``ep``."""
        expected = which.part_of(self.outcome)

        def check(got: Outcome) -> None:
            expect(got.keys() == expected.keys(), f"got {', '.join(got)}, expected {', '.join(expected)}")
            for part, right in expected.items():
                assert_bitwise(got[part], right, part)

        call = self.call
        return BenchCase(
            name=name,
            shape=self.shape,
            run=lambda: which.run(call, ep),
            check=check,
            other_inputs=lambda: other_inputs(*call.leaves.values(), call.dy),
            flops=None if self.flops is None else self.flops[which],
        )


def expect_everywhere(context: BenchContext, faults: Sequence[str], name: str = "") -> None:
    """Collective. Raises ``WrongResultError`` on every rank of the context if any of them has faults."""
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
        return ExpertParallel(
            self.problem.group.process_group,
            backend=backend or self.backend,
            config=config or self.config,
            max_tokens_per_rank=max(1, self.shape.tokens),
        )

    @cached_property
    def judged(self) -> Answer:
        """Collective: the answer, right or wrong. The reference says how accurate other backends have to be."""
        reference = None
        with self.over() as ep:
            outcome = self.problem.call.run(ep)
        if self.backend != "reference":
            # Exact sizes are for what is large.
            exact = replace(self.config, redispatch_x_in_backward=False, cpu_sync_on_runtime=True)
            with self.over(exact, "reference") as ep:
                reference = self.problem.call.run(ep)
        answer = judge(self.oracle, outcome, reference)
        self.context.free_cached_memory()
        return answer

    @property
    def answer(self) -> Answer:
        """Collective. Raises ``WrongResultError`` on every rank if it is wrong on any."""
        expect_everywhere(self.context, self.judged.faults)
        return self.judged

    @property
    def choices(self) -> torch.Tensor:
        """The experts that the layer's router has chosen, (T, K) int64."""
        return choose_experts(self.judged.outcome[LOGITS], self.shape.top_k)

    @cached_property
    def routing(self) -> RoutingProblem:
        """Where the layer's router sends its tokens."""
        problem = self.problem
        return RoutingProblem(shape=problem.shape, group=problem.group, device=problem.device, routing=self.choices)

    def products(self) -> Products:
        """Of the rows that come here: as large as what passes through the layer, so the caller's to keep."""
        return Products.of(self.problem, self.routing.plan.group_ends, self.routing.valid_rows)

    @cached_property
    def flops(self) -> Mapping[Pass, float]:
        """Operations of a rank's GEMMs, the mean over the ranks: 2 for each number of a weight and row, 3 passes."""
        experts = self.problem.call.experts
        per_row = experts.w1[0].numel() + experts.w2[0].numel()
        rows = self.routing.mean(lambda counts: counts.rows)
        return {which: (6.0 if which is Pass.STEP else 2.0) * per_row * rows for which in Pass}

    def link_seconds(self, modes: ModePair, which: Pass) -> float | None:
        """What the busiest rank's rows take at the ceilings, there and back, in backward once more; None without any.

        Ids, scores and their gradients, and x where it is gathered again, are not counted.
        """
        if self.context.group.world_size == 1:
            return 0.0
        row_bytes, counts = self.shape.row_bytes, self.routing.counts
        there = [dispatch_traffic(of_rank, row_bytes)[modes.dispatch] for of_rank in counts]
        back = [combine_traffic(of_rank, row_bytes)[modes.combine] for of_rank in counts]
        seconds = 0.0
        for moved, way in ((there, WAY_OF_DISPATCH[modes.dispatch]), (back, WAY_OF_COMBINE)):
            nbytes = max(max(of_rank.link_in, of_rank.link_out) for of_rank in moved)
            traffic = self.context.traffic(nbytes, way)
            if traffic is None or traffic.floor is None:
                return None
            seconds += which.trips * traffic.floor[0]
        return seconds

    def case(self, name: str, ep: ExpertParallel, which: Pass, compared_with: tuple[Comparison, ...] = ()) -> BenchCase:
        """A pass over ``ep``: the answer's very bits, or if it is another backend's, an answer as accurate."""
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
        case = products.case(name, self.shape, backward=which is Pass.STEP)
        return replace(case, flops=self.flops[which])
