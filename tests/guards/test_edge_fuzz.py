"""Any argument of any public call is right or refused: bit for bit, or a ``ValueError`` or ``TypeError`` at once."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import both_backends
from edge_calls import (
    CALLS,
    MOST_SECONDS,
    ONES,
    SIZES,
    Arguments,
    Call,
    Outcome,
    assert_same,
    complaint,
    leaves,
    plain,
    tensors_of,
    whole,
)
from hostile import NO_TENSORS, THINGS, WAYS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from on_ranks import on_ranks

from sonic_ep import EPConfig, ExpertParallel, MoE
from sonic_ep.testing import Rank, RankPool

Complaints = list[str]
# It has a say only where there is one token, one expert and one choice.
OF_ONES = "odd strides of one"


@pytest.mark.parametrize("call_name", CALLS)
@both_backends
@on_ranks(1)
def test_values_count_and_not_how_they_are_held(rank: Rank, backend: str, call_name: str) -> None:
    """All tensors of a call held in the same way."""
    call, found = CALLS[call_name], []
    for sizes, ways in ((SIZES, set(WAYS) - {OF_ONES}), (ONES, {OF_ONES})):
        with ExpertParallel(backend=backend) as ep:
            arguments = leaves(call.arguments(ep, rank.device, sizes))
            base = call.outcome(ep, arguments)
            for way in sorted(ways):
                changes = {name: WAYS[way](plain(arguments[name])) for name in tensors_of(arguments)}
                said = complaint(ep, call, arguments, changes, base)
                found += [f"{call_name} with all {way}: {said}"] if said else []
    assert found == []


@pytest.mark.parametrize("call_name", CALLS)
@both_backends
@on_ranks(1)
def test_any_thing_for_a_tensor_is_right_or_refused(rank: Rank, backend: str, call_name: str) -> None:
    """Each tensor of a call as everything that it may be, the others as they should be."""
    call, found = CALLS[call_name], []
    with ExpertParallel(backend=backend) as ep:
        arguments = leaves(call.arguments(ep, rank.device, SIZES))
        base = call.outcome(ep, arguments)
        for name in tensors_of(arguments):
            for what, make in {**THINGS, **(WAYS if backend == "reference" else {})}.items():
                said = complaint(ep, call, arguments, {name: make(plain(arguments[name]))}, base)
                found += [f"{call_name}: {name} {what}: {said}"] if said else []
    assert found == []


# Elements of which no memory holds a copy.
IMMENSE = 2**45
IMMENSE_SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "of immense rows": lambda tensor: tensor.flatten()[:1].expand(*tensor.shape[:-1], IMMENSE),
    "of immensely many rows": lambda tensor: tensor[:1].expand(IMMENSE, *tensor.shape[1:]),
    # Two dimensions that are one only after a copy.
    "of immensely many rows twice": lambda tensor: tensor[:2, None].expand(2, IMMENSE // 2, *tensor.shape[1:]),
}
# There any H is right.
ANY_WIDTH = {("dispatch", "x"), ("combine", "rows")}


@pytest.mark.parametrize("call_name", CALLS)
@both_backends
@on_ranks(1)
def test_nothing_is_copied_before_all_shapes_are_right(rank: Rank, backend: str, call_name: str) -> None:
    """Each tensor of a call as one number, or one row, that is repeated to a wrong shape."""
    call, found = CALLS[call_name], []
    with ExpertParallel(backend=backend, max_tokens_per_rank=SIZES.tokens) as ep:
        arguments = leaves(call.arguments(ep, rank.device, SIZES))
        for name in tensors_of(arguments):
            for what, make in IMMENSE_SHAPES.items():
                if what == "of immense rows" and (call_name, name) in ANY_WIDTH:
                    continue
                said = complaint(ep, call, arguments, {name: make(plain(arguments[name]))}, [])
                found += [f"{call_name}: {name} {what}: {said}"] if said else []
    assert found == []


@pytest.mark.parametrize("call_name", ["moe", "moe_routed", "dispatch", "combine"])
@both_backends
@on_ranks(1)
def test_gradients_that_come_in_may_be_held_in_any_way(rank: Rank, backend: str, call_name: str) -> None:
    call, found = CALLS[call_name], []
    with ExpertParallel(backend=backend) as ep:
        arguments = leaves(call.arguments(ep, rank.device, SIZES))
        base = call.outcome(ep, arguments)
        for way, hold in WAYS.items():
            keeps_values = torch.equal(plain(hold(whole((3, 4)))), whole((3, 4)))
            try:
                expected = (
                    base if keeps_values else call.outcome(ep, arguments, lambda grad, hold=hold: plain(hold(grad)))
                )
                assert_same(call.outcome(ep, arguments, hold), expected)
            except (AssertionError, RuntimeError) as error:
                found.append(f"{call_name}, gradients {way}: {error!r}")
    assert found == []


# What of NO_TENSORS an argument may be.
FLAGS = {"True", "False"}
MAY_BE: dict[str, set[str]] = {
    "group": {"None"},
    "config": {"None"},
    "max_tokens_per_rank": {"None", "a huge number"},
    "timeout": {"a half", "two, a float", "a huge number"},
    "check_collective": FLAGS,
    "redispatch_x_in_backward": FLAGS,
    "cpu_sync_on_runtime": FLAGS,
    "max_rows": {"None", "a huge number"},
    "norm_topk_probs": FLAGS,
    "reduce_router_grad": FLAGS,
    "bias": FLAGS,
    "device": {"None"},
    "dtype": {"None", "a dtype"},
}


def no_tensors_refused(make: Callable[..., Any], right: Arguments, names: list[str]) -> Complaints:
    """What is wrong with ``make`` when one argument is no tensor of any kind."""
    found = []
    for name in names:
        for what, value in NO_TENSORS.items():
            started, taken, said = time.process_time(), False, ""
            try:
                made = make(**{**right, name: value})
                taken = True
            except (ValueError, TypeError):
                took = time.process_time() - started
                said = f"refused after {took:.1f} s" if took > MOST_SECONDS else ""
            except Exception as error:
                said = f"raised {error!r}"[:200]
            if taken and what not in MAY_BE.get(name, set()):
                said = "was taken"
            if taken and isinstance(made, ExpertParallel):
                made.close()
            found += [f"{name} {what}: {said}"] if said else []
    return found


@both_backends
@on_ranks(1)
def test_numbers_and_names_are_right_or_refused(rank: Rank, backend: str) -> None:
    """Every argument of every call that is no tensor."""
    with ExpertParallel(backend=backend) as ep:
        found = []
        for call in CALLS.values():
            arguments = call.arguments(ep, rank.device, SIZES)
            names = [name for name in inspect.signature(getattr(ep, call.name)).parameters if name not in THINGS]
            names = [name for name in names if name not in tensors_of(arguments) and name not in ("b1", "b2")]
            found += no_tensors_refused(lambda call=call, **given: call.run(ep, given), arguments, names)
        layer = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 2, "top_k": 1, "ep": ep}
        found += no_tensors_refused(MoE, layer, list(inspect.signature(MoE).parameters))
    assert found == []


@pytest.mark.parametrize("make", [EPConfig, ExpertParallel])
def test_arguments_of_objects_are_right_or_refused(make: Callable[..., Any]) -> None:
    assert no_tensors_refused(make, {}, list(inspect.signature(make).parameters)) == []


# Several arguments at once: (call, place of the argument, way or thing) each.
BATCH = 20
WHATEVER = {**WAYS, **THINGS}


def several_at_a_time(rank: Rank, backend: str, drawn: list[tuple[str, list[tuple[int, str]]]]) -> Complaints:
    found: Complaints = []
    bases: dict[str, Outcome] = {}
    with ExpertParallel(backend=backend) as ep:
        for call_name, changed in drawn:
            call: Call = CALLS[call_name]
            arguments = leaves(call.arguments(ep, rank.device, SIZES))
            if call_name not in bases:
                bases[call_name] = call.outcome(ep, arguments)
            names = tensors_of(arguments)
            whats = {names[place % len(names)]: what for place, what in changed}
            changes = {name: WHATEVER[what](plain(arguments[name])) for name, what in whats.items()}
            said = complaint(ep, call, arguments, changes, bases[call_name])
            found += [f"{call_name} with {whats}: {said}"] if said else []
    return found


# Half of them ways that change no value, so that not every example is refused.
WHATS = st.one_of(st.sampled_from(list(WAYS)), st.sampled_from(list(WHATEVER)))
CHANGES = st.tuples(st.sampled_from(list(CALLS)), st.lists(st.tuples(st.integers(0, 6), WHATS), min_size=1, max_size=3))


@settings(
    max_examples=2,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(drawn=st.lists(CHANGES, min_size=BATCH, max_size=BATCH))
@both_backends
def test_any_things_together_are_right_or_refused(pool: RankPool, backend: str, drawn: list[Any]) -> None:
    assert pool.run(several_at_a_time, backend, drawn, world_size=1) == [[]]
