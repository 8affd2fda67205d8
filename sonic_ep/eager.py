"""Decorators that keep calls out of ``torch.compile`` graphs and out of the caller's ``TorchDispatchMode``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch.utils._python_dispatch import _disable_current_modes

GivenP = ParamSpec("GivenP")
ResultT = TypeVar("ResultT")

# Its compiler, which takes a second or two to import. Who has not imported it cannot be compiling.
COMPILER = "torch._dynamo"

_disabled: Callable[[Any], Any] = cache(torch.compiler.disable)


def runs_eagerly(function: Callable[GivenP, ResultT]) -> Callable[GivenP, ResultT]:
    """``function``, which a compiler neither looks into nor into what it calls."""

    @wraps(function)
    def called(*arguments: GivenP.args, **options: GivenP.kwargs) -> ResultT:
        if COMPILER in sys.modules:
            return cast(ResultT, _disabled(function)(*arguments, **options))
        return function(*arguments, **options)

    return called


def outside_dispatch_modes(function: Callable[GivenP, ResultT]) -> Callable[GivenP, ResultT]:
    """``function``, with its operations hidden from every ``TorchDispatchMode`` of the caller.

    Selective activation checkpointing is such a mode. In recompute it returns what an operation gave in forward without
    running it: a collective would not take place, a tag would be that of an earlier step, and a buffer that is written
    in place would stay unwritten.
    """

    @wraps(function)
    def called(*arguments: GivenP.args, **options: GivenP.kwargs) -> ResultT:
        # Usually none is active, and disabling none costs as much as a kernel launch.
        if torch._C._len_torch_dispatch_stack() == 0:
            return function(*arguments, **options)
        with _disable_current_modes():
            return function(*arguments, **options)

    return called
