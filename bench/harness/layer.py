"""A layer under test: its right answer, what it costs at the least, and each of its passes as a work to time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from types import MappingProxyType

from torch import Tensor

from sonic_ep.api import ExpertParallel
from sonic_ep.benchmark.arena import Arena, Beside, Way, Work, agree
from sonic_ep.benchmark.layer_problem import LayerInputs, LayerProblem, Outcome, tensors_of
from sonic_ep.benchmark.oracle import Answer, Oracle, faults_of, judged
from sonic_ep.benchmark.products import Products
from sonic_ep.benchmark.workload import Problem
from sonic_ep.config import DispatchMode, EPConfig, ModePair
from sonic_ep.cost import WAY_OF_DISPATCH, combine_traffic, dispatch_traffic
from sonic_ep.testing.checks import assert_bitwise, expect

WAY: Mapping[DispatchMode, Way] = MappingProxyType({mode: Way(name) for mode, name in WAY_OF_DISPATCH.items()})


class Pass(str, Enum):
    """What is timed of a layer."""

    INFERENCE = "forward, inference"
    TRAINING = "forward, training"
    STEP = "forward and backward"

    @property
    def times(self) -> int:
        """How many times the products of a forward, in operations."""
        return 3 if self is Pass.STEP else 1

    @property
    def trips(self) -> int:
        """How often rows go there and back over the link."""
        return 2 if self is Pass.STEP else 1

    def part_of(self, outcome: Outcome) -> Outcome:
        """What this pass gives of the outcome of a forward and backward."""
        return outcome if self is Pass.STEP else outcome.forward


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerUnderTest:
    """A layer drawn for this rank, and the backend and configuration whose answer is the one that counts."""

    arena: Arena
    oracle: Oracle
    backend: str
    config: EPConfig

    @property
    def problem(self) -> LayerProblem:
        """The layer."""
        return self.oracle.problem

    def over(self, config: EPConfig | None = None, backend: str | None = None) -> ExpertParallel:
        """The layer of ``config``, by default the one that counts."""
        return ExpertParallel(
            self.arena.group.process_group,
            backend=backend or self.backend,
            config=config or self.config,
            max_tokens_per_rank=max(1, self.problem.shape.tokens),
        )

    @cached_property
    def judged(self) -> Answer:
        """Collective: the answer, right or wrong. Memory that the oracle has taken goes back."""
        with self.over() as ep:
            outcome = self.problem.forward_backward(ep, self.problem.inputs)
        # The oracle's own is the yardstick of the reference; its exact sizes are for what is large.
        plain = None
        if self.backend != "reference":
            exact = replace(self.config, redispatch_x_in_backward=False, cpu_sync_on_runtime=True)
            with self.over(exact, "reference") as reference:
                plain = self.problem.forward_backward(reference, self.problem.inputs)
        answer = judged(self.oracle, outcome, plain)
        self.arena.give_back_memory()
        return answer

    @property
    def answer(self) -> Answer:
        """Collective. Raises ``WrongError`` on every rank if it is wrong on any."""
        faults = self.judged.faults
        agree(self.arena.group, lambda: expect(not faults, "; ".join(faults)))
        return self.judged

    @cached_property
    def routed(self) -> Problem:
        """Where the layer's router sends its tokens."""
        problem, chosen_TK = self.problem, self.problem.choices(self.judged.outcome)
        return Problem(shape=problem.shape, group=problem.group, device=problem.device, chosen_TK=chosen_TK)

    def products(self) -> Products:
        """Of the rows that come here: as large as what passes through the layer, so the caller's to keep."""
        return Products.of(self.problem, self.routed.plan.group_ends, self.routed.valid_rows)

    def flops(self, which: Pass) -> float:
        """Operations of a rank's matrix products, the mean over the ranks: 2 for each number of a weight and row."""
        per_row = sum(weight[0].numel() for weight in (self.problem.inputs.w1, self.problem.inputs.w2))
        return 2.0 * which.times * per_row * self.routed.mean_over_ranks(lambda counts: counts.rows)

    def link_seconds(self, modes: ModePair, which: Pass) -> float | None:
        """What the rows take at the ceilings of the link, there and back, in backward once more; None without ceilings.

        Those of the busiest rank, and the least of them: ids, scores and their gradients, and x where it is gathered
        again, are not counted.
        """
        if self.arena.group.world_size == 1:
            return 0.0
        row_bytes, routed = self.problem.shape.row_bytes, self.routed
        there = routed.most_over_link(lambda counts: dispatch_traffic(counts, row_bytes)[modes.dispatch])
        back = routed.most_over_link(lambda counts: combine_traffic(counts, row_bytes)[modes.combine])
        seconds = 0.0
        for nbytes, way in ((there, WAY[modes.dispatch]), (back, Way.WRITE)):
            traffic = self.arena.traffic(nbytes, way)
            if traffic is None or traffic.floor is None:
                return None
            seconds += which.trips * traffic.floor.seconds
        return seconds

    def work(self, name: str, ep: ExpertParallel, which: Pass, beside: tuple[Beside, ...] = ()) -> Work:
        """The layer over ``ep``: the answer's very bits, or if it is another backend's, an answer as accurate."""
        answer = self.answer
        work = replace(bitwise_work(name, self.problem, answer.outcome, ep, which), flops=self.flops(which))
        work = replace(work, beside=beside if self.arena.on_gpu else ())
        if ep.backend == self.backend:
            return work

        def check(got: Outcome) -> None:
            faults = faults_of(got, which.part_of(answer.truth), answer.plain)
            expect(not faults, "; ".join(faults))

        return replace(work, check=check)

    def products_alone(self, name: str, which: Pass, products: Products) -> Work:
        """The matrix products, of random numbers."""
        operands = products.operands(backward=which is Pass.STEP)

        def check(got: list[Tensor]) -> None:
            for place, (found, (left, right)) in enumerate(zip(got, operands, strict=True)):
                products.expect_of_one_group(found, left, right, f"product {place}")

        return Work(
            name=name,
            shape=self.problem.shape,
            function=lambda: products.all_of(operands),
            check=check,
            inputs=(products.rows, products.out_grad, products.hidden_grad, products.activated),
            flops=self.flops(which),
        )


def bitwise_work(name: str, problem: LayerProblem, right: Outcome, ep: ExpertParallel, which: Pass) -> Work:
    """A pass of ``problem`` over ``ep``, whose every call has to give the bits of ``right``."""
    inputs, run = problem.inputs, runner(problem, which)

    def check(got: Outcome) -> None:
        for part, expected in tensors_of(which.part_of(right)).items():
            assert_bitwise(tensors_of(got)[part], expected, f"{name}: {part}")

    return Work(
        name=name,
        shape=problem.shape,
        function=lambda: run(ep, inputs),
        check=check,
        inputs=(*inputs.leaves.values(), inputs.out_grad),
    )


def runner(problem: LayerProblem, which: Pass) -> Callable[[ExpertParallel, LayerInputs], Outcome]:
    """How ``problem`` runs a pass."""
    runners = {
        Pass.INFERENCE: problem.inference,
        Pass.TRAINING: problem.training_forward,
        Pass.STEP: problem.forward_backward,
    }
    return runners[which]
