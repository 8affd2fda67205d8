"""Second derivatives are refused, not wrong."""

import pytest
import torch
from backends import both_backends
from layer_inputs import layer_inputs, routing_of

from sonic_ep import ExpertParallel
from sonic_ep.testing import CASES, Case, Rank, RankPool


def differentiated_twice(rank: Rank, case: Case, backend: str) -> None:
    x, weights, dy = layer_inputs(rank, case)
    with ExpertParallel(backend=backend) as ep:
        (grad,) = torch.autograd.grad(ep.moe(x, *weights, case.top_k).y, [x], dy, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()
        # Also where the gradient that comes in is a constant.
        (grad,) = torch.autograd.grad(ep.moe(x, *weights, case.top_k).y.sum(), [x], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.square().sum().backward()
        plan = ep.plan(routing_of(rank, case)[0], case.num_experts)
        rows = torch.zeros(plan.row_capacity, case.hidden, device=rank.device, requires_grad=True)
        y = ep.combine(rows, routing_of(rank, case)[1].requires_grad_(), plan)
        (grad,) = torch.autograd.grad(y, [rows], dy.clone().requires_grad_(), create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@both_backends
def test_second_derivatives_are_refused_not_wrong(pool: RankPool, backend: str) -> None:
    pool.run(differentiated_twice, CASES["uniform"], backend, world_size=2)
