"""Plan, dispatch and combine: each alone, both with a decoding step's worth of tokens, and the NCCL baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from harness import nccl_baseline
from harness.context import BenchCase, Method, RunCase, SuiteContext, other_inputs
from harness.results import LinkTraffic, Threshold
from torch import Tensor

from sonic_ep import CombineMode, DispatchMode, EPConfig, ExpertParallel, cost
from sonic_ep.fast.collectives import COPIED_TOKENS, stage_tokens
from sonic_ep.fast.combine import combine_primitives
from sonic_ep.fast.copy_engine import CopyEngineGather
from sonic_ep.fast.dispatch import dispatch_primitives
from sonic_ep.fast.dispatch.all_to_all import pull_to_rows
from sonic_ep.fast.dispatch.rank_dedup import pull_packed
from sonic_ep.profiler.problem import RoutingProblem
from sonic_ep.profiler.verification import assert_bitwise
from sonic_ep.testing import assert_as_accurate

# Thresholds. The share of its ceiling that each dispatch mode has to reach over the link.
LEAST_SHARE = {DispatchMode.ALL_GATHER: 0.93, DispatchMode.ALL_TO_ALL: 0.92, DispatchMode.RANK_DEDUP: 0.93}
# Ids in, rows out, by the one mode whose rows arrive where the experts want them, and rows in, sums out, by the mode
# that moves least: at most so many times what the bytes take at the ceiling.
MOST_TIMES_FROM_IDS, MOST_TIMES_OF_COMBINE = 1.35, 1.25
# Slots of the group, and the microseconds that a plan of them may take.
MOST_MICROS_OF_PLAN = {262_144: 80, 1_048_576: 150}
# Of the first of ``SMALL_PAIRS`` in a graph, with a plan that was made before.
MOST_OF_SMALL = Threshold(text="at most 60 us", seconds=60e-6)
SMALL_PAIRS = (
    (DispatchMode.ALL_TO_ALL, CombineMode.RANK_DEDUP),
    (DispatchMode.ALL_TO_ALL, CombineMode.ALL_TO_ALL),
    (DispatchMode.ALL_TO_ALL, CombineMode.REDUCE_SCATTER),
    (DispatchMode.RANK_DEDUP, CombineMode.RANK_DEDUP),
    (DispatchMode.ALL_GATHER, CombineMode.RANK_DEDUP),
)
SCORE_BYTES = 4

each_dispatch = pytest.mark.parametrize("mode", list(DispatchMode), ids=lambda mode: mode.value)
each_combine = pytest.mark.parametrize("mode", list(CombineMode), ids=lambda mode: mode.value)


@pytest.mark.parametrize("size", [0, 1])
def bench_plan(context: SuiteContext, run: RunCase, method: Method, size: int) -> None:
    """``ep.plan`` through the public API: ids in, every field out, the exchange of the ids included."""
    if size >= len(context.sizes.plans):
        pytest.skip("one plan only at a shape of the caller's")
    large, world_size = context.sizes.large, context.group.world_size
    shape = replace(large, tokens=context.sizes.plans[size] // (world_size * large.top_k))
    problem = RoutingProblem(shape=shape, group=context.group, device=context.device)
    slots = world_size * shape.tokens * shape.top_k
    micros = MOST_MICROS_OF_PLAN.get(slots)
    most = micros and Threshold(text=f"at most {micros} us at {slots} slots", seconds=micros / 1e6)
    with ExpertParallel(backend="fast", max_tokens_per_rank=shape.tokens) as ep:
        case = BenchCase(
            name="plan",
            shape=shape,
            run=lambda: ep.plan(problem.topk_idx_TK, shape.num_experts),
            check=problem.check_plan,
            other_inputs=lambda: other_inputs(problem.topk_idx_TK),
            threshold=most or None,
        )
        run(case, method)


@each_dispatch
def bench_link(context: SuiteContext, large: RoutingProblem, run: RunCase, method: Method, mode: DispatchMode) -> None:
    """The tokens stand in shared memory already: the barrier behind that, and the way over the link."""
    workspace, plan, x_TH = context.workspace, large.plan, large.x_TH
    # In one buffer instead of halves, of which each barrier would point the kernels to the other.
    staged = stage_tokens(x_TH, plan.max_tokens, workspace, COPIED_TOKENS, in_turn=False)
    gather, epoch = CopyEngineGather(workspace, COPIED_TOKENS), workspace.epoch
    pull = {
        DispatchMode.ALL_GATHER: lambda: gather.bring(x_TH, staged, plan.max_tokens).wait(),
        DispatchMode.ALL_TO_ALL: lambda: pull_to_rows(x_TH, staged.addresses, epoch, plan, plan.row_capacity),
        DispatchMode.RANK_DEDUP: lambda: pull_packed(x_TH, staged, epoch, plan),
    }[mode]

    def wait_and_pull() -> Tensor:
        workspace.barrier_after_write()
        return pull()

    staging = large.mean(lambda counts: cost.staging_bytes(counts, large.shape.row_bytes))
    traffic = rows_in(context, large, mode, more_memory=-staging)
    threshold = traffic.at_least(LEAST_SHARE[mode]) if traffic else None
    name = f"dispatch {mode.value}: barrier and link"
    run(dispatch_case(large, mode, name, wait_and_pull, traffic=traffic, threshold=threshold), method)


@each_dispatch
def bench_receive(
    context: SuiteContext, large: RoutingProblem, run: RunCase, method: Method, mode: DispatchMode
) -> None:
    """All of a dispatch up to what it receives: staging, the barrier behind it, the way over the link."""
    run(receive_case(context, large, mode, f"dispatch {mode.value}: staging, barriers and link"), method)


@each_dispatch
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
    with ExpertParallel(backend="fast", config=EPConfig(dispatch=mode), max_tokens_per_rank=shape.tokens) as ep:
        case = dispatch_case(
            *(large, DispatchMode.ALL_TO_ALL, f"ids to rows, {mode.value}: plan and dispatch"),
            lambda: ep.dispatch(large.x_TH, ep.plan(large.topk_idx_TK, shape.num_experts)),
            traffic=traffic,
            threshold=traffic.at_most(MOST_TIMES_FROM_IDS) if traffic and mode is DispatchMode.ALL_TO_ALL else None,
        )
        run(replace(case, other_inputs=lambda: other_inputs(large.x_TH, large.topk_idx_TK)), method)


@pytest.mark.parametrize("collective", ["all_to_all_single", "all_gather"])
def bench_nccl_dispatch(context: SuiteContext, large: RoutingProblem, run: RunCase, collective: str) -> None:
    """X in, rows in canonical order out, by ``torch.distributed``: NCCL on GPUs. The routing is known beforehand."""
    skip_alone(context)
    if collective == "all_to_all_single":
        function, rows = nccl_baseline.NcclSlotExchange(large).dispatch, large.mean(lambda counts: counts.slots_in)
    else:
        function = nccl_baseline.dispatch_by_all_gather(large)
        rows = large.mean(lambda counts: counts.remote_ranks * counts.tokens)
    traffic = context.traffic(rows * large.shape.row_bytes, cost.WAY_OF_COMBINE)
    name = f"usual dispatch, {collective}: gathers and link"
    run(dispatch_case(large, DispatchMode.ALL_TO_ALL, name, function, traffic=traffic), context.behind_work)


@pytest.mark.parametrize("weighted", [True, False], ids=["scores", "no_scores"])
@each_combine
def bench_combine(
    context: SuiteContext, large: RoutingProblem, run: RunCase, method: Method, mode: CombineMode, *, weighted: bool
) -> None:
    """Rows in canonical order in, sums of this rank's tokens out; with scores, their exchange too."""
    name = f"combine {mode.value}: {'scores, ' if weighted else ''}barriers, sums and link"
    case = combine_case(context, large, mode, name, weighted=weighted)
    held = mode is CombineMode.RANK_DEDUP and weighted
    run(replace(case, threshold=case.traffic.at_most(MOST_TIMES_OF_COMBINE) if case.traffic and held else None), method)


