"""The public API: backends, shapes, the functional form, and plan, dispatch and combine in a user's hands."""

import logging
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from backends import both_backends
from calls import EXPERTS, HIDDEN, good_call, good_routed_call
from near import assert_near
from on_ranks import on_ranks
from promises import promise
from torch import Tensor

import sonic_ep
from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.reference.experts import apply_experts
from sonic_ep.testing import CASES, Rank, assert_bitwise, draw
from sonic_ep.testing.oracle import leaf_experts


def test_the_backend_that_was_chosen_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sonic_ep"), ExpertParallel() as ep:
        assert ep.backend == "reference"
        assert "backend 'fast' cannot run here" in ep.why
    assert [record.getMessage() for record in caplog.records] == [f"backend=reference, 1 ranks ({ep.why})"]
    with ExpertParallel(backend="reference") as ep:
        assert ep.why == "asked for by name"


def test_leading_dimensions_strides_and_dtypes() -> None:
    arguments = good_call(x=torch.randn(6, HIDDEN))
    with ExpertParallel() as ep:
        flat = ep.moe(**arguments).y
        deep = ep.moe(**{**arguments, "x": arguments["x"].view(2, 3, HIDDEN)}).y
        assert_bitwise(deep, flat.view(2, 3, HIDDEN))
        strided = {name: v.mT.contiguous().mT if isinstance(v, Tensor) else v for name, v in arguments.items()}
        assert not strided["x"].is_contiguous()
        # Products of transposed weights, which are not copied, may sum in another order.
        assert_near(ep.moe(**strided).y, flat, 100)
        assert_bitwise(ep.moe(**{**strided, "w1": arguments["w1"], "w2": arguments["w2"]}).y, flat)
        routed = good_routed_call()
        assert_bitwise(ep.moe_routed(**{**routed, "topk_idx": routed["topk_idx"].int()}), ep.moe_routed(**routed))
        # The router's weight may be wider than x.
        low = {name: v.bfloat16() if isinstance(v, Tensor) else v for name, v in arguments.items()}
        out = ep.moe(**{**low, "router_w": arguments["router_w"]})
    assert (out.y.dtype, out.router_logits.dtype) == (torch.bfloat16, torch.float32)
    assert_near(out.router_logits, low["x"].float() @ arguments["router_w"].T, 100)


def test_the_functional_form() -> None:
    arguments = good_call()
    with ExpertParallel() as ep:
        expected = ep.moe(**arguments)
        for out in (
            sonic_ep.moe(**arguments, ep=ep),
            sonic_ep.moe(**arguments),
            sonic_ep.moe(**arguments, backend="reference", config=EPConfig(cpu_sync_on_runtime=True)),
        ):
            assert_bitwise(out.y, expected.y)
            assert_bitwise(out.tokens_per_expert, expected.tokens_per_expert)
        assert sonic_ep.moe(**arguments, activation="geglu").y.ne(expected.y).any()
        with pytest.raises(ValueError, match="got ep together with group, backend or config"):
            sonic_ep.moe(**arguments, ep=ep, backend="reference")
        with pytest.raises(TypeError, match="activaton"):
            sonic_ep.moe(**arguments, activaton="geglu")


@on_ranks(2, pool="cpu_pool")
def test_a_plan_is_held_against_the_call(rank: Rank) -> None:
    with ExpertParallel(backend="reference") as ep:
        plan = ep.plan(torch.tensor([[0], [3]]), num_experts=EXPERTS)
        rows = torch.zeros(plan.row_capacity, HIDDEN)
        scores = torch.ones(2, 1)
        with pytest.raises(ValueError, match="tokens of x: got 3, expected T=2 of the plan"):
            ep.dispatch(torch.zeros(3, HIDDEN), plan)
        with pytest.raises(ValueError, match=r"shape of rows: got \(5, 8\), expected \(N, H\), .* to R=4"):
            ep.combine(torch.zeros(5, HIDDEN), scores, plan)
        with pytest.raises(ValueError, match=r"shape of topk_scores: got \(2, 2\), expected \(2, 1\)"):
            ep.combine(rows, torch.ones(2, 2), plan)
        with pytest.raises(TypeError, match="plan: got NoneType, expected a RoutingPlan"):
            ep.dispatch(torch.zeros(2, HIDDEN), None)  # type: ignore[arg-type]
        alone = dist.new_group([rank.rank], use_local_synchronization=True)
        said = f"plan: got a plan for rank {rank.rank} of 2, expected one for rank 0 of 1"
        with ExpertParallel(alone, backend="reference") as single, pytest.raises(ValueError, match=said):
            single.dispatch(torch.zeros(2, HIDDEN), plan)


