"""The layer: ``ep.moe`` forward, and forward with backward, beside its matrix products alone and beside the reference.

What is compared takes turns, round by round, so one alternation is measured for several benches: the first of them that
runs has it measured, each reports its own share. Bars are held where the host gets ahead, as it does in training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

import pytest
import torch
from arena import Arena, Beside, How, Rounds, Way, Work, WrongError, agree
from bench_dispatch import WAY
from report import Entry
from torch import Tensor
from usual import Answer, Products, faults_of
from workload import LayerProblem, Outcome, Problem, tensors_of

from sonic_ep import CombineMode, DispatchMode, EPConfig, ExpertParallel
from sonic_ep.cost import combine_traffic, dispatch_traffic
from sonic_ep.testing import assert_bitwise
from sonic_ep.testing.checks import expect

Found = Mapping[str, Entry | WrongError]
Tell = Callable[[Entry], None]

ROUNDS = Rounds(timed=12, warmup=2)
ROUNDS_BESIDE_REFERENCE = Rounds(timed=4, warmup=1)
# Under the interpreter a step takes half a second and more.
ROUNDS_INTERPRETED = Rounds(timed=1, warmup=0)
COMBINE = CombineMode.RANK_DEDUP
# At most so many times the reference's time, and the time without flags.
MOST_OF_REFERENCE = 0.5
MOST_WITH_X_AGAIN = 1.03


class Pass(str, Enum):
    """What is timed of a layer."""

    FORWARD = "forward"
    STEP = "forward and backward"

    @property
    def times(self) -> int:
        """How many times the products of a forward, in operations, and the bytes of one, there and back."""
        return 1 if self is Pass.FORWARD else 3

    @property
    def trips(self) -> int:
        """How often rows go there and back over the link."""
        return 1 if self is Pass.FORWARD else 2

    @property
    def most(self) -> float:
        """The bar: at most so many times the products and the bytes."""
        return 1.15 if self is Pass.FORWARD else 1.20


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A dispatch mode and flags of ``EPConfig``, and whether there are biases."""

    dispatch: DispatchMode = DispatchMode.ALL_TO_ALL
    again: bool = False
    sync: bool = False
    biased: bool = False

    @property
    def config(self) -> EPConfig:
        """As the layer wants it."""
        flags = {"redispatch_x_in_backward": self.again, "cpu_sync_on_runtime": self.sync}
        return EPConfig(dispatch=self.dispatch, combine=COMBINE, **flags)

    def __str__(self) -> str:
        flags = {"redispatch": self.again, "cpu_sync": self.sync, "biases": self.biased}
        words = [f"{self.dispatch.value}, {COMBINE.value}", *(name for name, given in flags.items() if given)]
        return ", ".join(words)


BASE = Setting()
AGAIN = Setting(again=True)
SYNC = Setting(sync=True)
BOTH = Setting(again=True, sync=True)
BY_RANK = Setting(dispatch=DispatchMode.RANK_DEDUP)
GATHERED = Setting(dispatch=DispatchMode.ALL_GATHER)
BIASED = Setting(biased=True)
SETTINGS = (BASE, AGAIN, SYNC, BOTH, BY_RANK, GATHERED)
# What takes turns. A graph keeps its memory for itself, and has no place for a read on the host.
TOGETHER = (SETTINGS,)
TOGETHER_INTERPRETED = ((BASE, BOTH),)
TOGETHER_AS_GRAPHS = ((BASE, AGAIN), (BY_RANK, GATHERED))


def answer_of(problem: LayerProblem) -> Answer:
    """Collective: one step of the fast backend, held against the reference's in the same dtype and in fp32."""
    with layer_over(problem, "fast", BASE) as fast:
        outcome = problem.forward_backward(fast, problem.inputs)
    # Exact sizes, for what is as large as this in fp32.
    with layer_over(problem, "reference", SYNC) as reference:
        plain = problem.forward_backward(reference, problem.inputs)
        truth = problem.forward_backward(reference, problem.inputs.in_fp32())
    alike = torch.equal(*(problem.choices(each).sort(dim=1).values for each in (outcome, truth)))
    faults = (*(() if alike else ("other experts are chosen",)), *faults_of(outcome, truth, plain))
    return Answer(outcome=outcome, plain=plain, truth=truth, faults=faults)


def layer_over(problem: LayerProblem, backend: str, setting: Setting) -> ExpertParallel:
    """The layer of ``setting``."""
    return ExpertParallel(backend=backend, config=setting.config, max_tokens_per_rank=problem.shape.tokens)


