"""What shows only where a rank is late, or knows a call that another does not: its barriers, sizes and errors."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from backends import both_backends
from calls import HIDDEN, call_of
from limits import HANG_SECONDS
from on_ranks import on_ranks
from plans_ahead import FEW_PLANS, plans_ahead
from promises import promise
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sonic_ep import EPConfig, ExpertParallel, MissingRowsError, PeerLostError, compat
from sonic_ep.plan import RoutingPlan
from sonic_ep.testing import Rank, assert_bitwise

LATE_SECONDS = 0.5
TOKENS, EXPERTS = 4, 4


@contextmanager
def late(rank: Rank, owner: Any, name: str) -> Iterator[None]:
    """Rank 1 begins its next call of this function of ``owner`` late."""
    original, waited = getattr(owner, name), [rank.rank != 1]

    def called(*arguments: Any, **options: Any) -> Any:
        if not waited[0]:
            waited[0] = True
            time.sleep(LATE_SECONDS)
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, called)
        yield


def on_backends(run: Callable[[ExpertParallel], Tensor], config: EPConfig) -> tuple[Tensor, Tensor]:
    """Collective. What ``run`` returns of the fast backend and of the reference, at the same C."""
    options: dict[str, Any] = {"config": config, "max_tokens_per_rank": TOKENS, "timeout": HANG_SECONDS}
    with ExpertParallel(backend="fast", **options) as fast, ExpertParallel(backend="reference", **options) as reference:
        return run(fast), run(reference)


def tokens_of(rank: Rank, tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(rank.rank))


@pytest.mark.fast
@on_ranks(2, pool="cpu_pool")
def test_backward_of_a_dispatch_waits_for_readers_of_the_combine_before_it(rank: Rank) -> None:
    """All tokens go to rank 0, whose gradient would be in the receive slots that rank 1 still reads."""
    from sonic_ep.fast.combine.base import PushedCombine

    x, ids, scores = tokens_of(rank), torch.tensor([[0, 1]]).repeat(TOKENS, 1), torch.rand(TOKENS, 2)

    def run(ep: ExpertParallel) -> Tensor:
        given = x.clone().requires_grad_()
        plan = ep.plan(ids, EXPERTS)
        rows = ep.dispatch(given, plan)
        with torch.no_grad(), late(rank, PushedCombine, "sums"):
            y = ep.combine(rows, scores, plan)
        grad = torch.zeros_like(rows)
        grad[: plan.rows()] = torch.arange(plan.rows() * HIDDEN, dtype=torch.float32).view(-1, HIDDEN)
        return torch.cat([y, *torch.autograd.grad(rows, given, grad)])

    assert_bitwise(*on_backends(run, EPConfig(combine="all_to_all")))


@pytest.mark.fast
@on_ranks(2, pool="cpu_pool")
def test_a_layer_waits_for_the_copies_of_the_dispatch_before_it(rank: Rank) -> None:
    """``all_gather`` has one buffer, which copy engines read: no halves that take turns."""
    from sonic_ep.fast.copy_engine import CopyEngineGather

    x, ids = tokens_of(rank), torch.full((TOKENS, 1), 2 - 2 * rank.rank)
    weights = [call_of(rank.world_size)[name] for name in ("w1", "w2")]
    scores = torch.rand(TOKENS, 1)

    def run(ep: ExpertParallel) -> Tensor:
        plan = ep.plan(ids, EXPERTS)
        # Its memory.
        ep.moe_routed(x, ids, scores, *weights)
        with late(rank, CopyEngineGather, "bring"):
            rows = ep.dispatch(x, plan)
            ep.moe_routed(-x, ids, scores, *weights)
        return rows[: plan.rows()]

    assert_bitwise(*on_backends(run, EPConfig(dispatch="all_gather")))


@pytest.mark.fast
@on_ranks(2, pool="cpu_pool")
def test_a_call_that_one_rank_knows_finds_memory_that_has_grown(rank: Rank) -> None:
    """Rank 1 copies its x, so its call is none that it knows: both ask for memory all the same."""
    arguments = call_of(rank.world_size)
    with ExpertParallel(backend="fast", timeout=HANG_SECONDS) as ep:
        expected = ep.moe(**arguments).y
        many = torch.zeros(400, 2, dtype=torch.int64)
        ep.dispatch(torch.randn(400, 64), ep.plan(many, EXPERTS))
        x = arguments["x"]
        again = arguments | {"x": x.t().contiguous().t() if rank.rank else x}
        for _ in range(2):
            assert_bitwise(ep.moe(**again).y, expected)


@both_backends
@on_ranks(2, pool="cpu_pool")
def test_a_rank_without_tokens_joins_where_its_x_is_not_trained(rank: Rank, backend: str) -> None:
    """In a call that it knows, too: its experts get the gradient of the other's tokens."""
    arguments = call_of(rank.world_size)
    arguments |= {name: arguments[name].requires_grad_() for name in ("w1", "w2")}
    with ExpertParallel(backend=backend, timeout=HANG_SECONDS) as ep:
        for _ in range(3):
            x = arguments["x"][: 0 if rank.rank else None].detach()
            y = ep.moe(**arguments | {"x": x if rank.rank else x.requires_grad_()}).y
            assert all(len(grad) for grad in torch.autograd.grad(y.sum(), [arguments["w1"], arguments["w2"]]))


@promise("x-gradient")
@both_backends
@on_ranks(2, pool="cpu_pool")
def test_a_router_that_one_rank_copies_is_trained_as_the_others(rank: Rank, backend: str) -> None:
    """Where gradients are off a copy would not say so."""
    arguments = call_of(rank.world_size)
    router_w = arguments["router_w"]
    arguments["router_w"] = (router_w.t().contiguous().t() if rank.rank else router_w).requires_grad_()
    with ExpertParallel(backend=backend, check_collective=True) as ep:
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                ep.moe(**arguments)


