"""Memory that was freed between forward and backward, as sharding does: the error of forward, and no wrong number."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from backends import BACKENDS, both_backends
from layer_inputs import routing_of
from on_ranks import on_ranks
from promises import promise
from same import assert_same_bits
from torch import Tensor

from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.testing import CASES, Rank, draw
from sonic_ep.testing.oracle import leaf, leaf_experts

pytestmark = promise("freed")

CASE = replace(CASES["dropped_slots"], tokens=(4, 2), hidden=8, intermediate=4, num_experts=6, top_k=2)
REDISPATCH = EPConfig(redispatch_x_in_backward=True)


def leaves_of(rank: Rank) -> dict[str, Tensor]:
    inputs = draw(CASE, rank.world_size, rank.device)
    experts = leaf_experts(inputs.experts, inputs.experts_of(rank.rank))
    return {
        "x": leaf(inputs.x[inputs.tokens_of(rank.rank)]),
        "router_w": leaf(inputs.router_w),
        **{name: getattr(experts, name) for name in ("w1", "w2", "b1", "b2")},
    }


@contextmanager
def freed_memory(tensor: Tensor) -> Iterator[None]:
    """That of ``tensor`` is freed while this lasts; then its values are back."""
    values, nbytes = tensor.detach().clone(), tensor.untyped_storage().nbytes()
    tensor.untyped_storage().resize_(0)
    yield
    tensor.untyped_storage().resize_(nbytes)
    with torch.no_grad():
        tensor.copy_(values)


def call_of(ep: ExpertParallel, rank: Rank, call: str) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
    """Leaves by name, and what is differentiated by them."""
    leaves, (idx, scores) = leaves_of(rank), routing_of(rank, CASE)
    if call == "moe_routed":
        leaves = {name: leaves[name] for name in ("x", "w1", "w2")}
        return leaves, partial(ep.moe_routed, **leaves, topk_idx=idx, topk_scores=scores)
    if call == "combine":
        plan = ep.plan(idx, CASE.num_experts)
        rows = torch.randn(plan.row_capacity, CASE.hidden, device=rank.device).requires_grad_()
        leaves = {"rows": rows, "topk_scores": scores.clone().requires_grad_()}
        return leaves, partial(ep.combine, **leaves, plan=plan)
    return leaves, lambda: getattr(ep.moe(**leaves, top_k=CASE.top_k), call)


# Without a router only the dispatch in backward reads x; of the logits only the router is trained, as by a loss that
# balances experts.
FREED = [
    ("y", "reference", EPConfig(), ["router_w", "w1", "w2", "x"]),
    ("y", "fast", EPConfig(), ["router_w", "w1", "w2", "x", "b2"]),
    ("y", "reference", REDISPATCH, ["x", "w1", "b1"]),
    ("y", "fast", REDISPATCH, ["x", "w1"]),
    *(("moe_routed", backend, REDISPATCH, ["x"]) for backend in BACKENDS),
    *(("router_logits", backend, EPConfig(), ["x", "router_w"]) for backend in BACKENDS),
    *(("combine", backend, EPConfig(), ["rows"]) for backend in BACKENDS),
]


@pytest.mark.parametrize(("call", "backend", "config", "freed"), FREED)
@on_ranks(1, 2)
def test_freed_tensors_are_refused(rank: Rank, call: str, backend: str, config: EPConfig, freed: list[str]) -> None:
    """Forward and backward refuse them alike, and both are right again once they are back."""
    with ExpertParallel(backend=backend, config=config) as ep:
        leaves, forward = call_of(ep, rank, call)

        def gradients(loss: Tensor | None = None) -> tuple[Tensor | None, ...]:
            loss = forward().square().sum() if loss is None else loss
            return torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)

        expected = gradients()
        for name in freed:
            message = rf"{ep.group}: memory of {name}: got 0 bytes, expected at least \d+: was it freed\?"
            loss = forward().square().sum()
            for refused in (partial(gradients, loss), forward):
                with freed_memory(leaves[name]), pytest.raises(ValueError, match=message):
                    refused()
            assert_same_bits(gradients(), expected, name)


@both_backends
@on_ranks(2)
def test_what_backward_does_not_read_may_be_freed(rank: Rank, backend: str) -> None:
    """Biases of the up-projection, and the returned counts."""
    leaves = leaves_of(rank)
    with ExpertParallel(backend=backend) as ep:
        out = ep.moe(**leaves, top_k=CASE.top_k)
        expected = torch.autograd.grad(out.y.square().sum(), list(leaves.values()), retain_graph=True)
        out.tokens_per_expert.untyped_storage().resize_(0)
        with freed_memory(leaves["b1"]):
            found = torch.autograd.grad(out.y.square().sum(), list(leaves.values()))
    assert_same_bits(found, expected)


@both_backends
@on_ranks(1, 2)
def test_a_freed_plan_is_refused_in_backward(rank: Rank, backend: str) -> None:
    idx, scores = routing_of(rank, CASE)
    x = torch.randn(len(idx), CASE.hidden, device=rank.device).requires_grad_()
    scores = scores.clone().requires_grad_()
    with ExpertParallel(backend=backend) as ep:
        for field in ("expert_ids", "row_of_slot", "slot_of_row", "group_ends"):
            plan = ep.plan(idx, CASE.num_experts)
            rows = ep.dispatch(x, plan)
            there = torch.arange(len(rows), device=rank.device) < plan.rows()
            y = ep.combine(rows.detach().where(there[:, None], 0).requires_grad_(), scores, plan)
            getattr(plan, field).untyped_storage().resize_(0)
            refused = rf"(memory of )?{field} of plan: got .* (was it freed\?|has run)$"
            for result in (rows[:1].sum(), y.sum()):
                with pytest.raises(ValueError, match=refused):
                    result.backward()