@dataclass(frozen=True, kw_only=True, eq=False)
class Bout:
    """All that is measured of one layer, each alternation once, by all ranks together."""

    arena: Arena
    problem: LayerProblem
    found: dict[tuple[tuple[Setting, ...], Pass, How], Found] = field(default_factory=dict)

    @cached_property
    def judged(self) -> Answer:
        """The answer, right or wrong. Memory that fp32 has taken goes back."""
        answer = answer_of(self.problem)
        if self.arena.on_gpu:
            torch.cuda.empty_cache()
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

    @cached_property
    def products(self) -> Products:
        """Of the rows that come here."""
        return Products.of(self.problem, self.routed.plan.group_ends, self.routed.valid_rows)

    def flops(self, which: Pass) -> float:
        """Operations of a rank's matrix products, the mean over the ranks: 2 for each number of a weight and row."""
        per_row = sum(weight[0].numel() for weight in (self.problem.inputs.w1, self.problem.inputs.w2))
        return 2.0 * which.times * per_row * self.routed.mean_over_ranks(lambda counts: counts.rows)

    def link_seconds(self, dispatch: DispatchMode, which: Pass) -> float | None:
        """What the rows take at the ceilings of the link, there and back, in backward once more; None without ceilings.

        That is their least: ids, scores and their gradients, and x where it is gathered again, are not counted.
        """
        if self.arena.group.world_size == 1:
            return 0.0
        row_bytes = self.problem.shape.row_bytes
        there = self.routed.mean_traffic(lambda counts: dispatch_traffic(counts, row_bytes)[dispatch]).link_in
        back = self.routed.mean_traffic(lambda counts: combine_traffic(counts, row_bytes)[COMBINE]).link_in
        seconds = 0.0
        for nbytes, way in ((there, WAY[dispatch]), (back, Way.WRITE)):
            traffic = self.arena.traffic(nbytes, way)
            if traffic is None or traffic.floor is None:
                return None
            seconds += which.trips * traffic.floor.seconds
        return seconds

    def work(self, name: str, ep: ExpertParallel, which: Pass, beside: tuple[Beside, ...] = ()) -> Work:
        """The layer over ``ep``, which has to give the answer's very bits; the reference has to be as accurate."""
        answer, inputs = self.answer, self.problem.inputs
        run = self.problem.forward if which is Pass.FORWARD else self.problem.forward_backward

        def check(got: Outcome) -> None:
            if ep.backend == "reference":
                faults = faults_of(got, part_of(answer.truth, which), answer.plain)
                expect(not faults, "; ".join(faults))
                return
            for part, right in tensors_of(part_of(answer.outcome, which)).items():
                assert_bitwise(tensors_of(got)[part], right, part)

        return Work(
            name=name,
            shape=self.problem.shape,
            function=lambda: run(ep, inputs),
            check=check,
            inputs=(*inputs.leaves.values(), inputs.out_grad),
            flops=self.flops(which),
            beside=beside if self.arena.on_gpu else (),
        )

    def products_alone(self, which: Pass) -> Work:
        """The matrix products, of random numbers."""
        products = self.products
        operands = products.operands(backward=which is Pass.STEP)

        def check(got: list[Tensor]) -> None:
            for place, (found, (left, right)) in enumerate(zip(got, operands, strict=True)):
                products.expect_of_one_group(found, left, right, f"product {place}")

        return Work(
            name=products_name(which),
            shape=self.problem.shape,
            function=lambda: products.all_of(operands),
            check=check,
            inputs=(products.rows, products.out_grad, products.hidden_grad, products.activated),
            flops=self.flops(which),
        )

    def of(self, settings: tuple[Setting, ...], which: Pass, how: How) -> Found:
        """The products, then each setting, in turn; no settings: the reference and the layer."""
        place = (settings, which, how)
        if place not in self.found:
            self.found[place] = self._alternation(*place) if settings else self._beside_reference(which, how)
        return self.found[place]

    def _alternation(self, settings: Sequence[Setting], which: Pass, how: How) -> Found:
        held = self.problem.shape.barred and how is How.QUEUED
        works = [self.products_alone(which)]
        with ExitStack() as stack:
            for setting in settings:
                ep = stack.enter_context(layer_over(self.problem, "fast", setting))
                works.append(self.work(layer_name(setting, which), ep, which, self._beside(setting, which, held=held)))
            return self.arena.alternate(works, how, ROUNDS if self.arena.on_gpu else ROUNDS_INTERPRETED)

    def _beside_reference(self, which: Pass, how: How) -> Found:
        """The reference has exact sizes, in its favour."""
        most = MOST_OF_REFERENCE if self.problem.shape.barred else None
        beside = Beside(name=reference_name(which), text="the reference", most=most)
        with layer_over(self.problem, "reference", SYNC) as reference, layer_over(self.problem, "fast", BASE) as fast:
            works = [
                self.work(reference_name(which), reference, which),
                self.work(beside_name(which), fast, which, (beside,)),
            ]
            rounds = ROUNDS_BESIDE_REFERENCE if self.arena.on_gpu else ROUNDS_INTERPRETED
            return self.arena.alternate(works, how, rounds)

    def _beside(self, setting: Setting, which: Pass, *, held: bool) -> tuple[Beside, ...]:
        """What a setting is held against: its products and bytes, and with a flag the same without any."""
        found = []
        link = self.link_seconds(setting.dispatch, which)
        if link is not None:
            most = which.most if held and setting == BASE else None
            name = products_name(which)
            found.append(Beside(name=name, text="products and bytes", link=link, most=most))
        if setting.again or setting.sync:
            most = MOST_WITH_X_AGAIN if held and setting == AGAIN else None
            found.append(Beside(name=layer_name(BASE, which), text="that without flags", most=most))
        return tuple(found)