@pytest.mark.fast
@on_ranks(2, pool="cpu_pool")
def test_reentrant_checkpointing_of_a_transposed_router_shares_no_memory_in_backward(rank: Rank) -> None:
    from sonic_ep.fast.symmetric_memory import SharedBuffer
    from sonic_ep.fast.workspace import Workspace

    arguments = call_of(rank.world_size)
    stored, x = arguments["router_w"].t().contiguous().requires_grad_(), arguments["x"].requires_grad_()
    reserve, grown = Workspace.reserve, list[str]()

    def reserved(self: Workspace, name: str, *given: Any, **options: Any) -> SharedBuffer:
        before = self._buffers.get(name)
        found = reserve(self, name, *given, **options)
        if found is not before and compat.backward_is_running():
            grown.append(name)
        return found

    with pytest.MonkeyPatch.context() as patch, ExpertParallel(backend="fast") as ep:
        patch.setattr(Workspace, "reserve", reserved)
        run = partial(ep.moe, **{key: value for key, value in arguments.items() if key not in ("x", "router_w")})
        # A view made inside would not require a gradient.
        router_w = stored.t()
        checkpoint(lambda x: run(x=x, router_w=router_w).y, x, use_reentrant=True).sum().backward()
    assert stored.grad is not None
    assert grown == []


def lacking(ep: ExpertParallel, rank: Rank, missing: int, plan: RoutingPlan | None = None) -> RoutingPlan:
    """Collective. Combine ``missing`` rows fewer than there are on rank 0."""
    made = plan or ep.plan(torch.arange(TOKENS * 2).view(TOKENS, 2) % EXPERTS, EXPERTS)
    rows = torch.randn(made.rows(), HIDDEN)
    ep.combine(rows[: made.rows() - (0 if rank.rank else missing)], torch.rand(TOKENS, 2), made)
    return made


def plans(ep: ExpertParallel, like: RoutingPlan, count: int) -> None:
    for _ in range(count):
        ep.plan(like.expert_ids[ep.rank].long(), EXPERTS)


@pytest.mark.fast
@promise("rows", "ended-object")
@on_ranks(2, pool="cpu_pool")
def test_rows_that_one_rank_lacked_end_the_others_at_once(rank: Rank) -> None:
    """The call that raises it has begun, and the other rank is in it."""
    with plans_ahead(FEW_PLANS) as ahead, ExpertParallel(backend="fast", timeout=HANG_SECONDS) as ep:
        plan, began = lacking(ep, rank, 2), time.monotonic()
        with pytest.raises((MissingRowsError, PeerLostError)) as raised:
            plans(ep, plan, 2 * ahead)
        assert isinstance(raised.value, MissingRowsError) == (rank.rank == 0)
        assert "rows of combine: got 2 fewer than the plan's valid rows" in str(raised.value)
        assert time.monotonic() - began < HANG_SECONDS / 2
        assert not ep.usable


@pytest.mark.fast
@promise("device-flags")
@on_ranks(1, pool="cpu_pool")
def test_what_was_found_between_a_copy_and_its_error_is_raised_with_it(rank: Rank) -> None:
    with plans_ahead(FEW_PLANS) as ahead, ExpertParallel(backend="fast") as ep:
        plan = lacking(ep, rank, 2)
        plans(ep, plan, ahead - 2)
        lacking(ep, rank, 5, plan)
        with pytest.raises(MissingRowsError, match="got 5 fewer"):
            plans(ep, plan, ahead)
        ep.check()


@pytest.mark.fast
@promise("device-flags")
@on_ranks(1, pool="cpu_pool")
def test_errors_of_two_kinds_are_raised_one_after_the_other(rank: Rank) -> None:
    """Of a backward, whose recompute routed otherwise, and of a combine."""
    arguments = call_of(1)
    x, runs = arguments.pop("x").requires_grad_(), [1.0, -1.0]
    with ExpertParallel(backend="fast") as ep:
        lacking(ep, rank, 3)
        checkpoint(lambda x: ep.moe(x=x * runs.pop(0), **arguments).y, x, use_reentrant=False).sum().backward()
        for error in ("RecomputeError", "MissingRowsError"):
            with pytest.raises((RuntimeError, ValueError)) as raised:
                ep.check()
            assert type(raised.value).__name__ == error
        ep.check()


@pytest.mark.fast
@promise("device-flags")
@pytest.mark.parametrize("name", ["moe", "moe_routed", "plan"])
@on_ranks(1, pool="cpu_pool")
def test_a_call_without_tokens_is_one_plan(rank: Rank, name: str) -> None:
    arguments = call_of(1)
    x, weights = arguments["x"][:0], [arguments["w1"], arguments["w2"]]
    experts, none = len(arguments["router_w"]), torch.zeros(0, 2)
    with plans_ahead(FEW_PLANS) as ahead, ExpertParallel(backend="fast") as ep:
        calls: dict[str, Callable[[], object]] = {
            "moe": lambda: ep.moe(x, arguments["router_w"], *weights, 2),
            "moe_routed": lambda: ep.moe_routed(x, none.long(), none, *weights),
            "plan": lambda: ep.plan(none.long(), experts),
        }
        ep.plan(torch.full((1, 1), experts), experts)
        for _ in range(ahead - 1):
            calls[name]()
        with pytest.raises(ValueError, match="expert ids out of range"):
            calls[name]()
