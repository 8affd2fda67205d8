"""Under PyTorch's modes calls are the same or refused: autocast, compilation, other kinds of derivatives."""

import pytest
import torch
from backends import both_backends
from edge_calls import ARGUMENTS, arguments_of, outcome, run, tensors_of
from layer_inputs import layer_inputs, routing_of
from on_ranks import on_ranks
from promises import promise
from same import assert_same_bits
from torch import Tensor
from torch.autograd import forward_ad

from sonic_ep import EPConfig, ExpertParallel, MoE
from sonic_ep.testing import CASES, Case, Rank

CASE = CASES["uniform"]


@promise("compile")
@both_backends
@on_ranks(1, pool="cpu_pool")
def test_calls_in_what_is_compiled_run_as_they_are(rank: Rank, backend: str) -> None:
    x, weights, _ = layer_inputs(rank, CASE)
    leaves, (idx, scores) = [x, *weights], routing_of(rank, CASE)

    def layer(x: Tensor, *weights: Tensor) -> Tensor:
        return (ep.moe(x * 2, *weights, CASE.top_k).y * 3).sum()

    def in_parts(x: Tensor, *_: Tensor) -> Tensor:
        plan = ep.plan(idx, CASE.num_experts)
        return ep.combine(ep.dispatch(x * 2, plan) * 1.5, scores, plan).sum()

    with ExpertParallel(backend=backend) as ep:
        for function in (layer, in_parts):
            expected = function(*leaves)
            grads = torch.autograd.grad(expected, leaves, allow_unused=True)
            compiled = torch.compile(function, backend="aot_eager")
            for _ in range(2):
                found = compiled(*leaves)
                assert torch.equal(found, expected)
                assert_same_bits(torch.autograd.grad(found, leaves, allow_unused=True), grads)
        module = MoE(CASE.hidden, 4, num_experts=4, top_k=2, ep=ep)
        assert torch.equal(torch.compile(module, backend="aot_eager")(x).y, module(x).y)


@pytest.mark.fast
@on_ranks(1, pool="cpu_pool")
def test_a_first_call_inside_of_a_transform_is_refused(rank: Rank) -> None:
    """Memory that it would make there is not what it seems; what was made outside is right."""
    x, weights, _ = layer_inputs(rank, CASE)
    x, *weights = (tensor.detach() for tensor in (x, *weights))
    with ExpertParallel(backend="fast") as ep:
        transformed = torch.func.functionalize(lambda x: ep.moe(x, *weights, CASE.top_k).y)
        with pytest.raises(RuntimeError, match=r"first call inside of a transform of torch\.func: make it outside"):
            transformed(x)
        assert ep.moe(x, *weights, CASE.top_k).y.shape == x.shape


@promise("autocast")
@pytest.mark.parametrize("case", [CASES["uniform_bf16"], CASES["uneven_tokens"]], ids=lambda case: case.name)
@both_backends
@on_ranks(1)
def test_autocast_changes_no_bit_forward_and_backward(rank: Rank, backend: str, case: Case) -> None:
    """Or with backward alone under it; and it is on again for the caller's own operations."""
    x, weights, dy = layer_inputs(rank, case)
    lower = torch.float16 if case.dtype == torch.bfloat16 else torch.bfloat16
    seen: list[bool] = []

    def see(*_: object) -> None:
        seen.append(torch.is_autocast_enabled(x.device.type))

    for again in (False, True):
        with ExpertParallel(backend=backend, config=EPConfig(redispatch_x_in_backward=again)) as ep:
            y = ep.moe(x, *weights, case.top_k).y
            expected = [y.detach(), *torch.autograd.grad(y, [x, *weights], dy, retain_graph=True)]
            with torch.autocast(rank.device.type, dtype=lower):
                late = torch.autograd.grad(y, [x, *weights], dy)
                before = x * 1
                before.register_hook(see)
                before.grad_fn.register_hook(see)
                within = ep.moe(before, *weights, case.top_k).y
                found = [within.detach(), *torch.autograd.grad(within, [x, *weights], dy)]
                assert torch.mm(x.detach(), x.detach().t()).dtype == lower
            assert_same_bits((*found, *late), (*expected, *expected[1:]))
    assert seen == [True] * 4


@promise("second-derivatives", "forward-mode")
@both_backends
@on_ranks(2)
def test_second_derivatives_and_gradients_with_tangents_are_refused_not_wrong(rank: Rank, backend: str) -> None:
    """Before any communication: where a graph of a gradient is asked for, a tangent comes in, or a graph is used up."""
    x, weights, dy = layer_inputs(rank, CASE)
    idx, scores = routing_of(rank, CASE)
    with ExpertParallel(backend=backend) as ep:

        def loss() -> Tensor:
            # Without the residual there might be no second derivative.
            return x.square().sum() + (ep.moe(x, *weights, CASE.top_k).y * dy).sum()

        first = loss()
        expected = torch.autograd.grad(first, x)
        with pytest.raises(RuntimeError, match="through the graph a second time"):
            torch.autograd.grad(first, x)
        plan = ep.plan(idx, CASE.num_experts)
        rows = torch.zeros(plan.row_capacity, CASE.hidden, device=rank.device, requires_grad=True)
        of_dispatch = ep.dispatch(x, plan)[: plan.rows()].sum()
        of_combine = (ep.combine(rows, scores, plan), rows, dy.clone().requires_grad_())
        for arguments in ((loss(), x), (of_dispatch, x), of_combine):
            with pytest.raises(RuntimeError, match="create_graph=True"):
                torch.autograd.grad(*arguments, create_graph=True)
        with forward_ad.dual_level():
            y = ep.moe(x, *weights, CASE.top_k).y
            with pytest.raises(NotImplementedError, match="a gradient with a tangent"):
                torch.autograd.grad(y, x, forward_ad.make_dual(dy, dy), retain_graph=True)
            assert forward_ad.unpack_dual(torch.autograd.grad(y, x, dy)[0]).tangent is None
        assert_same_bits(torch.autograd.grad(loss(), x), expected)


@promise("forward-mode")
@both_backends
@on_ranks(1)
def test_tangents_are_refused_not_lost(rank: Rank, backend: str) -> None:
    """Each tensor of each call with a tangent, and each function as what ``torch.func.jvp`` differentiates."""
    with ExpertParallel(backend=backend) as ep:
        for call in ARGUMENTS:
            arguments = arguments_of(call, ep, rank.device)
            expected = outcome(call, ep, arguments)
            for name in tensors_of(arguments):
                given = arguments[name]
                if not given.is_floating_point():
                    continue
                refused = pytest.raises(NotImplementedError, match=f"rank 0 of 1: {name}: got .* tangent")

                def of(tensor: Tensor, name: str = name) -> object:
                    return run(call, ep, {**arguments, name: tensor})  # noqa: B023

                with refused:
                    torch.func.jvp(of, (given,), (given,))
                with forward_ad.dual_level():
                    dual = forward_ad.make_dual(given, given)
                    with refused:
                        of(dual)
                    # Inside of a function with a rule of its own.
                    with forward_ad._set_fwd_grad_enabled(False):
                        of(dual)
            with forward_ad.dual_level():
                assert_same_bits(outcome(call, ep, arguments), expected)
