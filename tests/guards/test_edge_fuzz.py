"""Any argument of any public call is right, bit for bit, or refused at once by ``ValueError`` or ``TypeError``."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from backends import both_backends
from edge_calls import CALLS, MOST_SECONDS, ONES, SIZES, assert_same, complaint, leaves, plain, tensors_of, whole
from hostile import NO_TENSORS, THINGS, WAYS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from on_ranks import on_ranks
from promises import promise

from sonic_ep import EPConfig, ExpertParallel, MoE
from sonic_ep.testing import Rank, RankPool

pytestmark = promise("arguments")

Complaints = list[str]
every_call = pytest.mark.parametrize("name", CALLS)
# Only where there is one token, one expert and one choice is this another way.
OF_ONES = "odd strides of one"


@on_ranks(1)
@every_call
@both_backends
def test_values_count_and_not_how_they_are_held(rank: Rank, backend: str, name: str) -> None:
    call, found = CALLS[name], []
    for sizes, ways in ((SIZES, set(WAYS) - {OF_ONES}), (ONES, {OF_ONES})):
        with ExpertParallel(backend=backend) as ep:
            arguments = leaves(call.arguments(ep, rank.device, sizes))
            base = call.outcome(ep, arguments)
            for way in sorted(ways):
                changes = {tensor: WAYS[way](plain(arguments[tensor])) for tensor in tensors_of(arguments)}
                said = complaint(ep, call, arguments, changes, base)
                found += [f"all {way}: {said}"] if said else []
    assert found == []


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
@both_backends
def test_any_thing_for_a_tensor_is_right_or_refused(rank: Rank, backend: str, immense: bool, name: str) -> None:
    """immense: one number, or one row, repeated to a wrong shape. Nothing is copied before all shapes are right."""
    call, found = CALLS[name], []
    makers = IMMENSE_SHAPES if immense else {**THINGS, **(WAYS if backend == "reference" else {})}
    with ExpertParallel(backend=backend, max_tokens_per_rank=SIZES.tokens if immense else None) as ep:
        arguments = leaves(call.arguments(ep, rank.device, SIZES))
        base = [] if immense else call.outcome(ep, arguments)
        for tensor, (what, make) in product(tensors_of(arguments), makers.items()):
            # Rows of any width are right where no weight says which.
            if what != "of immense rows" or (name, tensor) not in {("dispatch", "x"), ("combine", "rows")}:
                said = complaint(ep, call, arguments, {tensor: make(plain(arguments[tensor]))}, base)
                found += [f"{tensor} {what}: {said}"] if said else []
    assert found == []


@on_ranks(1)
@pytest.mark.parametrize("name", ["moe", "moe_routed", "dispatch", "combine"])
@both_backends
def test_gradients_that_come_in_may_be_held_in_any_way(rank: Rank, backend: str, name: str) -> None:
    call, found = CALLS[name], []
    with ExpertParallel(backend=backend) as ep:
        arguments = leaves(call.arguments(ep, rank.device, SIZES))
        base = call.outcome(ep, arguments)
        for way, hold in WAYS.items():
            keeps_values = torch.equal(plain(hold(whole((3, 4)))), whole((3, 4)))
            try:
                expected = base if keeps_values else call.outcome(ep, arguments, lambda grad, h=hold: plain(h(grad)))
                assert_same(call.outcome(ep, arguments, hold), expected)
            except (AssertionError, RuntimeError) as error:
                found.append(f"gradients {way}: {error!r}")
    assert found == []


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


def no_tensors_refused(make: Callable[..., Any], right: dict[str, Any], names: list[str]) -> Complaints:
    """What is wrong with ``make`` when one argument is no tensor of any kind."""
    found = []
    for name, (what, value) in product(names, NO_TENSORS.items()):
        started, said = time.process_time(), ""
        try:
            made = make(**{**right, name: value})
            said = "" if what in MAY_BE.get(name, set()) else "was taken"
            if isinstance(made, ExpertParallel):
                made.close()
        except (ValueError, TypeError):
            took = time.process_time() - started
            said = f"refused after {took:.1f} s" if took > MOST_SECONDS else ""
        except Exception as error:
            said = f"raised {error!r}"[:200]
        found += [f"{name} {what}: {said}"] if said else []
    return found


@on_ranks(1)
@both_backends
def test_numbers_and_names_are_right_or_refused(rank: Rank, backend: str) -> None:
    """Every argument of every call that is no tensor."""
    with ExpertParallel(backend=backend) as ep:
        found = []
        for call in CALLS.values():
            arguments = call.arguments(ep, rank.device, SIZES)
            tensors = {*THINGS, *tensors_of(arguments), "b1", "b2"}
            names = [name for name in inspect.signature(getattr(ep, call.name)).parameters if name not in tensors]
            found += no_tensors_refused(lambda call=call, **given: call.run(ep, given), arguments, names)
        layer = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 2, "top_k": 1, "ep": ep}
        assert found + no_tensors_refused(MoE, layer, list(inspect.signature(MoE).parameters)) == []


@pytest.mark.parametrize("make", [EPConfig, ExpertParallel])
def test_arguments_of_objects_are_right_or_refused(make: Callable[..., Any]) -> None:
    assert no_tensors_refused(make, {}, list(inspect.signature(make).parameters)) == []


# Several arguments at once: (call, place of the argument, way or thing) each.
BATCH = 20
WHATEVER = {**WAYS, **THINGS}


def several_at_a_time(rank: Rank, backend: str, drawn: list[tuple[str, list[tuple[int, str]]]]) -> Complaints:
    found: Complaints = []
    bases: dict[str, list[torch.Tensor]] = {}
    with ExpertParallel(backend=backend) as ep:
        for name, changed in drawn:
            call = CALLS[name]
            arguments = leaves(call.arguments(ep, rank.device, SIZES))
            if name not in bases:
                bases[name] = call.outcome(ep, arguments)
            tensors = tensors_of(arguments)
            whats = {tensors[place % len(tensors)]: what for place, what in changed}
            changes = {tensor: WHATEVER[what](plain(arguments[tensor])) for tensor, what in whats.items()}
            said = complaint(ep, call, arguments, changes, bases[name])
            found += [f"{name} with {whats}: {said}"] if said else []
    return found


# Half of them ways that change no value, so that not every example is refused.
WHATS = st.one_of(st.sampled_from(list(WAYS)), st.sampled_from(list(WHATEVER)))
CHANGES = st.tuples(st.sampled_from(list(CALLS)), st.lists(st.tuples(st.integers(0, 6), WHATS), min_size=1, max_size=3))

SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


@settings(
    derandomize=True, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=SLOW, max_examples=2
)
@given(drawn=st.lists(CHANGES, min_size=BATCH, max_size=BATCH))
@both_backends
def test_any_things_together_are_right_or_refused(pool: RankPool, backend: str, drawn: list[Any]) -> None:
    assert pool.run(several_at_a_time, backend, drawn, world_size=1) == [[]]
