"""Second derivatives are refused, not wrong."""

import pytest
import torch
from backends import both_backends
from layer_inputs import layer_inputs, routing_of

from sonic_ep import ExpertParallel
from sonic_ep.testing import CASES, Case, Rank, RankPool, assert_bitwise


def differentiated_twice(rank: Rank, case: Case, backend: str) -> None:
    """Refused where a gradient's graph is asked for: what is asked of that later may not lead through the layer."""
    x, weights, dy = layer_inputs(rank, case)
    idx, scores = routing_of(rank, case)
    with ExpertParallel(backend=backend) as ep:

        def loss() -> torch.Tensor:
            # A residual: without it there might be no second derivative at all.
            return x.square().sum() + (ep.moe(x, *weights, case.top_k).y * dy).sum()

        expected = torch.autograd.grad(loss(), x)
        with pytest.raises(RuntimeError, match="create_graph=True"):
            torch.autograd.grad(loss(), x, create_graph=True)
        plan = ep.plan(idx, case.num_experts)
        with pytest.raises(RuntimeError, match="create_graph=True"):
            torch.autograd.grad(ep.dispatch(x, plan)[: plan.rows()].sum(), x, create_graph=True)
        rows = torch.zeros(plan.row_capacity, case.hidden, device=rank.device, requires_grad=True)
        y = ep.combine(rows, scores, plan)
        with pytest.raises(RuntimeError, match="create_graph=True"):
            torch.autograd.grad(y, rows, dy.clone().requires_grad_(), create_graph=True)
        # All ranks alike, before any of them has begun.
        for got, want in zip(torch.autograd.grad(loss(), x), expected, strict=True):
            assert_bitwise(got, want)


def zeros_of_no_memory(rank: Rank, case: Case, backend: str) -> None:
    x, weights, dy = layer_inputs(rank, case)
    with ExpertParallel(backend=backend) as ep:
        y = ep.moe(x, *weights, case.top_k).y
        y.backward(torch._efficientzerotensor(dy.shape, dtype=dy.dtype, device=dy.device))
    for leaf in (x, *weights):
        assert_bitwise(leaf.grad.abs(), torch.zeros_like(leaf))


@both_backends
def test_a_gradient_that_is_nowhere_in_memory_is_zero(pool: RankPool, backend: str) -> None:
    pool.run(zeros_of_no_memory, CASES["uniform"], backend, world_size=1)


@both_backends
def test_second_derivatives_are_refused_not_wrong(pool: RankPool, backend: str) -> None:
    pool.run(differentiated_twice, CASES["uniform"], backend, world_size=2)
