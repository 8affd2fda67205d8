"""The plan: ids in, every field out, the exchange of the ids included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from sonic_ep.benchmark.arena import How, SuiteArena, Work
from sonic_ep.benchmark.results import Bar
from sonic_ep.benchmark.workload import Problem, Shape
from torch import Tensor

from sonic_ep import ExpertParallel, RoutingPlan
from sonic_ep.plan import ROUTING_FIELDS
from sonic_ep.testing import assert_bitwise
from sonic_ep.testing.checks import expect

# Slots of the group, and the microseconds that a plan of them may take.
BARS_OF_SLOTS = ((262_144, 80), (1_048_576, 150))


def expect_plan(expected: RoutingPlan) -> Callable[[RoutingPlan], None]:
    """A check: every field equal."""

    def check(got: RoutingPlan) -> None:
        for name in ROUTING_FIELDS:
            value, right = getattr(got, name), getattr(expected, name)
            if isinstance(right, Tensor):
                assert_bitwise(value, right, name)
            else:
                expect(value == right, f"{name}: got {value}, expected {right}")

    return check


def bar_of(slots: int, shape: Shape) -> Bar | None:
    """The bar of a plan of ``slots`` slots, where there is one."""
    micros = dict(BARS_OF_SLOTS).get(slots)
    if micros is None or not shape.barred:
        return None
    return Bar(text=f"at most {micros} us at {slots} slots", seconds=micros / 1e6)


@pytest.mark.parametrize("size", [0, 1])
def bench_plan(arena: SuiteArena, run: Callable[[Work, How], None], how: How, size: int) -> None:
    """``ep.plan`` through the public API."""
    if size >= len(arena.sizes.plans):
        pytest.skip("one plan only at a shape of the caller's")
    large, world_size = arena.sizes.large, arena.group.world_size
    shape = replace(large, tokens=arena.sizes.plans[size] // (world_size * large.top_k))
    problem = Problem(shape=shape, group=arena.group, device=arena.device)
    with ExpertParallel(backend="fast", max_tokens_per_rank=shape.tokens) as ep:
        work = Work(
            name="plan",
            shape=shape,
            function=lambda: ep.plan(problem.topk_idx_TK, shape.num_experts),
            check=expect_plan(problem.plan),
            inputs=(problem.topk_idx_TK,),
            bar=bar_of(shape.slots(world_size), shape),
        )
        run(work, how)
