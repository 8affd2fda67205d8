"""Calls of the fast layer that share memory: stacks, overflow, graphs, streams."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from layer_inputs import layer_inputs, plan_of
from matrix import BOTH_FLAGS, NO_FLAGS
from on_ranks import on_ranks
from plans_ahead import FEW_PLANS, plans_ahead
from promises import promise
from same import assert_same_bits
from there_and_back import MODES, Modes, assert_same, both, by_modes, changing, delay, outcome_of
from torch import Tensor

from sonic_ep import CombineMode, DispatchMode, EPConfig, ExpertParallel
from sonic_ep.backend import ExpertWeights
from sonic_ep.plan import RoutingPlan
from sonic_ep.reference.dense import dense_moe
from sonic_ep.testing import CASES, Case, Inputs, Rank, assert_bitwise, draw
from sonic_ep.testing.checks import Yardstick
from sonic_ep.testing.oracle import gather_parts, leaf, leaf_experts

pytestmark = pytest.mark.fast
LAYERS = 4
Layer = Callable[[Tensor, Inputs, ExpertWeights], Tensor]
# bf16 in sizes of whole 16 bytes: what captures in a graph by PyTorch's own products, and here by ours.
GRAPHED = replace(CASES["uniform_bf16"], hidden=64, intermediate=32, bias=False)


def trained(drawn: list[Inputs], x: Tensor, experts: list[ExpertWeights], dy: Tensor, layer: Layer) -> list[Tensor]:
    """y, dx and the gradients of w1 and w2 of residual layers of one shape."""
    y = x
    for inputs, own in zip(drawn, experts, strict=True):
        y = y + layer(y, inputs, own)
    y.backward(dy)
    return [y.detach(), x.grad, *(w.grad for own in experts for w in (own.w1, own.w2))]


def dense_stack(drawn: list[Inputs], dtype: torch.dtype) -> list[Tensor]:
    """The truth, without ranks, of all tokens and experts."""
    experts = [leaf_experts(inputs.experts, dtype=dtype) for inputs in drawn]

    def layer(y: Tensor, inputs: Inputs, own: ExpertWeights) -> Tensor:
        return dense_moe(y, inputs.topk_idx, inputs.topk_scores.to(dtype), own)

    return trained(drawn, leaf(drawn[0].x.to(dtype)), experts, drawn[0].dy.to(dtype), layer)


@promise("nothing-shared")
@on_ranks(2)
@pytest.mark.parametrize("flags", [pytest.param(NO_FLAGS, marks=pytest.mark.thorough), BOTH_FLAGS], ids=str)
def test_four_layers_of_one_shape_share_memory(rank: Rank, flags: dict[str, bool]) -> None:
    case = CASES["uneven_tokens"]
    drawn = [draw(replace(case, seed=seed), rank.world_size, rank.device) for seed in range(LAYERS)]
    with ExpertParallel(backend="fast", config=EPConfig(**flags)) as ep:
        tokens, held = drawn[0].tokens_of(ep.rank), drawn[0].experts_of(ep.rank)

        def layer(y: Tensor, inputs: Inputs, own: ExpertWeights) -> Tensor:
            routing = (inputs.topk_idx[tokens], inputs.topk_scores[tokens])
            return ep.moe_routed(y, *routing, own.w1, own.w2, b1=own.b1, b2=own.b2)

        experts = [leaf_experts(inputs.experts, held) for inputs in drawn]
        found = trained(drawn, leaf(drawn[0].x[tokens]), experts, drawn[0].dy[tokens], layer)
        truths, plains = dense_stack(drawn, torch.float64), dense_stack(drawn, case.dtype)
        sticks = [Yardstick(truth, plain) for truth, plain in zip(truths, plains, strict=True)]
        shares = [tokens] * 2 + [held] * (2 * LAYERS)
        parts = [stick.part(got, share) for stick, got, share in zip(sticks, found, shares, strict=True)]
        by_rank = gather_parts(parts, ep.group)
    judged = [stick.judge(str(place), [of[place] for of in by_rank]) for place, stick in enumerate(sticks)]
    assert not (wrong := [str(accuracy) for accuracy in judged if not accuracy.ok]), wrong


@contextmanager
def recorded() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """Names and arguments of the grouped products and combines that are queued while this lasts."""
    from sonic_ep.fast import gemm, hopper_gemm
    from sonic_ep.fast.exchange import Exchange

    seen: list[tuple[str, tuple[Any, ...]]] = []

    def noting(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(*arguments: Any, **options: Any) -> Tensor:
            seen.append((method.__name__, arguments))
            return method(*arguments, **options)

        return noted

    products = product((hopper_gemm.HopperGemm, gemm.LibraryGemm, gemm.LoopGemm, gemm.TritonGemm), ("rows", "weights"))
    with pytest.MonkeyPatch.context() as patch:
        for kind, name in [*products, (Exchange, "sums")]:
            patch.setattr(kind, name, noting(getattr(kind, name)))
        yield seen


@promise("x-gradient")
@on_ranks(2)
@pytest.mark.parametrize(
    ("need", "calls"),
    [
        # dA, dw2, dw1.
        ("experts", ["rows", "weights", "weights"]),
        # dA, the rows of dx, and their combine.
        ("x", ["rows", "rows", "sums"]),
    ],
)
def test_only_what_is_required_is_computed(rank: Rank, need: str, calls: list[str]) -> None:
    """Where no rank wants dx, or none wants gradients of experts."""
    case = CASES["uniform"]
    x, (router_w, w1, w2), dy = layer_inputs(rank, case)
    wanted = {"experts": (w1, w2), "x": (x,)}[need]
    for tensor in (x, router_w, w1, w2):
        tensor.requires_grad_(tensor in set(wanted))
    with ExpertParallel(backend="fast") as ep:
        y = ep.moe(x, router_w, w1, w2, case.top_k).y
        with recorded() as seen:
            y.backward(dy)
    assert [name for name, _ in seen] == calls
    assert (x.grad is not None) == (need == "x")


def step_of(ep: ExpertParallel, case: Case, x: Tensor, weights: list[Tensor], dy: Tensor) -> Callable[[], list[Tensor]]:
    """A forward and a backward: y, dx, d(router_w), dw1, dw2."""

    def step() -> list[Tensor]:
        y = ep.moe(x, *weights, case.top_k).y
        return [y.detach(), *torch.autograd.grad(y, [x, *weights], dy)]

    return step


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


@promise("graphs")
@on_ranks(1, 2, pool="cuda_pool")
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("pair", list(product(DispatchMode, CombineMode)), ids=lambda p: f"{p[0].value}+{p[1].value}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_graph_of_a_step_equals_eager_bit_for_bit(
    rank: Rank, dtype: torch.dtype, pair: tuple[DispatchMode, CombineMode], again: bool
) -> None:
    """Forward and backward in one graph: replays with new inputs, eager steps between."""
    config = EPConfig(dispatch=pair[0], combine=pair[1], redispatch_x_in_backward=again)
    case = replace(GRAPHED, dtype=dtype)
    x, weights, dy = layer_inputs(rank, case)
    with ExpertParallel(backend="fast", config=config) as ep:
        step = step_of(ep, case, x, weights, dy)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph, outcome = captured(step)
        for seed in range(3):
            fresh = torch.Generator(rank.device).manual_seed(10 * seed + rank.rank)
            with torch.no_grad():
                for tensor in (x, dy, *weights[1:]):
                    tensor.copy_(torch.randn(tensor.shape, generator=fresh, device=rank.device) * 0.2)
            graph.replay()
            replayed = [tensor.clone() for tensor in outcome]
            assert_same_bits(replayed, step(), f"of replay {seed}")
        ep.check()


@on_ranks(2, pool="cuda_pool")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("again", [False, True])
def test_no_read_on_the_host(rank: Rank, again: bool, dtype: torch.dtype, bias: bool) -> None:
    """A step in which PyTorch raises wherever the host would wait for the GPU."""
    case, config = replace(GRAPHED, dtype=dtype, bias=bias), EPConfig(redispatch_x_in_backward=again)
    x, weights, dy = layer_inputs(rank, case)
    with ExpertParallel(backend="fast", config=config) as ep:
        step = step_of(ep, case, x, weights, dy)
        expected = step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_same_bits(found, expected)


@on_ranks(1, pool="cuda_pool")
def test_exact_sizes_are_refused_in_a_graph_by_name(rank: Rank) -> None:
    case = GRAPHED
    x, weights, dy = layer_inputs(rank, case)
    with ExpertParallel(backend="fast", config=EPConfig(cpu_sync_on_runtime=True)) as ep:
        step = step_of(ep, case, x, weights, dy)
        expected = step()
        refused = pytest.raises(RuntimeError, match="cpu_sync_on_runtime: got a call in graph capture")
        with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
            step()
        torch.cuda.synchronize()
        assert_same_bits(step(), expected)


OVERFLOWS = [(CASES["uniform"], True), (CASES["uniform"], False)]
OVERFLOWS += [pytest.param(GRAPHED, False, marks=pytest.mark.thorough)]


@promise("overflow")
@on_ranks(2)
@pytest.mark.parametrize(("case", "sync"), OVERFLOWS)
def test_overflow_is_loud_and_leaves_the_group_usable(rank: Rank, case: Case, sync: bool) -> None:
    """More rows than the bound: NaN and an error, or the error at once; and the next call is right again."""
    inputs = draw(case, rank.world_size, rank.device)
    tokens, experts = inputs.tokens_of(rank.rank), leaf_experts(inputs.experts, inputs.experts_of(rank.rank))
    arguments = (inputs.topk_scores[tokens], experts.w1, experts.w2, experts.b1, experts.b2)
    x, many = leaf(inputs.x[tokens]), inputs.topk_idx[tokens]
    few = many.clone()
    few[1:] = -1
    config = EPConfig(max_rows=9, cpu_sync_on_runtime=sync)
    with plans_ahead(FEW_PLANS), ExpertParallel(backend="fast", config=config) as ep:
        expected = ep.moe_routed(x, few, *arguments)
        assert expected.isfinite().all()
        if sync:
            with pytest.raises(RuntimeError, match="max_rows: got 9, expected at least"):
                ep.moe_routed(x, many, *arguments)
        else:
            with recorded() as seen:
                y = ep.moe_routed(x, many, *arguments)
                x_grad, *weight_grads = torch.autograd.grad(y, [x, experts.w1, experts.w2], inputs.dy[tokens])
            assert y.isnan().all()
            assert x_grad.isnan().all()
            for grad in weight_grads:
                # An expert without a row has zeros.
                assert grad.isnan().any()
                assert (grad.isnan() | (grad == 0)).all()
            # PyTorch's products would read past the end.
            told = [(int(given[3][-1]), len(given[1])) for name, given in seen if name != "sums"]
            assert len(told) == 6
            assert all(ends <= rows == 9 for ends, rows in told)
            for _ in range(FEW_PLANS - 1):
                assert_bitwise(ep.moe_routed(x, few, *arguments), expected)
            with pytest.raises(RuntimeError, match="max_rows: got 9, expected at least"):
                ep.moe_routed(x, few, *arguments)
        assert_bitwise(ep.moe_routed(x, few, *arguments), expected)


@on_ranks(1, 2, pool="cuda_pool")
@by_modes
def test_graphs_replayed_among_eager_calls(rank: Rank, modes: Modes) -> None:
    """Three graphs, each replayed three times with new inputs, and eager calls in between."""
    drawn = [draw(replace(changing(0), seed=seed), rank.world_size, rank.device) for seed in (6, 7, 8, 9)]
    tokens = drawn[0].tokens_of(rank.rank)
    with both(modes) as (fast, reference), torch.no_grad():
        idx, x, scores = (tensor[tokens].clone() for tensor in (drawn[0].topk_idx, drawn[0].x, drawn[0].topk_scores))

        def step(ep: ExpertParallel) -> Tensor:
            plan = ep.plan(idx, drawn[0].case.num_experts)
            return ep.combine(ep.dispatch(x, plan).square(), scores, plan)

        step(fast)
        graphs = [captured(partial(step, fast)) for _ in range(3)]
        for inputs in drawn[1:]:
            for graph, y in graphs:
                for buffer, tensor in ((idx, inputs.topk_idx), (x, inputs.x), (scores, inputs.topk_scores)):
                    buffer.copy_(tensor[tokens])
                expected = step(reference)
                graph.replay()
                assert_bitwise(y, expected, "replayed")
                assert_bitwise(step(fast), expected, "eager, between replays")
        fast.check()


@on_ranks(2, pool="cuda_pool")
def test_a_graph_outlives_growth(rank: Rank) -> None:
    """A graph keeps its shared memory when a larger call replaces it."""
    inputs = draw(changing(0), rank.world_size, rank.device)
    wide = draw(replace(changing(1), hidden=512), rank.world_size, rank.device)
    with both(MODES[2]) as (fast, reference), torch.no_grad():

        def forward(ep: ExpertParallel, of: Inputs, plan: RoutingPlan) -> Tensor:
            tokens = of.tokens_of(ep.rank)
            return ep.combine(ep.dispatch(of.x[tokens], plan), of.topk_scores[tokens], plan)

        expected, of_wide = (forward(reference, of, plan_of(reference, of)) for of in (inputs, wide))
        plan = plan_of(fast, inputs)
        forward(fast, inputs, plan)
        graph, y = captured(lambda: forward(fast, inputs, plan))
        assert_bitwise(forward(fast, wide, plan_of(fast, wide)), of_wide)
        graph.replay()
        assert_bitwise(y, expected)


@on_ranks(2, pool="cuda_pool")
@by_modes
def test_calls_on_changing_streams(rank: Rank, modes: Modes) -> None:
    inputs = draw(changing(0), rank.world_size, rank.device)
    streams = [torch.cuda.Stream() for _ in range(2)]
    with both(modes) as (fast, reference):
        expected = outcome_of(reference, inputs)
        torch.cuda.synchronize()
        for iteration in range(4):
            with torch.cuda.stream(streams[iteration % 2]):
                if iteration % rank.world_size == rank.rank:
                    delay(rank)
                found = outcome_of(fast, inputs)
        # Not in between: the next call, on another stream, has to wait by itself.
        streams[1].synchronize()
        assert_same(found, expected, "on changing streams")


@on_ranks(1, 2, pool="cuda_pool")
@by_modes
def test_growth_on_changing_streams(rank: Rank, modes: Modes) -> None:
    """Rows get wider on every call: memory is replaced while another stream uses it. Every other call is late."""
    inputs = draw(changing(0), rank.world_size, rank.device)
    wide = [inputs.x[inputs.tokens_of(rank.rank)].repeat(1, 64 * 2**iteration) for iteration in range(6)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    with both(modes) as (fast, reference), torch.no_grad():
        plan = plan_of(reference, inputs)
        expected = [reference.dispatch(x, plan)[: plan.rows()] for x in wide]
        plan = plan_of(fast, inputs)
        torch.cuda.synchronize()
        found = []
        with pytest.MonkeyPatch.context() as patch:
            workspace = fast._backend._context(rank.device).workspace
            barrier = workspace._barrier

            def late_barrier(tag: int) -> None:
                delay(rank)
                barrier(tag)
                delay(rank)

            for iteration, x in enumerate(wide):
                late = iteration % 2 == 0 and rank.rank == rank.world_size - 1
                patch.setattr(workspace, "_barrier", late_barrier if late else barrier)
                with torch.cuda.stream(streams[iteration % 2]):
                    found.append(fast.dispatch(x, plan))
            torch.cuda.synchronize()
        for iteration, rows in enumerate(found):
            assert_bitwise(rows[: len(expected[iteration])], expected[iteration], f"in call {iteration}")
