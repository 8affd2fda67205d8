"""A profiler's trace names the phases of a call; where no profiler is on, a name costs a look at a flag."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.profiler import profile

import sonic_ep
from sonic_ep import EPConfig, compat, profiler_names
from sonic_ep.profiler_names import BACKWARD, COMBINE, DISPATCH, EXPERTS, PLAN, ROUTE, named, named_block

TOKENS, HIDDEN, EXPERTS_OF_ALL, TOP_K = 4, 8, 4, 2


def layer_step(ep: sonic_ep.ExpertParallel) -> None:
    """Forward and backward of a layer of width 8."""
    experts = (EXPERTS_OF_ALL, HIDDEN)
    sizes = ((TOKENS, HIDDEN), experts, (EXPERTS_OF_ALL, 16, HIDDEN), (*experts, 8))
    x, router_w, w1, w2 = (torch.randn(size).requires_grad_() for size in sizes)
    ep.moe(x, router_w, w1, w2, top_k=TOP_K).y.sum().backward()


def test_a_trace_names_the_phases_of_forward_and_backward() -> None:
    for again in (False, True):
        with sonic_ep.ExpertParallel(backend="reference", config=EPConfig(redispatch_x_in_backward=again)) as ep:
            assert not compat.profiler_is_on()
            with profile(acc_events=True) as trace:
                layer_step(ep)
        found = [event.name for event in trace.events() if event.is_user_annotation]
        forward, backward = [ROUTE, PLAN, DISPATCH, EXPERTS, COMBINE], [COMBINE, DISPATCH, ROUTE]
        if again:
            backward.insert(1, EXPERTS)
        assert [name for name in found if name.startswith("sonic_ep::")] == [
            *forward,
            *(name + BACKWARD for name in backward),
        ]


def python_calls(function: Callable[[], Any]) -> list[str]:
    """Files of the Python functions that run in ``function``, it aside, one for each call."""
    found: list[str] = []

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            found.append(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return found[1:]


def test_without_a_profiler_a_name_adds_one_frame() -> None:
    def plain() -> int:
        return 7

    called = named("a name")(plain)
    assert python_calls(lambda: called()) == [profiler_names.__file__, __file__]
    assert named_block("a name") is named_block("another")
    with profile(acc_events=True) as trace:
        assert called() == 7
        with named_block("a block"):
            pass
    assert {"a name", "a block"} <= {event.name for event in trace.events()}
