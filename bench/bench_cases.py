"""Every primitive and the layer over the routings of the named cases that have the ``bench`` tag."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from bench_combine import summing
from bench_dispatch import receiving
from sonic_ep.benchmark.arena import How, Rounds, SuiteArena, Work
from sonic_ep.benchmark.layer import Pass
from sonic_ep.benchmark.layer_problem import LayerOptions, LayerProblem
from sonic_ep.benchmark.results import Entry
from sonic_ep.benchmark.routed import RoutedUnderTest
from sonic_ep.benchmark.routed_call import RoutedCall
from sonic_ep.benchmark.workload import Problem, Shape
from torch import Tensor

from sonic_ep import CombineMode, DispatchMode, EPConfig
from sonic_ep.testing import CASES, Case

Run = Callable[[Work, How], None]

BENCHED = [case for case in CASES.values() if case.bench]
# The layer is in bench_layer as well, at more rounds.
ROUNDS, ROUNDS_INTERPRETED = Rounds(timed=8, warmup=1), Rounds(timed=1, warmup=0)
CONFIG = EPConfig(dispatch="all_to_all", combine="rank_dedup")

each_case = pytest.mark.parametrize("case", BENCHED, ids=lambda case: case.name)


def shape_of(case: Case, size: Shape) -> Shape:
    """The size of the benches with the K of a case. Nothing there is held against a bar."""
    return replace(size, top_k=min(case.top_k, size.num_experts // 2), barred=False)


def chosen_experts(case: Case, shape: Shape, arena: SuiteArena) -> Tensor:
    """Experts of this rank's tokens, (T, K) int64, drawn as the case draws them."""
    generator = torch.Generator().manual_seed(1000 * case.seed + arena.group.rank)
    fitted = replace(case, num_experts=shape.num_experts, top_k=shape.top_k)
    return case.choose(generator, shape.tokens, fitted, arena.group.world_size).to(arena.device)


@pytest.fixture(scope="module")
def routed(arena: SuiteArena) -> Callable[[Case], Problem]:
    """The problem of a case, drawn once."""

    @cache
    def of(case: Case) -> Problem:
        shape = shape_of(case, arena.sizes.large)
        chosen_TK = chosen_experts(case, shape, arena)
        return Problem(shape=shape, group=arena.group, device=arena.device, chosen_TK=chosen_TK)

    return of


@pytest.fixture(autouse=True)
def _fewer_where_interpreted(arena: SuiteArena, request: pytest.FixtureRequest) -> None:
    """Interpreted, a few cases are enough: the tests run all of them."""
    case = request.node.callspec.params["case"]
    if not arena.on_gpu and case is not BENCHED[-2]:
        pytest.skip("interpreted, one case is benched: the tests run all of them")


@each_case
@pytest.mark.parametrize("mode", list(DispatchMode), ids=lambda mode: mode.value)
def bench_dispatch_of_case(
    arena: SuiteArena, routed: Callable[[Case], Problem], run: Run, case: Case, mode: DispatchMode
) -> None:
    """Up to what a dispatch receives: barriers, staging, the way over the link."""
    run(receiving(arena, routed(case), mode, f"{case.name}: dispatch {mode.value}"), arena.behind_work)


@each_case
@pytest.mark.parametrize("mode", list(CombineMode), ids=lambda mode: mode.value)
def bench_combine_of_case(
    arena: SuiteArena, routed: Callable[[Case], Problem], run: Run, case: Case, mode: CombineMode
) -> None:
    """Rows in canonical order in, weighted sums out."""
    work = summing(arena, routed(case), mode, f"{case.name}: combine {mode.value}", weighted=True)
    run(work, arena.behind_work)


@each_case
def bench_layer_of_case(arena: SuiteArena, tell: Callable[[Entry], None], case: Case) -> None:
    """``ep.moe_routed``, forward and backward."""
    call = call_of(case, arena)
    layer = RoutedUnderTest(arena=arena, group=arena.group, call=call, backend="fast", config=CONFIG)
    with layer.over() as ep:
        work = layer.work(f"{case.name}: layer, {Pass.STEP.value}", ep, Pass.STEP)
        found = arena.alternate([work], arena.behind_work, ROUNDS if arena.on_gpu else ROUNDS_INTERPRETED)
    tell(arena.record(found[work.name]))


def call_of(case: Case, arena: SuiteArena) -> RoutedCall:
    """The layer of the benches with a case's routing."""
    shape = shape_of(case, arena.sizes.layer)
    problem = LayerProblem(shape=shape, group=arena.group, device=arena.device, options=LayerOptions())
    chosen_TK = chosen_experts(case, shape, arena)
    scores_TK = Problem(shape=shape, group=arena.group, device=arena.device, chosen_TK=chosen_TK).scores_TK
    return RoutedCall(
        shape=shape,
        options=problem.options,
        x=problem.inputs.x,
        out_grad=problem.inputs.out_grad,
        topk_idx=chosen_TK,
        topk_scores=scores_TK.requires_grad_(),
        experts=problem.inputs.experts,
    )
