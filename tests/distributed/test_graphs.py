"""On GPUs only: graphs replayed among eager calls, and calls on changing streams."""

from dataclasses import replace

import pytest
import torch
from layer_inputs import plan_of
from on_ranks import on_ranks
from there_and_back import MODES, Modes, assert_same, both, by_modes, changing, delay, outcome_of
from torch import Tensor

from sonic_ep import ExpertParallel
from sonic_ep.testing import Inputs, Rank, assert_bitwise, draw

pytestmark = pytest.mark.fast


@on_ranks(1, 2, pool="cuda_pool")
@by_modes
def test_graphs_replayed_among_eager_calls(rank: Rank, modes: Modes) -> None:
    """Three graphs, each replayed three times with new inputs, and eager calls of other shapes in between."""
    drawn = [draw(changing(0), rank.world_size, rank.device)]
    drawn += [draw(replace(drawn[0].case, seed=seed), rank.world_size, rank.device) for seed in (7, 8, 9)]
    tokens = drawn[0].tokens_of(rank.rank)
    with both(modes) as (fast, reference), torch.no_grad():
        idx, x, scores = (tensor[tokens].clone() for tensor in (drawn[0].topk_idx, drawn[0].x, drawn[0].topk_scores))

        def step(ep: ExpertParallel) -> Tensor:
            plan = ep.plan(idx, drawn[0].case.num_experts)
            return ep.combine(ep.dispatch(x, plan).square(), scores, plan)

        step(fast)
        graphs = []
        for _ in range(3):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = step(fast)
            graphs.append((graph, y))
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
    """A graph keeps the shared memory that it was captured with, also when a larger call has replaced it since."""
    inputs = draw(changing(0), rank.world_size, rank.device)
    wide = draw(replace(changing(1), hidden=512), rank.world_size, rank.device)
    tokens = inputs.tokens_of(rank.rank)
    with both(MODES[2]) as (fast, reference), torch.no_grad():
        expected = outcome_without_gradients(reference, inputs)
        outcome_without_gradients(fast, inputs)
        plan, x, scores = plan_of(fast, inputs), inputs.x[tokens], inputs.topk_scores[tokens]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fast.combine(fast.dispatch(x, plan), scores, plan)
        assert_bitwise(outcome_without_gradients(fast, wide), outcome_without_gradients(reference, wide))
        graph.replay()
        assert_bitwise(y, expected)


def outcome_without_gradients(ep: ExpertParallel, inputs: Inputs) -> Tensor:
    tokens, plan = inputs.tokens_of(ep.rank), plan_of(ep, inputs)
    return ep.combine(ep.dispatch(inputs.x[tokens], plan), inputs.topk_scores[tokens], plan)


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
            # No wait for the host in between: the next call, on another stream, has to wait by itself.
            streams[iteration % 2].synchronize() if iteration == 3 else None
        assert_same(found, expected, "on changing streams")


@on_ranks(1, 2, pool="cuda_pool")
@by_modes
def test_growth_on_changing_streams(rank: Rank, modes: Modes) -> None:
    """Wider rows on every call, so that memory is replaced while calls on another stream still use it.

    Every other call is late on one rank, so that the next one, which grows, finds its barriers under way.
    """
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
            barrier_before_write = workspace.barrier_before_write

            def late_barrier() -> None:
                delay(rank)
                barrier_before_write()
                delay(rank)

            for iteration, x in enumerate(wide):
                late = iteration % 2 == 0 and rank.rank == rank.world_size - 1
                patch.setattr(workspace, "barrier_before_write", late_barrier if late else barrier_before_write)
                with torch.cuda.stream(streams[iteration % 2]):
                    found.append(fast.dispatch(x, plan))
            torch.cuda.synchronize()
        for iteration, rows in enumerate(found):
            assert_bitwise(rows[: len(expected[iteration])], expected[iteration], f"in call {iteration}")
