"""Names of the phases of a call, forward and backward, in the trace of a profiler. Nothing where no profiler is on."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

from torch.profiler import record_function

from sonic_ep import compat

GivenP = ParamSpec("GivenP")
ResultT = TypeVar("ResultT")

ROUTE, PLAN, DISPATCH = "sonic_ep::route", "sonic_ep::plan", "sonic_ep::dispatch"
EXPERTS, COMBINE = "sonic_ep::experts", "sonic_ep::combine"
# Appended to the name of a phase in backward.
BACKWARD = "_backward"

_UNNAMED = nullcontext()


def named_block(name: str) -> AbstractContextManager[object]:
    """A context whose range in the trace is ``name``; on GPUs also around the kernels that it launches."""
    return record_function(name) if compat.profiler_is_on() else _UNNAMED


def named(name: str) -> Callable[[Callable[GivenP, ResultT]], Callable[GivenP, ResultT]]:
    """A decorator: each call is a range ``name``. Cheaper than ``named_block``: one frame and a look at a flag."""

    def decorated(function: Callable[GivenP, ResultT]) -> Callable[GivenP, ResultT]:
        @wraps(function)
        def called(*arguments: GivenP.args, **options: GivenP.kwargs) -> ResultT:
            if not compat.profiler_is_on():
                return function(*arguments, **options)
            with record_function(name):
                return function(*arguments, **options)

        return called

    return decorated