@pytest.mark.parametrize("collective", ["all_to_all_single", "reduce_scatter"])
def bench_nccl_combine(context: SuiteContext, large: RoutingProblem, run: RunCase, collective: str) -> None:
    """Sums by ``torch.distributed``: NCCL on GPUs. Before ``reduce_scatter`` each rank has summed what it holds."""
    skip_alone(context)
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
        traffic=sums_in(context, large, mode),
    )
    run(case, context.behind_work)


@pytest.mark.parametrize("planned", [True, False], ids=["planned", "with_plan"])
@pytest.mark.parametrize("pair", SMALL_PAIRS, ids=lambda pair: f"{pair[0].value}-{pair[1].value}")
def bench_small(
    context: SuiteContext, run: RunCase, method: Method, pair: tuple[DispatchMode, CombineMode], *, planned: bool
) -> None:
    """``ep.dispatch``, then ``ep.combine`` of the rows as they are, where launches and barriers take the time.

    planned: by a plan that was made before. One is made once a layer, or once for several.
    """
    dispatch, combine = pair
    small = RoutingProblem(shape=context.sizes.small, group=context.group, device=context.device)
    config = EPConfig(dispatch=dispatch, combine=combine)
    with ExpertParallel(backend="fast", config=config, max_tokens_per_rank=small.shape.tokens) as ep:
        made = ep.plan(small.topk_idx_TK, small.shape.num_experts)

        def there_and_back() -> Tensor:
            plan = made if planned else ep.plan(small.topk_idx_TK, small.shape.num_experts)
            return ep.combine(ep.dispatch(small.x_TH, plan), small.scores_TK, plan)

        case = BenchCase(
            name=f"small {dispatch.value}, {combine.value}: {'' if planned else 'plan, '}dispatch and combine",
            shape=small.shape,
            run=there_and_back,
            check=lambda got: assert_bitwise(got, small.round_trips[combine], "sums"),
            other_inputs=lambda: other_inputs(small.x_TH, small.scores_TK),
            threshold=MOST_OF_SMALL if planned and method is Method.GRAPH and pair == SMALL_PAIRS[0] else None,
        )
        run(case, method)