@on_ranks(3, pool="cpu_pool")
def test_plan_dispatch_and_combine_make_the_layer(rank: Rank) -> None:
    """In a user's hands they give ``moe_routed``, bit for bit."""
    case = CASES["uneven_tokens"]
    inputs = draw(case, rank.world_size)
    tokens = inputs.tokens_of(rank.rank)
    experts = leaf_experts(inputs.experts, inputs.experts_of(rank.rank))
    with ExpertParallel(backend="reference") as ep:
        plan = ep.plan(inputs.topk_idx[tokens], num_experts=case.num_experts)
        rows = apply_experts(ep.dispatch(inputs.x[tokens], plan), plan.group_ends, experts)
        y = ep.combine(rows, inputs.topk_scores[tokens], plan)
        routed = (inputs.topk_idx[tokens], inputs.topk_scores[tokens], experts.w1, experts.w2, experts.b1, experts.b2)
        assert_bitwise(y, ep.moe_routed(inputs.x[tokens], *routed))


@on_ranks(2, pool="cpu_pool")
@both_backends
def test_a_first_call_without_tokens_bounds_nothing(rank: Rank, backend: str) -> None:
    """C is agreed on when the first token comes, not before; one rank alone takes any number."""
    with ExpertParallel(backend=backend) as ep:
        idx = torch.zeros((4 * rank.rank, 1), dtype=torch.int64)
        assert ep.plan(idx[:0], rank.world_size).counts.tolist() == [0, 0]
        assert ep.plan(idx, rank.world_size).counts.tolist() == [4, 0]
    alone = dist.new_group([rank.rank], use_local_synchronization=True)
    with ExpertParallel(alone, backend=backend) as ep:
        assert [ep.plan(torch.zeros(T, 1, dtype=torch.int64), 4).max_tokens for T in (1, 7, 0, 3)] == [1, 7, 0, 3]


@promise("plans")
def test_a_plan_of_another_device_is_refused() -> None:
    with ExpertParallel() as ep:
        plan = ep.plan(torch.zeros(2, 1, dtype=torch.int64), EXPERTS)
        elsewhere = replace(plan, **{name: v.to("meta") for name, v in vars(plan).items() if isinstance(v, Tensor)})
        with pytest.raises(ValueError, match="device of x: got cpu, expected meta"):
            ep.dispatch(torch.zeros(2, HIDDEN), elsewhere)
        with pytest.raises(ValueError, match="device of rows: got cpu, expected meta"):
            ep.combine(torch.zeros(2, HIDDEN), torch.ones(2, 1), elsewhere)


@on_ranks(2, pool="cpu_pool")
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_routers_own_choices_are_distinct_and_need_fewer_rows(rank: Rank, top_k: int) -> None:
    held, plans = EXPERTS // rank.world_size, []
    whole = good_call(top_k=top_k)
    with ExpertParallel(backend="reference") as ep:
        make = ep._backend.plan
        ep._backend.plan = lambda *given, **options: plans.append(make(*given, **options)) or plans[-1]  # type: ignore[method-assign]
        ep.moe(**{**whole, "w1": whole["w1"][:held], "w2": whole["w2"][:held]})
    # Two ranks of five tokens, two experts on each rank.
    assert [plan.row_capacity for plan in plans] == [2 * 5 * min(top_k, 2)]
