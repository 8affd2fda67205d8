"""A decoding step's worth of tokens: dispatch and combine, where launches and barriers are what takes the time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sonic_ep.benchmark.arena import How, SuiteArena, Work
from sonic_ep.benchmark.results import Bar
from sonic_ep.benchmark.workload import Problem
from torch import Tensor

from sonic_ep import CombineMode, DispatchMode, EPConfig, ExpertParallel
from sonic_ep.testing import assert_bitwise

Run = Callable[[Work, How], None]

MOST_SECONDS = 60e-6
# A plan is made once a layer, or once for several: it is timed in and out.
PAIRS = (
    (DispatchMode.ALL_TO_ALL, CombineMode.RANK_DEDUP),
    (DispatchMode.ALL_TO_ALL, CombineMode.ALL_TO_ALL),
    (DispatchMode.ALL_TO_ALL, CombineMode.REDUCE_SCATTER),
    (DispatchMode.RANK_DEDUP, CombineMode.RANK_DEDUP),
    (DispatchMode.ALL_GATHER, CombineMode.RANK_DEDUP),
)


@pytest.mark.parametrize("planned", [True, False], ids=["planned", "with_plan"])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].value}-{pair[1].value}")
def bench_small(
    arena: SuiteArena, small: Problem, run: Run, how: How, pair: tuple[DispatchMode, CombineMode], *, planned: bool
) -> None:
    """``ep.dispatch``, then ``ep.combine`` of the rows as they are; ``planned``: by a plan that was made before."""
    config = EPConfig(dispatch=pair[0], combine=pair[1])
    with ExpertParallel(backend="fast", config=config, max_tokens_per_rank=small.shape.tokens) as ep:
        words = "dispatch and combine" if planned else "plan, dispatch and combine"
        work = Work(
            name=f"small {pair[0].value}, {pair[1].value}: {words}",
            shape=small.shape,
            function=round_trip(ep, small, planned=planned),
            check=lambda got: assert_bitwise(got, small.round_trips[pair[1]], "sums"),
            inputs=(small.x_TH, small.scores_TK),
            bar=bar_of(small, how, pair) if planned else None,
        )
        run(work, how)


def round_trip(ep: ExpertParallel, problem: Problem, *, planned: bool) -> Callable[[], Tensor]:
    """X (T, H) to the ranks of its experts and back."""
    made = ep.plan(problem.topk_idx_TK, problem.shape.num_experts)

    def function() -> Tensor:
        plan = made if planned else ep.plan(problem.topk_idx_TK, problem.shape.num_experts)
        return ep.combine(ep.dispatch(problem.x_TH, plan), problem.scores_TK, plan)

    return function


def bar_of(problem: Problem, how: How, pair: tuple[DispatchMode, CombineMode]) -> Bar | None:
    """The bar of the first pair in a graph."""
    if how is not How.GRAPH or pair != PAIRS[0] or not problem.shape.barred:
        return None
    return Bar(text="at most 60 us", seconds=MOST_SECONDS)