def skip_alone(context: SuiteContext) -> None:
    """Skip a bench of communication on one rank."""
    if context.group.world_size == 1:
        pytest.skip("one rank has nobody to communicate with")


def dispatch_case(
    problem: RoutingProblem,
    mode: DispatchMode,
    name: str,
    run: Callable[[], Tensor],
    *,
    traffic: LinkTraffic | None,
    threshold: Threshold | None = None,
) -> BenchCase:
    """A dispatch, compared bit for bit with what the reference receives in this mode."""
    expected = problem.received[mode]
    return BenchCase(
        name=name,
        shape=problem.shape,
        run=run,
        check=lambda got: assert_bitwise(got[: expected.shape[0]], expected, f"received by {mode.value}"),
        other_inputs=lambda: other_inputs(problem.x_TH),
        traffic=traffic,
        threshold=threshold,
    )


def receive_case(context: SuiteContext, problem: RoutingProblem, mode: DispatchMode, name: str) -> BenchCase:
    """All of a dispatch of ``problem``, up to what it receives."""
    primitive, workspace = dispatch_primitives(context.workspace)[mode], context.workspace

    def receive() -> Tensor:
        workspace.enter()
        return primitive.receive(problem.x_TH, problem.plan)

    return dispatch_case(problem, mode, name, receive, traffic=rows_in(context, problem, mode))


def combine_case(
    context: SuiteContext, problem: RoutingProblem, mode: CombineMode, name: str, *, weighted: bool
) -> BenchCase:
    """The combine of one mode; scores (T, K) of every rank are gathered in it, if there are any."""
    primitive, workspace = combine_primitives(context.workspace)[mode], context.workspace

    def combine() -> Tensor:
        workspace.enter()
        if weighted:
            return primitive.weighted(problem.rows_RH, problem.scores_TK, problem.plan)[0]
        return primitive.combine(problem.rows_RH, None, problem.plan)

    scores = (context.group.world_size - 1) * problem.shape.tokens * problem.shape.top_k * SCORE_BYTES
    return BenchCase(
        name=name,
        shape=problem.shape,
        run=combine,
        check=lambda got: assert_bitwise(got, problem.sums[mode, weighted], f"sums by {mode.value}"),
        other_inputs=lambda: other_inputs(problem.rows_RH, problem.scores_TK),
        traffic=sums_in(context, problem, mode, scores if weighted else 0),
    )


def rows_in(
    context: SuiteContext, problem: RoutingProblem, mode: DispatchMode, *, more_bytes: int = 0, more_memory: float = 0
) -> LinkTraffic | None:
    """What a dispatch with its staging brings to a rank over the link and moves in its memory, and more of either."""
    row_bytes = problem.shape.row_bytes
    link_in = problem.mean(lambda counts: cost.dispatch_traffic(counts, row_bytes)[mode].link_in)
    memory = problem.mean(lambda counts: cost.dispatch_traffic(counts, row_bytes)[mode].memory)
    return context.traffic(link_in + more_bytes, cost.WAY_OF_DISPATCH[mode], memory + more_memory)


def sums_in(
    context: SuiteContext, problem: RoutingProblem, mode: CombineMode, more_bytes: int = 0
) -> LinkTraffic | None:
    """What a combine brings to a rank over the link, rows or sums and ``more_bytes``, and moves in its memory."""
    row_bytes = problem.shape.row_bytes
    link_in = problem.mean(lambda counts: cost.combine_traffic(counts, row_bytes)[mode].link_in)
    memory = problem.mean(lambda counts: cost.combine_traffic(counts, row_bytes)[mode].memory)
    return context.traffic(link_in + more_bytes, cost.WAY_OF_COMBINE, memory)
