"""Dispatch: the way over the link alone, with staging, from ids to rows; and the NCCL baseline."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from harness import nccl_baseline
from harness.context import BenchCase, Method, RunCase, SuiteContext, other_inputs
from harness.results import LinkTraffic
from torch import Tensor

from sonic_ep import DispatchMode, EPConfig, ExpertParallel, cost
from sonic_ep.fast.collectives import TOKENS, stage_tokens
from sonic_ep.fast.copy_engine import CopyEngineGather
from sonic_ep.fast.dispatch import dispatch_primitives
from sonic_ep.fast.dispatch.all_to_all import pull_to_rows
from sonic_ep.fast.dispatch.rank_dedup import pull_packed
from sonic_ep.profiler.problem import RoutingProblem
from sonic_ep.profiler.verification import assert_bitwise

# The share of its ceiling that each mode has to reach over the link.
LEAST_SHARE = {DispatchMode.ALL_GATHER: 0.93, DispatchMode.ALL_TO_ALL: 0.92, DispatchMode.RANK_DEDUP: 0.93}
# Ids in, rows out, by the one mode whose rows arrive where the experts want them: at most so many times what the bytes
# take at the ceiling.
MOST_TIMES_FROM_IDS = 1.35

each_mode = pytest.mark.parametrize("mode", list(DispatchMode), ids=lambda mode: mode.value)


@each_mode
def bench_link(context: SuiteContext, large: RoutingProblem, run: RunCase, method: Method, mode: DispatchMode) -> None:
    """The tokens stand in shared memory already: the barrier behind that, and the way over the link."""
    staged = large.mean(lambda counts: cost.staging_bytes(counts, large.shape.row_bytes))
    traffic = rows_in(context, large, mode, more_memory=-staged)
    case = BenchCase(
        name=f"dispatch {mode.value}: barrier and link",
        shape=large.shape,
        run=over_the_link(context, large, mode),
        check=lambda got: expect_received(got, large, mode),
        other_inputs=lambda: other_inputs(large.x_TH),
        traffic=traffic,
        threshold=traffic.at_least(LEAST_SHARE[mode]) if traffic and context.held else None,
    )
    run(case, method)


@each_mode
def bench_receive(
    context: SuiteContext, large: RoutingProblem, run: RunCase, method: Method, mode: DispatchMode
) -> None:
    """All of a dispatch up to what it receives: barriers, staging, the way over the link."""
    run(receive_case(context, large, mode, f"dispatch {mode.value}: staging, barriers and link"), method)


@each_mode
def bench_ids_to_rows(
    context: SuiteContext, large: RoutingProblem, run: RunCase, method: Method, mode: DispatchMode
) -> None:
    """``ep.plan``, then ``ep.dispatch``: ids in, rows in canonical order out, through the public API."""
    shape = large.shape
    ids = cost.exchange_link_bytes(
        world_size=context.group.world_size, max_tokens=shape.tokens, top_k=shape.top_k, with_scores=False
    )
    gathered = large.mean(lambda counts: cost.canonical_gather_bytes(counts, shape.row_bytes)[mode])
    traffic = rows_in(context, large, mode, more_bytes=ids, more_memory=gathered)
    held = context.held and mode is DispatchMode.ALL_TO_ALL
    config = EPConfig(dispatch=mode)
    with ExpertParallel(backend="fast", config=config, max_tokens_per_rank=shape.tokens) as ep:
        case = BenchCase(
            name=f"ids to rows, {mode.value}: plan and dispatch",
            shape=shape,
            run=lambda: ep.dispatch(large.x_TH, ep.plan(large.topk_idx_TK, shape.num_experts)),
            check=lambda got: expect_received(got, large, DispatchMode.ALL_TO_ALL),
            other_inputs=lambda: other_inputs(large.x_TH, large.topk_idx_TK),
            traffic=traffic,
            threshold=traffic.at_most(MOST_TIMES_FROM_IDS) if traffic and held else None,
        )
        run(case, method)


@pytest.mark.parametrize("collective", ["all_to_all_single", "all_gather"])
def bench_nccl_dispatch(context: SuiteContext, large: RoutingProblem, run: RunCase, collective: str) -> None:
    """X in, rows in canonical order out, by ``torch.distributed``: NCCL on GPUs. The routing is known beforehand."""
    if context.group.world_size == 1:
        pytest.skip("one rank has nobody to communicate with")
    if collective == "all_to_all_single":
        function, rows = nccl_baseline.NcclSlotExchange(large).dispatch, large.mean(lambda counts: counts.slots_in)
    else:
        function = nccl_baseline.dispatch_by_all_gather(large)
        rows = large.mean(lambda counts: counts.remote_ranks * counts.tokens)
    case = BenchCase(
        name=f"usual dispatch, {collective}: gathers and link",
        shape=large.shape,
        run=function,
        check=lambda got: expect_received(got, large, DispatchMode.ALL_TO_ALL),
        other_inputs=lambda: other_inputs(large.x_TH),
        traffic=context.traffic(rows * large.shape.row_bytes, cost.WAY_OF_COMBINE),
    )
    run(case, context.behind_work)


def receive_case(context: SuiteContext, problem: RoutingProblem, mode: DispatchMode, name: str) -> BenchCase:
    """All of a dispatch of ``problem``, up to what it receives."""
    primitive, workspace = dispatch_primitives(context.workspace)[mode], context.workspace

    def receive() -> Tensor:
        workspace.enter()
        return primitive.receive(problem.x_TH, problem.plan)

    return BenchCase(
        name=name,
        shape=problem.shape,
        run=receive,
        check=lambda got: expect_received(got, problem, mode),
        other_inputs=lambda: other_inputs(problem.x_TH),
        traffic=rows_in(context, problem, mode),
    )


def over_the_link(context: SuiteContext, problem: RoutingProblem, mode: DispatchMode) -> Callable[[], Tensor]:
    """Collective: stage the tokens. What is returned waits for the other ranks, then receives."""
    workspace, plan, x_TH = context.workspace, problem.plan, problem.x_TH
    staged = stage_tokens(x_TH, plan.max_tokens, workspace)
    gather = CopyEngineGather(workspace, TOKENS)
    pull = {
        DispatchMode.ALL_GATHER: lambda: gather.bring(x_TH, staged, plan.max_tokens).wait(),
        DispatchMode.ALL_TO_ALL: lambda: pull_to_rows(x_TH, staged.addresses, plan, plan.row_capacity),
        DispatchMode.RANK_DEDUP: lambda: pull_packed(x_TH, staged, plan),
    }[mode]

    def wait_and_pull() -> Tensor:
        workspace.barrier_after_write()
        return pull()

    return wait_and_pull


def rows_in(
    context: SuiteContext, problem: RoutingProblem, mode: DispatchMode, *, more_bytes: int = 0, more_memory: float = 0
) -> LinkTraffic | None:
    """What a dispatch with its staging brings to a rank over the link and moves in its memory, and more of either."""
    row_bytes = problem.shape.row_bytes
    link_in = problem.mean(lambda counts: cost.dispatch_traffic(counts, row_bytes)[mode].link_in)
    memory = problem.mean(lambda counts: cost.dispatch_traffic(counts, row_bytes)[mode].memory)
    return context.traffic(link_in + more_bytes, cost.WAY_OF_DISPATCH[mode], memory + more_memory)


def expect_received(got: Tensor, problem: RoutingProblem, mode: DispatchMode) -> None:
    """Raise ``AssertionError`` unless these are the bits that the reference receives."""
    expected = problem.received[mode]
    assert_bitwise(got[: expected.shape[0]], expected, f"received by {mode.value}")
