"""Decorators that keep calls out of ``torch.compile`` graphs and out of selective checkpointing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch.utils._python_dispatch import _pop_mode, _push_mode
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

GivenP = ParamSpec("GivenP")
ResultT = TypeVar("ResultT")

# Its compiler, which takes a second or two to import. Who has not imported it cannot be compiling.
COMPILER = "torch._dynamo"
# The modes of selective activation checkpointing, in forward and in recompute.
REPLAYING = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)

_disabled: Callable[[Any], Any] = cache(torch.compiler.disable)


def runs_eagerly(function: Callable[GivenP, ResultT]) -> Callable[GivenP, ResultT]:
    """``function``, which a compiler neither looks into nor into what it calls."""

    @wraps(function)
    def called(*arguments: GivenP.args, **options: GivenP.kwargs) -> ResultT:
        if COMPILER in sys.modules:
            return cast(ResultT, _disabled(function)(*arguments, **options))
        return function(*arguments, **options)

    return called


def outside_selective_checkpoint(function: Callable[GivenP, ResultT]) -> Callable[GivenP, ResultT]:
    """``function``, with its operations hidden from the dispatch modes of selective activation checkpointing.

    In recompute such a mode returns what an operation gave in forward without running it: a collective would not take
    place, a tag would be that of an earlier step, and a buffer that is written in place would stay unwritten. Modes
    that only watch, as those that count operations or memory, see everything.
    """

    @wraps(function)
    def called(*arguments: GivenP.args, **options: GivenP.kwargs) -> ResultT:
        # Usually no mode is active.
        if torch._C._len_torch_dispatch_stack() == 0:
            return function(*arguments, **options)
        with _without_replay():
            return function(*arguments, **options)

    return called


@contextmanager
def _without_replay() -> Iterator[None]:
    """While this lasts, none of the active dispatch modes is one of selective checkpointing."""
    before = [_pop_mode() for _ in range(torch._C._len_torch_dispatch_stack())]
    for mode in reversed(before):
        if not isinstance(mode, REPLAYING):
            _push_mode(mode)
    try:
        yield
    finally:
        while torch._C._len_torch_dispatch_stack():
            _pop_mode()
        for mode in reversed(before):
            _push_mode(mode)
