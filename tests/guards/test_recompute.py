"""Activation checkpointing runs forward again: with the same routing, near ties too, or it is found and named."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from backends import both_backends
from layer_inputs import layer_inputs
from on_ranks import on_ranks
from promises import promise
from routers import randn
from same import assert_same_bits
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sonic_ep
from sonic_ep import EPConfig, ExpertParallel, RecomputeError
from sonic_ep.testing import CASES, Rank

pytestmark = promise("recompute")

# Tokens of which dropout, drawn twice, hardly ever routes all alike.
MANY = 40
CASE = replace(CASES["uneven_tokens"], bias=False)
UNCHECKED = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}
SAID = "got another routing when activation checkpointing ran forward again, expected the same"


def tied(weight_EH: Tensor) -> Tensor:
    """A router whose pairs of experts give a token the same logit, or differ in its last bit."""
    pairs = weight_EH.detach().clone()
    pairs[1::2] = pairs[::2]
    pairs[1::4, 0] = torch.nextafter(pairs[1::4, 0], pairs.new_tensor(torch.inf))
    return pairs.requires_grad_()


@both_backends
@on_ranks(2)
def test_ties_fall_the_same_way_in_recompute(rank: Rank, backend: str) -> None:
    """Both kinds of checkpointing, with dropout in front of the layer; where nothing is drawn, without its state."""
    x, (router_w, *experts), dy = layer_inputs(rank, CASE)
    weights = [tied(router_w), *experts]
    config = EPConfig(redispatch_x_in_backward=True)
    with ExpertParallel(backend=backend, config=config) as ep:
        for drawn in (True, False):

            def layer(x: Tensor, drawn: bool = drawn) -> Tensor:
                return ep.moe(torch.dropout(x, 0.25, drawn), *weights, CASE.top_k).y

            torch.manual_seed(5)
            expected = torch.autograd.grad(layer(x), [x, *weights], dy)
            for reentrant in (False, True):
                torch.manual_seed(5)
                y = checkpoint(layer, x, use_reentrant=reentrant, preserve_rng_state=drawn)
                # Other draws in between.
                torch.rand(7, device=rank.device)
                y.backward(dy)
                assert_same_bits([tensor.grad for tensor in (x, *weights)], expected)
                x.grad = weights[0].grad = weights[1].grad = weights[2].grad = None


@promise("usable-after-errors")
@pytest.mark.parametrize(("backend", "exact"), [("reference", False), ("fast", False), ("fast", True)])
@on_ranks(1, 2)
def test_another_routing_in_recompute_is_named(rank: Rank, backend: str, exact: bool) -> None:
    """Dropout drawn anew in recompute, on one rank alone: all of them raise it, and no gradient is a number."""
    x, weights, dy = layer_inputs(rank, CASE)
    ep = ExpertParallel(backend=backend, config=EPConfig(cpu_sync_on_runtime=exact))

    def layer(x: Tensor) -> Tensor:
        dropped = torch.dropout(x, 0.5, rank.rank == 0)
        return ep.moe(dropped, *weights, CASE.top_k).y

    def backward() -> None:
        checkpoint(layer, x, **UNCHECKED).backward(dy)

    at_once = backend == "reference" or exact
    if not at_once:
        backward()
        grads = [tensor.grad for tensor in (x, *weights)]
        assert_no_number(*grads)
        assert all(grad.isnan().any() for grad in grads)
    with pytest.raises(RecomputeError, match=f"rank {rank.rank} of {rank.world_size}: step 1: {SAID}"):
        (backward if at_once else ep.check)()
    # It is raised once, and nothing of it is left.
    ep.check()
    expected = torch.autograd.grad(ep.moe(x, *weights, CASE.top_k).y, weights, dy)
    for run in (ep.moe, partial(checkpoint, ep.moe, use_reentrant=False)):
        assert_same_bits(torch.autograd.grad(run(x, *weights, CASE.top_k).y, weights, dy), expected)
    assert all(grad.isfinite().all() for grad in expected)
    ep.close()


@both_backends
@on_ranks(1)
def test_the_functional_form_raises_another_routing_at_once(rank: Rank, backend: str) -> None:
    """No call will come to raise what backward finds."""
    x, weights, dy = layer_inputs(rank, CASE)

    def layer(x: Tensor) -> Tensor:
        return sonic_ep.moe(torch.dropout(x, 0.5, True), *weights, CASE.top_k, backend=backend).y

    for keeps, raised in ((True, nullcontext()), (False, pytest.raises(RecomputeError, match=SAID))):
        y = checkpoint(layer, x, **{**UNCHECKED, "preserve_rng_state": keeps})
        with raised:
            y.backward(dy)
        assert not any(weight.grad.isnan().any() for weight in weights)


@promise("usable-after-errors")
@on_ranks(2, pool="cpu_pool")
def test_a_recompute_that_ends_early_is_no_error(rank: Rank) -> None:
    """The gradient that is asked for needs the router alone: the rest is not run again."""
    x, weights, _ = layer_inputs(rank, CASE)
    with ExpertParallel(backend="reference") as ep:
        logits = checkpoint(lambda x: ep.moe(x, *weights, CASE.top_k).router_logits, x, use_reentrant=False)
        logits.sum().backward()
        assert not ep._call_guard.ended
        assert ep.moe(x, *weights, CASE.top_k).y.isfinite().all()
        assert ep._collectives._status_store.statuses() == {}


def assert_no_number(*grads: Tensor) -> None:
    assert all((grad.isnan() | (grad == 0)).all() for grad in grads)


def assert_found_in_backward(ep: ExpertParallel, y: Tensor, *leaves: Tensor, step: str) -> None:
    """Backward, or the check after it, raises; in the latter case no gradient is a number."""

    def backward() -> None:
        y.square().sum().backward()
        assert_no_number(*(leaf.grad for leaf in leaves))
        assert leaves[0].grad.isnan().any()
        ep.check()

    with pytest.raises(RecomputeError, match=f"{ep.group}: step {step}: {SAID}"), ep:
        backward()


@both_backends
@on_ranks(1, 2)
def test_another_routing_of_a_dispatch_in_recompute_is_named(rank: Rank, backend: str) -> None:
    """The combine, behind it, keeps to the first plan."""
    x = randn(rank, MANY, 8).requires_grad_()
    router_w = randn(rank, 2 * rank.world_size, 8, seed=1)
    weight = randn(rank, 8, 8, seed=2).requires_grad_()
    plans = []
    ep = ExpertParallel(backend=backend)

    def dispatched(x: Tensor) -> Tensor:
        idx = (torch.dropout(x, 0.5, rank.rank == 0) @ router_w.t()).topk(2).indices
        plans.append(ep.plan(idx, 2 * rank.world_size))
        rows = ep.dispatch(x, plans[-1])
        there = torch.arange(len(rows), device=rank.device) < plans[-1].rows()
        return (rows.where(there[:, None], 0) @ weight).tanh()

    y = ep.combine(checkpoint(dispatched, x, **UNCHECKED), torch.ones(MANY, 2, device=rank.device), plans[0])
    assert_found_in_backward(ep, y, x, step="2")


@both_backends
@on_ranks(1)
def test_another_routing_of_a_combine_in_recompute_is_named(rank: Rank, backend: str) -> None:
    x, router_w = randn(rank, MANY, 8), randn(rank, 2, 8, seed=1)
    scores = torch.ones(MANY, 1, device=rank.device, requires_grad=True)
    rows = randn(rank, MANY, 8, seed=2).requires_grad_()
    ep = ExpertParallel(backend=backend)

    def combined(rows: Tensor, scores: Tensor) -> Tensor:
        idx = (torch.dropout(x, 0.5, True) @ router_w.t()).topk(1).indices
        return ep.combine(rows, scores, ep.plan(idx, 2))

    assert_found_in_backward(ep, checkpoint(combined, rows, scores, **UNCHECKED), rows, scores, step=".*")
