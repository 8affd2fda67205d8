"""Any call is right, bit for bit, or refused with rank, got and expected, before any communication."""

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import Any

import edge_calls as calls
import pytest
import torch
from backends import BACKENDS, both_backends
from calls import EXPERTS, HIDDEN, TOKENS, call_of, good_call, good_routed_call
from hostile import NO_TENSORS, THINGS, WAYS
from limits import HANG_SECONDS
from on_ranks import on_ranks
from promises import promise
from torch import nn
from torch import randn as rand

import sonic_ep
from sonic_ep import ClosedError, EPConfig, ExpertParallel, MoE, RouterConfig
from sonic_ep.distributed import collectives
from sonic_ep.distributed.group import EPGroup
from sonic_ep.testing import Rank


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


@promise("usable-after-errors", "arguments")
@on_ranks(2, pool="cpu_pool")
def test_wrong_on_all_ranks_or_on_one_is_refused_before_any_communication(rank: Rank) -> None:
    right = torch.tensor([[rank.rank]])
    with ExpertParallel(backend="reference", timeout=2 * HANG_SECONDS) as ep, pytest.MonkeyPatch.context() as patch:
        # A rank reports errors, and that it waits, which on a busy machine it may.
        patch.setattr(collectives, "ANNOUNCE_SECONDS", HANG_SECONDS)
        far = ids(TOKENS, 2) + torch.tensor([0, 8])
        on_both: dict[Callable[[], object], str] = {
            lambda: ep.moe(**good_call(router_w=rand(3, HIDDEN))): "number of experts E: got 3, expected a multiple of",
            lambda: ep.moe_routed(**good_routed_call(topk_idx=far)): "topk_idx: got expert ids from 0 to 8, expected 0",
            lambda: ep.plan(ids(2, 1), num_experts=5): "number of experts E: got 5",
            lambda: MoE(8, 4, num_experts=5, top_k=2, ep=ep): "number of experts E: got 5",
        }
        on_one: dict[Callable[[], object], str] = {
            lambda: ep.moe(**call_of(2, b1=rand(2, 8))): "biases: got",
            lambda: ep.moe(**call_of(2, top_k=9)): "top_k: got 9",
            lambda: ep.moe(**call_of(2, w1=rand(1, 8, 8))): "shape of w",
            lambda: ep.plan(torch.tensor([[0, 99]]), num_experts=EXPERTS): "topk_idx: got expert ids from 0 to 99",
            lambda: ep.plan(torch.tensor([[0, -7]]), num_experts=EXPERTS): "topk_idx: got expert ids from -7 to 0",
            lambda: sonic_ep.moe(**call_of(2, top_k=0), backend="reference"): "top_k: got 0",
        }
        for call, message in (on_both | (on_one if rank.rank == 0 else {})).items():
            with pytest.raises(ValueError, match=f"rank {rank.rank} of 2: {message}"):
                call()
            assert ep._collectives._begun == 0
        for _ in range(2):
            assert ep.plan(right, num_experts=EXPERTS).counts.tolist() == [1, 1, 0, 0]
        assert ep._collectives._status_store.statuses() == {}
    assert sonic_ep.moe(**call_of(2), backend="reference").tokens_per_expert.sum() == 2 * 2 * TOKENS


def test_a_plan_of_another_rank_and_calls_after_close_or_the_end_of_the_group_are_refused() -> None:
    # The caller still refers to a group that has been destroyed.
    still_held = nn.Identity()
    with pytest.raises(ClosedError, match="rank 1 of 2: the process group has been destroyed"):
        _ = EPGroup(rank=1, world_size=2, handle=weakref.ref(still_held)).process_group
    ep = ExpertParallel(backend="reference")
    x, plan, scores = rand(1, HIDDEN), ep.plan(ids(1, 1), 4), torch.ones(1, 1)
    foreign = replace(plan, rank=1)
    for call in (partial(ep.dispatch, x, foreign), partial(ep.combine, x, scores, foreign)):
        with pytest.raises(ValueError, match="plan: got a plan for rank 1 of 1, expected one for rank 0 of 1"):
            call()
    ep.close()
    ep.close()
    for call in (
        *(partial(ep.moe, **good_call()), partial(ep.moe_routed, **good_routed_call()), ep.check),
        *(partial(ep.plan, ids(1, 1), 4), partial(ep.dispatch, x, plan), partial(ep.combine, x, scores, plan)),
        partial(ep.agree, 1, torch.device("cpu")),
    ):
        with pytest.raises(ClosedError, match="rank 0 of 1: this ExpertParallel is closed"):
            call()


# Interpreted, moe and the parts do what moe_routed does.
every_call = pytest.mark.parametrize(
    ("backend", "name"),
    [
        pytest.param(*call, marks=pytest.mark.thorough if call == ("fast", "moe_routed") else ())
        for call in product(BACKENDS, calls.ARGUMENTS)
    ],
)
# Only where there is one token, one expert and one choice is this another way.
OF_ONES = "odd strides of one"