def part_of(outcome: Outcome, which: Pass) -> Outcome:
    """What ``which`` gives of it."""
    return Outcome(y=outcome.y, logits=outcome.logits) if which is Pass.FORWARD else outcome


def products_name(which: Pass) -> str:
    """The name of the matrix products alone."""
    return f"grouped_mm of a layer: {which.value}"


def layer_name(setting: Setting, which: Pass) -> str:
    """The name of a layer."""
    return f"layer {setting}: {which.value}"


def reference_name(which: Pass) -> str:
    """The name of the reference's layer."""
    return f"reference layer: {which.value}"


def beside_name(which: Pass) -> str:
    """The name of the layer that takes turns with the reference's."""
    return f"layer {BASE}, beside the reference: {which.value}"


def together_with(arena: Arena, setting: Setting, which: Pass, how: How) -> tuple[Setting, ...]:
    """What takes turns with ``setting``, itself among it; skips the bench where it has no place."""
    groups = TOGETHER_AS_GRAPHS if how is How.GRAPH else TOGETHER if arena.on_gpu else TOGETHER_INTERPRETED
    if which is Pass.FORWARD and setting.again:
        pytest.skip("without a backward nothing is gathered again")
    for group in groups:
        if setting in group:
            return tuple(other for other in group if which is Pass.STEP or not other.again)
    skip_if_interpreted(arena)
    pytest.skip("a graph has no place for a read on the host")


def skip_if_interpreted(arena: Arena) -> None:
    """Leave to GPUs what says nothing new."""
    if not arena.on_gpu:
        pytest.skip("interpreted, a layer takes long, and the tests run it in every setting")


@pytest.fixture(scope="session")
def bout(arena: Arena) -> Bout:
    """The layer."""
    return Bout(arena=arena, problem=LayerProblem(shape=arena.sizes.layer, group=arena.group, device=arena.device))


@pytest.fixture(scope="session")
def biased_bout(arena: Arena) -> Bout:
    """The layer with biases."""
    problem = LayerProblem(shape=arena.sizes.layer, group=arena.group, device=arena.device, biased=True)
    return Bout(arena=arena, problem=problem)


each_pass = pytest.mark.parametrize("which", list(Pass), ids=lambda which: which.name.lower())


@each_pass
def bench_products(arena: Arena, bout: Bout, tell: Tell, how: How, which: Pass) -> None:
    """The matrix products of the layer alone: two forward, and four more in backward."""
    found = bout.of(together_with(arena, BASE, which, how), which, how)
    tell(arena.record(found[products_name(which)]))


@each_pass
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def bench_layer(arena: Arena, bout: Bout, tell: Tell, how: How, setting: Setting, which: Pass) -> None:
    """``ep.moe``. Every setting gives the same bits, eager and as a graph."""
    found = bout.of(together_with(arena, setting, which, how), which, how)
    tell(arena.record(found[layer_name(setting, which)]))


@each_pass
@pytest.mark.parametrize("name", [reference_name, beside_name], ids=["reference", "fast"])
def bench_reference(arena: Arena, bout: Bout, tell: Tell, name: Callable[[Pass], str], which: Pass) -> None:
    """``ep.moe`` of the reference backend, over NCCL on GPUs, and that of the fast one."""
    if which is Pass.STEP:
        skip_if_interpreted(arena)
    tell(arena.record(bout.of((), which, arena.behind_work)[name(which)]))


@each_pass
def bench_biased(arena: Arena, biased_bout: Bout, tell: Tell, which: Pass) -> None:
    """``ep.moe`` with biases."""
    skip_if_interpreted(arena)
    found = biased_bout.of((BIASED,), which, arena.behind_work)
    tell(arena.record(found[layer_name(BIASED, which)]))
