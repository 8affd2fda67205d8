"""Any argument of any public call is right, bit for bit, or refused at once by ``ValueError`` or ``TypeError``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any

import edge_calls as calls
import pytest
import torch
from backends import BACKENDS, both_backends
from hostile import NO_TENSORS, THINGS, WAYS
from on_ranks import on_ranks
from promises import promise

from sonic_ep import EPConfig, ExpertParallel, MoE
from sonic_ep.testing import Rank

pytestmark = promise("arguments")

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
FLAG, NONE, COUNT = {"True", "False"}, {"None"}, {"None", "a huge number"}
FLAGS = ("redispatch_x_in_backward", "cpu_sync_on_runtime", "check_collective", "bias", "norm_topk_probs")
MAY_BE: dict[str, set[str]] = {
    **dict.fromkeys((*FLAGS, "reduce_router_grad"), FLAG),
    **dict.fromkeys(("group", "config", "device"), NONE),
    **dict.fromkeys(("max_tokens_per_rank", "max_rows"), COUNT),
    "timeout": {"a half", "two, a float", "a huge number"},
    "dtype": {"None", "a dtype"},
}


def complaints_of(make: Callable[..., Any], right: dict[str, Any], names: Iterable[str]) -> dict[object, str | None]:
    """What is wrong with ``make`` when one argument is no tensor of any kind."""
    found: dict[object, str | None] = {}
    for name, (what, value) in product(names, NO_TENSORS.items()):
        made, found[name, what] = calls.attempt(partial(make, **{**right, name: value}))
        if made is not None:
            found[name, what] = "" if what in MAY_BE.get(name, set()) else "was taken"
        if isinstance(made, ExpertParallel):
            made.close()
    return found


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
        assert_no_complaints(complaints_of(MoE, layer, inspect.signature(MoE).parameters))
    for make in (EPConfig, ExpertParallel):
        assert_no_complaints(complaints_of(make, {}, inspect.signature(make).parameters))
