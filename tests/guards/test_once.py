"""Second derivatives and forward-mode ones are refused, not wrong."""

import pytest
import torch
from backends import both_backends
from edge_calls import CALLS, SIZES, tensors_of
from layer_inputs import layer_inputs, routing_of
from on_ranks import on_ranks
from promises import promise
from torch.autograd import forward_ad

from sonic_ep import ExpertParallel
from sonic_ep.testing import CASES, Rank, assert_bitwise

CASE = CASES["uniform"]


@promise("second-derivatives")
@both_backends
@on_ranks(2)
def test_second_derivatives_are_refused_not_wrong(rank: Rank, backend: str) -> None:
    """Refused where a gradient's graph is asked for: what is asked of that later may not lead through the layer."""
    x, weights, dy = layer_inputs(rank, CASE)
    idx, scores = routing_of(rank, CASE)
    with ExpertParallel(backend=backend) as ep:

        def loss() -> torch.Tensor:
            # A residual: without it there might be no second derivative at all.
            return x.square().sum() + (ep.moe(x, *weights, CASE.top_k).y * dy).sum()

        expected = torch.autograd.grad(loss(), x)
        with pytest.raises(RuntimeError, match="create_graph=True"):
            torch.autograd.grad(loss(), x, create_graph=True)
        plan = ep.plan(idx, CASE.num_experts)
        with pytest.raises(RuntimeError, match="create_graph=True"):
            torch.autograd.grad(ep.dispatch(x, plan)[: plan.rows()].sum(), x, create_graph=True)
        rows = torch.zeros(plan.row_capacity, CASE.hidden, device=rank.device, requires_grad=True)
        y = ep.combine(rows, scores, plan)
        with pytest.raises(RuntimeError, match="create_graph=True"):
            torch.autograd.grad(y, rows, dy.clone().requires_grad_(), create_graph=True)
        # All ranks alike, before any of them has begun.
        for got, want in zip(torch.autograd.grad(loss(), x), expected, strict=True):
            assert_bitwise(got, want)


@both_backends
@on_ranks(1)
def test_a_gradient_without_memory_is_zero(rank: Rank, backend: str) -> None:
    x, weights, dy = layer_inputs(rank, CASE)
    with ExpertParallel(backend=backend) as ep:
        y = ep.moe(x, *weights, CASE.top_k).y
        y.backward(torch._efficientzerotensor(dy.shape, dtype=dy.dtype, device=dy.device))
    for leaf in (x, *weights):
        assert_bitwise(leaf.grad.abs(), torch.zeros_like(leaf))


@promise("forward-mode")
@both_backends
@on_ranks(1)
def test_tangents_are_refused_not_lost(rank: Rank, backend: str) -> None:
    """Each tensor of each call with a tangent, and each function as what ``torch.func.jvp`` differentiates."""
    with ExpertParallel(backend=backend) as ep:
        for call in CALLS.values():
            arguments = call.arguments(ep, rank.device, SIZES)
            expected = call.outcome(ep, arguments)
            for name in tensors_of(arguments):
                given = arguments[name]
                if not given.is_floating_point():
                    continue
                refused = pytest.raises(NotImplementedError, match=f"rank 0 of 1: {name}: got .* tangent")

                def of(tensor: torch.Tensor, name: str = name) -> object:
                    return call.run(ep, {**arguments, name: tensor})  # noqa: B023

                with refused:
                    torch.func.jvp(of, (given,), (given,))
                with forward_ad.dual_level():
                    dual = forward_ad.make_dual(given, given)
                    with refused:
                        of(dual)
                    # As inside of a function that has a rule of its own.
                    with forward_ad._set_fwd_grad_enabled(False):
                        of(dual)
            with forward_ad.dual_level():
                for got, want in zip(call.outcome(ep, arguments), expected, strict=True):
                    assert_bitwise(got, want)


@promise("forward-mode")
@both_backends
@on_ranks(2)
def test_gradients_with_tangents_are_refused_not_wrong(rank: Rank, backend: str) -> None:
    """Refused before any communication: backward without one goes on."""
    x, weights, dy = layer_inputs(rank, CASE)
    with ExpertParallel(backend=backend) as ep, forward_ad.dual_level():
        y = ep.moe(x, *weights, CASE.top_k).y
        with pytest.raises(NotImplementedError, match="a gradient with a tangent"):
            torch.autograd.grad(y, x, forward_ad.make_dual(dy, dy), retain_graph=True)
        assert forward_ad.unpack_dual(torch.autograd.grad(y, x, dy)[0]).tangent is None
