"""A decoding step's worth of tokens: dispatch and combine, where launches and barriers are what takes the time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from harness.context import BenchCase, Method, RunCase, SuiteContext, other_inputs
from harness.results import Threshold
from torch import Tensor

from sonic_ep import CombineMode, DispatchMode, EPConfig, ExpertParallel
from sonic_ep.profiler.problem import RoutingProblem
from sonic_ep.profiler.verification import assert_bitwise

# Of the first pair in a graph, with a plan that was made before.
MOST = Threshold(text="at most 60 us", seconds=60e-6)
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
    context: SuiteContext, run: RunCase, method: Method, pair: tuple[DispatchMode, CombineMode], *, planned: bool
) -> None:
    """``ep.dispatch``, then ``ep.combine`` of the rows as they are; ``planned``: by a plan that was made before."""
    dispatch, combine = pair
    small = RoutingProblem(shape=context.sizes.small, group=context.group, device=context.device)
    held = context.held and planned and method is Method.GRAPH and pair == PAIRS[0]
    config = EPConfig(dispatch=dispatch, combine=combine)
    with ExpertParallel(backend="fast", config=config, max_tokens_per_rank=small.shape.tokens) as ep:
        case = BenchCase(
            name=f"small {dispatch.value}, {combine.value}: {'' if planned else 'plan, '}dispatch and combine",
            shape=small.shape,
            run=round_trip(ep, small, planned=planned),
            check=lambda got: assert_bitwise(got, small.round_trips[combine], "sums"),
            other_inputs=lambda: other_inputs(small.x_TH, small.scores_TK),
            threshold=MOST if held else None,
        )
        run(case, method)


def round_trip(ep: ExpertParallel, problem: RoutingProblem, *, planned: bool) -> Callable[[], Tensor]:
    """Tokens (T, H) to the ranks of their experts and back."""
    made = ep.plan(problem.topk_idx_TK, problem.shape.num_experts)

    def function() -> Tensor:
        plan = made if planned else ep.plan(problem.topk_idx_TK, problem.shape.num_experts)
        return ep.combine(ep.dispatch(problem.x_TH, plan), problem.scores_TK, plan)

    return function
