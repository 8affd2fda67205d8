"""The plan: ids in, every field out, the exchange of the ids included."""

from __future__ import annotations

from dataclasses import replace

import pytest
from harness.context import BenchCase, Method, RunCase, SuiteContext, other_inputs
from harness.results import Threshold

from sonic_ep import ExpertParallel
from sonic_ep.profiler.problem import RoutingProblem

# Slots of the group, and the microseconds that a plan of them may take.
MOST_MICROS = {262_144: 80, 1_048_576: 150}


def threshold_of(slots: int, context: SuiteContext) -> Threshold | None:
    """The threshold of a plan of ``slots`` slots, where there is one."""
    micros = MOST_MICROS.get(slots)
    if micros is None or not context.held:
        return None
    return Threshold(text=f"at most {micros} us at {slots} slots", seconds=micros / 1e6)


@pytest.mark.parametrize("size", [0, 1])
def bench_plan(context: SuiteContext, run: RunCase, method: Method, size: int) -> None:
    """``ep.plan`` through the public API."""
    if size >= len(context.sizes.plans):
        pytest.skip("one plan only at a shape of the caller's")
    large, world_size, slots = context.sizes.large, context.group.world_size, context.sizes.plans[size]
    shape = replace(large, tokens=slots // (world_size * large.top_k))
    problem = RoutingProblem(shape=shape, group=context.group, device=context.device)
    with ExpertParallel(backend="fast", max_tokens_per_rank=shape.tokens) as ep:
        case = BenchCase(
            name="plan",
            shape=shape,
            run=lambda: ep.plan(problem.topk_idx_TK, shape.num_experts),
            check=problem.check_plan,
            other_inputs=lambda: other_inputs(problem.topk_idx_TK),
            threshold=threshold_of(world_size * shape.tokens * shape.top_k, context),
        )
        run(case, method)
