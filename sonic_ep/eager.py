"""Calls that ``torch.compile`` steps over: what surrounds them is compiled, they run as they are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch

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
