"""Combine: rows in, weighted sums out, scores and barriers included; and the NCCL baseline."""

from __future__ import annotations

from dataclasses import replace

import pytest
from harness import nccl_baseline
from harness.context import BenchCase, Method, RunCase, SuiteContext, other_inputs
from harness.results import LinkTraffic
from torch import Tensor

from sonic_ep import CombineMode
from sonic_ep.cost import WAY_OF_COMBINE, combine_traffic
from sonic_ep.fast.collectives import gather_scores
from sonic_ep.fast.combine import combine_primitives
from sonic_ep.profiler.problem import RoutingProblem
from sonic_ep.profiler.verification import assert_bitwise
from sonic_ep.testing import assert_as_accurate

SCORE_BYTES = 4
# Rows in, sums out, by the mode that moves least: at most so many times what the bytes take at the ceiling.
MOST_TIMES = 1.25


@pytest.mark.parametrize("weighted", [True, False], ids=["scores", "no_scores"])
@pytest.mark.parametrize("mode", list(CombineMode), ids=lambda mode: mode.value)
def bench_combine(
    context: SuiteContext, large: RoutingProblem, run: RunCase, method: Method, mode: CombineMode, *, weighted: bool
) -> None:
    """Rows in canonical order in, sums of this rank's tokens out; with scores, their exchange too."""
    name = f"combine {mode.value}: {'scores, ' if weighted else ''}barriers, sums and link"
    case = combine_case(context, large, mode, name, weighted=weighted)
    held = context.held and mode is CombineMode.RANK_DEDUP and weighted
    run(replace(case, threshold=case.traffic.at_most(MOST_TIMES) if case.traffic and held else None), method)


@pytest.mark.parametrize("collective", ["all_to_all_single", "reduce_scatter"])
def bench_nccl_combine(context: SuiteContext, large: RoutingProblem, run: RunCase, collective: str) -> None:
    """Sums by ``torch.distributed``: NCCL on GPUs. Before ``reduce_scatter`` each rank has summed what it holds."""
    if context.group.world_size == 1:
        pytest.skip("one rank has nobody to communicate with")
    exchange = nccl_baseline.NcclSlotExchange(large)
    if collective == "all_to_all_single":
        mode, function, done = CombineMode.ALL_TO_ALL, exchange.combine, "gathers, sums and link"
    else:
        mode, function = CombineMode.REDUCE_SCATTER, nccl_baseline.combine_by_reduce_scatter(large)
        done = "link, sums beforehand"
    truth, plain = exchange.exact_sums(), large.sums[mode, True]
    case = BenchCase(
        name=f"usual combine, {collective}: {done}",
        shape=large.shape,
        run=function,
        check=lambda got: assert_as_accurate(got, truth, plain, "sums"),
        other_inputs=lambda: other_inputs(large.rows_RH),
        traffic=sums_in(context, large, mode, weighted=False),
    )
    run(case, context.behind_work)


def combine_case(
    context: SuiteContext, problem: RoutingProblem, mode: CombineMode, name: str, *, weighted: bool
) -> BenchCase:
    """The combine of one mode; scores (T, K) of every rank are gathered in it, if there are any."""
    primitive, workspace = combine_primitives(context.workspace)[mode], context.workspace

    def combine() -> Tensor:
        workspace.enter()
        scores_WCK = gather_scores(problem.scores_TK, problem.plan, workspace) if weighted else None
        return primitive.combine(problem.rows_RH, scores_WCK, problem.plan)

    return BenchCase(
        name=name,
        shape=problem.shape,
        run=combine,
        check=lambda got: assert_bitwise(got, problem.sums[mode, weighted], f"sums by {mode.value}"),
        other_inputs=lambda: other_inputs(problem.rows_RH, problem.scores_TK),
        traffic=sums_in(context, problem, mode, weighted=weighted),
    )


def sums_in(context: SuiteContext, problem: RoutingProblem, mode: CombineMode, *, weighted: bool) -> LinkTraffic | None:
    """What a combine brings to a rank over the link: rows or sums, and the other ranks' scores."""
    shape = problem.shape
    link_in = problem.mean(lambda counts: combine_traffic(counts, shape.row_bytes)[mode].link_in)
    memory = problem.mean(lambda counts: combine_traffic(counts, shape.row_bytes)[mode].memory)
    scores = (context.group.world_size - 1) * shape.tokens * shape.top_k * SCORE_BYTES if weighted else 0
    return context.traffic(link_in + scores, WAY_OF_COMBINE, memory)
