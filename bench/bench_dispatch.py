"""Dispatch: the way over the link alone, with staging, from ids to rows; and the usual path beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import pytest
from sonic_ep.benchmark import usual
from sonic_ep.benchmark.arena import How, SuiteArena, Way, Work
from sonic_ep.benchmark.layer import WAY
from sonic_ep.benchmark.results import Bar, Traffic
from sonic_ep.benchmark.workload import Problem
from torch import Tensor

from sonic_ep import DispatchMode, EPConfig, ExpertParallel
from sonic_ep.cost import (
    RankCounts,
    canonical_gather_bytes,
    dispatch_traffic,
    exchange_link_bytes,
    staging_bytes,
)
from sonic_ep.fast.copy_engine import CopyEngineGather
from sonic_ep.fast.dispatch import dispatch_primitives
from sonic_ep.fast.dispatch.all_to_all import pull_to_rows
from sonic_ep.fast.dispatch.rank_dedup import pull_packed
from sonic_ep.fast.staging import TOKENS, stage_tokens
from sonic_ep.testing import assert_bitwise

Run = Callable[[Work, How], None]

# The share of its ceiling that each mode has to reach over the link.
LEAST_SHARE: Mapping[DispatchMode, float] = MappingProxyType(
    {DispatchMode.ALL_GATHER: 0.93, DispatchMode.ALL_TO_ALL: 0.92, DispatchMode.RANK_DEDUP: 0.93}
)
# Ids in, rows out: at most so many times what the bytes take at the ceiling.
MOST_TIMES_FROM_IDS = 1.35

each_mode = pytest.mark.parametrize("mode", list(DispatchMode), ids=lambda mode: mode.value)


@each_mode
def bench_link(arena: SuiteArena, large: Problem, run: Run, how: How, mode: DispatchMode) -> None:
    """The tokens stand in shared memory already: the barrier behind that, and the way over the link."""
    staged = large.mean_over_ranks(lambda counts: staging_bytes(counts, large.shape.row_bytes))
    traffic = rows_in(arena, large, mode, more_memory=-staged)
    work = Work(
        name=f"dispatch {mode.value}: barrier and link",
        shape=large.shape,
        function=over_the_link(arena, large, mode),
        check=expect_received(large, mode),
        inputs=(large.x_TH,),
        traffic=traffic,
        bar=traffic.at_least(LEAST_SHARE[mode]) if traffic and large.shape.barred else None,
    )
    run(work, how)


@each_mode
def bench_receive(arena: SuiteArena, large: Problem, run: Run, how: How, mode: DispatchMode) -> None:
    """All of a dispatch up to what it receives: barriers, staging, the way over the link."""
    run(receiving(arena, large, mode, f"dispatch {mode.value}: staging, barriers and link"), how)


@each_mode
def bench_ids_to_rows(arena: SuiteArena, large: Problem, run: Run, how: How, mode: DispatchMode) -> None:
    """``ep.plan``, then ``ep.dispatch``: ids in, rows in canonical order out, through the public API."""
    config = EPConfig(dispatch=mode)
    ids = exchange_link_bytes(
        world_size=arena.group.world_size, capacity=large.shape.tokens, top_k=large.shape.top_k, with_scores=False
    )
    gathered = large.mean_over_ranks(lambda counts: canonical_gather_bytes(counts, large.shape.row_bytes)[mode])
    traffic = rows_in(arena, large, mode, more_bytes=ids, more_memory=gathered)
    with ExpertParallel(backend="fast", config=config, max_tokens_per_rank=large.shape.tokens) as ep:
        work = Work(
            name=f"ids to rows, {mode.value}: plan and dispatch",
            shape=large.shape,
            function=lambda: ep.dispatch(large.x_TH, ep.plan(large.topk_idx_TK, large.shape.num_experts)),
            check=expect_rows(large),
            inputs=(large.x_TH, large.topk_idx_TK),
            traffic=traffic,
            bar=bar_from_ids(traffic, large, mode),
        )
        run(work, how)


@pytest.mark.parametrize("collective", ["all_to_all_single", "all_gather"])
def bench_usual_dispatch(arena: SuiteArena, large: Problem, run: Run, collective: str) -> None:
    """X in, rows in canonical order out, by ``torch.distributed``: NCCL on GPUs. The routing is known beforehand."""
    if not usual.has_collectives(arena.group):
        pytest.skip("one rank has nobody to communicate with")
    make = {"all_to_all_single": usual.dispatch_by_all_to_all, "all_gather": usual.dispatch_by_all_gather}[collective]
    work = Work(
        name=f"usual dispatch, {collective}: gathers and link",
        shape=large.shape,
        function=make(large),
        check=expect_rows(large),
        inputs=(large.x_TH,),
        traffic=usual_bytes_in(arena, large, collective),
    )
    run(work, arena.behind_work)


def receiving(arena: SuiteArena, problem: Problem, mode: DispatchMode, name: str) -> Work:
    """All of a dispatch of ``problem``, up to what it receives."""
    primitive = dispatch_primitives(arena.workspace)[mode]

    def receive() -> Tensor:
        arena.workspace.enter()
        return primitive.receive(problem.x_TH, problem.plan)

    return Work(
        name=name,
        shape=problem.shape,
        function=receive,
        check=expect_received(problem, mode),
        inputs=(problem.x_TH,),
        traffic=rows_in(arena, problem, mode),
    )


def over_the_link(arena: SuiteArena, problem: Problem, mode: DispatchMode) -> Callable[[], Tensor]:
    """Collective: stage the tokens. What is returned meets the other ranks, then receives."""
    workspace, plan, x_TH = arena.workspace, problem.plan, problem.x_TH
    staged = stage_tokens(x_TH, plan.capacity, workspace)
    gather = CopyEngineGather(workspace, TOKENS)
    pull = {
        DispatchMode.ALL_GATHER: lambda: gather.bring(x_TH, staged, plan.capacity).wait(),
        DispatchMode.ALL_TO_ALL: lambda: pull_to_rows(x_TH, staged.addresses, plan, plan.row_capacity),
        DispatchMode.RANK_DEDUP: lambda: pull_packed(x_TH, staged, plan),
    }[mode]

    def meet_and_pull() -> Tensor:
        workspace.publish()
        return pull()

    return meet_and_pull


def rows_in(
    arena: SuiteArena, problem: Problem, mode: DispatchMode, *, more_bytes: int = 0, more_memory: float = 0
) -> Traffic | None:
    """What a dispatch with its staging brings to a rank over the link and moves in its memory, and more of either."""
    row_bytes = problem.shape.row_bytes
    moved = problem.mean_traffic(lambda counts: dispatch_traffic(counts, row_bytes)[mode])
    return arena.traffic(moved.link_in + more_bytes, WAY[mode], moved.memory + more_memory)


def usual_bytes_in(arena: SuiteArena, problem: Problem, collective: str) -> Traffic | None:
    """What the usual path brings to a rank: a row a slot, or all tokens."""
    one_row_a_slot = collective == "all_to_all_single"

    def rows(counts: RankCounts) -> int:
        return counts.slots_in if one_row_a_slot else counts.remote_ranks * counts.tokens

    return arena.traffic(problem.mean_over_ranks(rows) * problem.shape.row_bytes, Way.WRITE)


def bar_from_ids(traffic: Traffic | None, problem: Problem, mode: DispatchMode) -> Bar | None:
    """The bar of the one mode whose rows arrive where the experts want them."""
    if traffic is None or mode is not DispatchMode.ALL_TO_ALL or not problem.shape.barred:
        return None
    return traffic.at_most(MOST_TIMES_FROM_IDS)


def expect_received(problem: Problem, mode: DispatchMode) -> Callable[[Tensor], None]:
    """A check: the bits that the reference receives."""
    expected = problem.received[mode]
    return lambda got: assert_bitwise(got[: expected.shape[0]], expected, f"received by {mode.value}")


def expect_rows(problem: Problem) -> Callable[[Tensor], None]:
    """A check: the bits of x in canonical order."""
    return lambda got: assert_bitwise(got[: problem.valid_rows], problem.rows_of_x, "rows in canonical order")