@promise("arguments")
@on_ranks(1)
@every_call
def test_values_count_and_not_how_they_are_held(rank: Rank, backend: str, name: str) -> None:
    """Those of arguments, and of gradients that come in."""
    found = {}
    for sizes, ways in ((calls.SIZES, set(WAYS) - {OF_ONES}), (calls.ONES, {OF_ONES})):
        with ExpertParallel(backend=backend) as ep:
            arguments = calls.leaves(calls.arguments_of(name, ep, rank.device, sizes))
            base = calls.outcome(name, ep, arguments)
            for way in sorted(ways):
                changes = {tensor: WAYS[way](calls.plain(arguments[tensor])) for tensor in calls.tensors_of(arguments)}
                found[way] = calls.complaint(name, ep, arguments, changes, base)
            for hold in (*WAYS.values(), THINGS["zeros of no memory"]) if sizes == calls.SIZES else ():
                kept = torch.equal(calls.plain(hold(calls.whole((3, 4)))), calls.whole((3, 4)))
                expected = base if kept else calls.outcome(name, ep, arguments, lambda g, h=hold: calls.plain(h(g)))
                calls.assert_same(calls.outcome(name, ep, arguments, hold), expected)
    assert_no_complaints(found)


def assert_no_complaints(found: dict[object, str | None]) -> None:
    assert {what: said for what, said in found.items() if said} == {}


# Elements of which no memory holds a copy.
IMMENSE = 2**45
IMMENSE_SHAPES: dict[str, Callable[[torch.Tensor], Any]] = {
    "of immense rows": lambda tensor: tensor.flatten()[:1].expand(*tensor.shape[:-1], IMMENSE),
    "of immensely many rows": lambda tensor: tensor[:1].expand(IMMENSE, *tensor.shape[1:]),
    # Two dimensions that are one only after a copy.
    "of immensely many rows twice": lambda tensor: tensor[:2, None].expand(2, IMMENSE // 2, *tensor.shape[1:]),
}


@promise("arguments")
@on_ranks(1)
@every_call
@pytest.mark.parametrize("immense", [False, True])
def test_any_thing_for_a_tensor_is_right_or_refused(rank: Rank, backend: str, immense: bool, name: str) -> None:
    """immense: one number, or one row, repeated to a wrong shape. Nothing is copied before all shapes are right."""
    found = {}
    makers = IMMENSE_SHAPES if immense else {**WAYS, **THINGS} if backend == "reference" else THINGS
    with ExpertParallel(backend=backend, max_tokens_per_rank=calls.SIZES.tokens if immense else None) as ep:
        arguments = calls.leaves(calls.arguments_of(name, ep, rank.device))
        base = [] if immense else calls.outcome(name, ep, arguments)
        for tensor, (what, make) in product(calls.tensors_of(arguments), makers.items()):
            # Rows of any width are right where no weight says which.
            if what != "of immense rows" or (name, tensor) not in {("dispatch", "x"), ("combine", "rows")}:
                changes = {tensor: make(calls.plain(arguments[tensor]))}
                found[tensor, what] = calls.complaint(name, ep, arguments, changes, base)
    assert_no_complaints(found)


# What of NO_TENSORS an argument may be.
FLAG, NONE, COUNT, HUGE = {"True", "False"}, {"None"}, {"None", "a huge number"}, {"a huge number"}
FLAGS = ("redispatch_x_in_backward", "cpu_sync_on_runtime", "check_collective", "bias", "norm_topk_probs")
OF_ROUTERS = ("router", "router_b", "correction_bias")
MAY_BE: dict[str, set[str]] = {
    **dict.fromkeys((*FLAGS, "reduce_router_grad", "return_routing"), FLAG),
    **dict.fromkeys(("group", "config", "device", *OF_ROUTERS), NONE),
    "scale": {"a half", "two, a float", "a huge number"},
    **dict.fromkeys(("num_groups", "group_top"), HUGE),
    **dict.fromkeys(("max_tokens_per_rank", "max_rows"), COUNT),
    "timeout": {"None", "a half", "two, a float", "a huge number"},
    "dtype": {"None", "a dtype"},
    "router_dtype": {"None", "a dtype"},
}
MAY_BE_OF_LAYER = {**MAY_BE, **dict.fromkeys(("router_bias", "correction_bias", "distribute"), FLAG), "ep": NONE}


def complaints_of(
    make: Callable[..., Any],
    right: dict[str, Any],
    names: Iterable[str],
    may_be: Mapping[str, set[str]] = MappingProxyType(MAY_BE),
) -> dict[object, str | None]:
    """What is wrong with ``make`` when one argument is no tensor of any kind."""
    found: dict[object, str | None] = {}
    for name, (what, value) in product(names, NO_TENSORS.items()):
        made, found[name, what] = calls.attempt(partial(make, **{**right, name: value}))
        if made is not None:
            found[name, what] = "" if what in may_be.get(name, set()) else "was taken"
        if isinstance(made, ExpertParallel):
            made.close()
    return found


@promise("arguments")
@on_ranks(1)
@both_backends
def test_numbers_and_names_are_right_or_refused(rank: Rank, backend: str) -> None:
    """Every argument of every call, and of every object, that is no tensor."""
    with ExpertParallel(backend=backend) as ep:
        for call in calls.ARGUMENTS:
            arguments = calls.arguments_of(call, ep, rank.device)
            tensors = {*THINGS, *calls.tensors_of(arguments), "b1", "b2"}
            names = [name for name in inspect.signature(getattr(ep, call)).parameters if name not in tensors]
            assert_no_complaints(complaints_of(lambda c=call, **given: calls.run(c, ep, given), arguments, names))
        layer = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 2, "top_k": 1, "ep": ep}
        assert_no_complaints(complaints_of(MoE, layer, inspect.signature(MoE).parameters, MAY_BE_OF_LAYER))
    for make in (EPConfig, ExpertParallel, RouterConfig):
        assert_no_complaints(complaints_of(make, {}, inspect.signature(make).parameters))
