"""Every primitive and the layer over the routings of the named cases that have the ``bench`` tag."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from bench_primitives import combine_case, each_combine, each_dispatch, receive_case
from harness.context import Rounds, RunCase, SuiteContext, Tell
from harness.layer import Pass, prove_call

from sonic_ep import CombineMode, DispatchMode, EPConfig, ExpertParallel
from sonic_ep.profiler.problem import RoutingProblem, Shape
from sonic_ep.testing import CASES, Case
from sonic_ep.testing.layer_problem import LayerProblem
from sonic_ep.testing.oracle import RoutedCall

ProblemOf = Callable[[Case, Shape], RoutingProblem]

BENCHED = [case for case in CASES.values() if case.bench]
# The layer is in bench_layer as well, at more rounds.
ROUNDS = Rounds(rounds=8, warmup=1)
CONFIG = EPConfig(dispatch="all_to_all", combine="rank_dedup")

each_case = pytest.mark.parametrize("case", BENCHED, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def problem_of(context: SuiteContext) -> ProblemOf:
    """The routing of a case at the size of the benches, with the K of the case, drawn as the case draws it, once."""

    @cache
    def problem(case: Case, size: Shape) -> RoutingProblem:
        shape = replace(size, top_k=min(case.top_k, size.num_experts // 2))
        generator = torch.Generator().manual_seed(1000 * case.seed + context.group.rank)
        fitted = replace(case, num_experts=shape.num_experts, top_k=shape.top_k)
        chosen_TK = case.choose(generator, shape.tokens, fitted, context.group.world_size).to(context.device)
        return RoutingProblem(shape=shape, group=context.group, device=context.device, routing=chosen_TK)

    return problem


@pytest.fixture(autouse=True)
def _fewer_where_interpreted(context: SuiteContext, request: pytest.FixtureRequest) -> None:
    """Interpreted, a few cases are enough: the tests run all of them."""
    case = request.node.callspec.params["case"]
    if not context.on_gpu and case is not BENCHED[-2]:
        pytest.skip("interpreted, one case is benched: the tests run all of them")


@each_case
@each_dispatch
def bench_dispatch_of_case(
    context: SuiteContext, problem_of: ProblemOf, run: RunCase, case: Case, mode: DispatchMode
) -> None:
    """A dispatch up to what it receives: staging, barriers, link."""
    problem = problem_of(case, context.sizes.large)
    run(receive_case(context, problem, mode, f"{case.name}: dispatch {mode.value}"), context.behind_work)


@each_case
@each_combine
def bench_combine_of_case(
    context: SuiteContext, problem_of: ProblemOf, run: RunCase, case: Case, mode: CombineMode
) -> None:
    """Rows in canonical order in, weighted sums out."""
    problem, name = problem_of(case, context.sizes.large), f"{case.name}: combine {mode.value}"
    run(combine_case(context, problem, mode, name, weighted=True), context.behind_work)


@each_case
def bench_layer_of_case(context: SuiteContext, problem_of: ProblemOf, tell: Tell, case: Case) -> None:
    """``ep.moe_routed``, forward and backward."""
    problem = problem_of(case, context.sizes.layer)
    random = LayerProblem(shape=problem.shape, group=context.group, device=context.device).call
    given = {"topk_idx": problem.topk_idx_TK, "topk_scores": problem.scores_TK.clone().requires_grad_()}
    call = RoutedCall(x=random.x, dy=random.dy, experts=random.experts, **given)
    with ExpertParallel(backend="fast", config=CONFIG, max_tokens_per_rank=problem.shape.tokens) as ep:
        proven = prove_call(context, problem.shape, call, ep)
        timed = proven.case(f"{case.name}: layer, {Pass.STEP.value}", ep, Pass.STEP)
        found = context.alternate([timed], context.behind_work, context.rounds(ROUNDS))
    tell(context.record(found[timed.name]))
