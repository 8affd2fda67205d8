"""Combine: rows in, weighted sums out, scores and barriers included; and the usual path beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from sonic_ep.benchmark import usual
from sonic_ep.benchmark.arena import How, SuiteArena, Way, Work
from sonic_ep.benchmark.results import Traffic
from sonic_ep.benchmark.workload import Problem
from torch import Tensor

from sonic_ep import CombineMode
from sonic_ep.cost import combine_traffic
from sonic_ep.fast.collectives import gather_scores
from sonic_ep.fast.combine import combine_primitives
from sonic_ep.testing import assert_bitwise

Run = Callable[[Work, How], None]

SCORE_BYTES = 4
# Rows in, sums out, by the mode that moves least: at most so many times what the bytes take at the ceiling.
MOST_TIMES = 1.25


@pytest.mark.parametrize("weighted", [True, False], ids=["scores", "no_scores"])
@pytest.mark.parametrize("mode", list(CombineMode), ids=lambda mode: mode.value)
def bench_combine(arena: SuiteArena, large: Problem, run: Run, how: How, mode: CombineMode, *, weighted: bool) -> None:
    """Rows in canonical order in, sums of this rank's tokens out; with scores, their exchange too."""
    barred = large.shape.barred and mode is CombineMode.RANK_DEDUP and weighted
    name = f"combine {mode.value}: {'scores, ' if weighted else ''}barriers, sums and link"
    work = summing(arena, large, mode, name, weighted=weighted)
    bar = work.traffic.at_most(MOST_TIMES) if work.traffic and barred else None
    run(replace(work, bar=bar), how)


@pytest.mark.parametrize("collective", ["all_to_all_single", "reduce_scatter"])
def bench_usual_combine(arena: SuiteArena, large: Problem, run: Run, collective: str) -> None:
    """Sums by ``torch.distributed``: NCCL on GPUs. Before ``reduce_scatter`` each rank has summed what it holds."""
    if not usual.has_collectives(arena.group):
        pytest.skip("one rank has nobody to communicate with")
    mode = {"all_to_all_single": CombineMode.ALL_TO_ALL, "reduce_scatter": CombineMode.REDUCE_SCATTER}[collective]
    if collective == "all_to_all_single":
        function, done = usual.combine_by_all_to_all(large), "gathers, sums and link"
    else:
        function, done = usual.combine_by_reduce_scatter(large, usual.dense_partials(large)), "link, sums beforehand"
    work = Work(
        name=f"usual combine, {collective}: {done}",
        shape=large.shape,
        function=function,
        check=usual.expect_accurate(large, usual.exact_sums(large), large.sums[mode, True]),
        inputs=(large.rows_RH,),
        traffic=sums_in(arena, large, mode, weighted=False),
    )
    run(work, arena.behind_work)


def summing(arena: SuiteArena, problem: Problem, mode: CombineMode, name: str, *, weighted: bool) -> Work:
    """The combine of one mode; with scores, their exchange too."""
    return Work(
        name=name,
        shape=problem.shape,
        function=combine(arena, problem, mode, weighted=weighted),
        check=lambda got: assert_bitwise(got, problem.sums[mode, weighted], f"sums by {mode.value}"),
        inputs=(problem.rows_RH, problem.scores_TK),
        traffic=sums_in(arena, problem, mode, weighted=weighted),
    )


def combine(arena: SuiteArena, problem: Problem, mode: CombineMode, *, weighted: bool) -> Callable[[], Tensor]:
    """The combine of one mode; scores (T, K) of every rank are gathered in it, if there are any."""
    primitive, workspace = combine_primitives(arena.workspace)[mode], arena.workspace

    def function() -> Tensor:
        workspace.enter()
        scores_WCK = gather_scores(problem.scores_TK, problem.plan, workspace) if weighted else None
        return primitive.combine(problem.rows_RH, scores_WCK, problem.plan)

    return function


def sums_in(arena: SuiteArena, problem: Problem, mode: CombineMode, *, weighted: bool) -> Traffic | None:
    """What a combine brings to a rank over the link: rows or sums, and the other ranks' scores."""
    shape = problem.shape
    moved = problem.mean_traffic(lambda counts: combine_traffic(counts, shape.row_bytes)[mode])
    scores = (arena.group.world_size - 1) * shape.tokens * shape.top_k * SCORE_BYTES if weighted else 0
    return arena.traffic(moved.link_in + scores, Way.WRITE, moved.memory)
