"""Triton's interpreter, several times faster: kernels on the CPU, for tests.

What takes most of its time changes no result. It replaces the functions of Triton's language by its own whenever a
kernel calls another function, where once for each launch is enough. It works out whether sums and products of integers
overflow, only to assert it in a mode of Triton that it never runs in. And it works out anew for each value what the
type of the value alone decides.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import triton.language as tl
import triton.runtime.interpreter as interpreter

ONE_LAUNCH = threading.Lock()


@contextmanager
def alone_in_this_process() -> Iterator[None]:
    """Raises ``RuntimeError`` while another thread's kernel is interpreted: the grid, and what stands in for Triton's
    language, are the process's. Nobody waits: the other kernel may be waiting for this rank.
    """
    if not ONE_LAUNCH.acquire(blocking=False):
        raise RuntimeError("Triton's interpreter: got a kernel while another thread runs one, expected one thread")
    try:
        yield
    finally:
        ONE_LAUNCH.release()


class Nothing:
    """A replacement of nothing: what has been replaced already stays until the launch is over."""

    def restore(self) -> None:
        """Nothing is left to restore."""


class OncePerLaunch:
    """Stands in for the interpreter's own ``replace``, a function of the function to be run."""

    def __init__(self, replace: Any) -> None:
        self._replace = replace
        self._replaced: frozenset[int] | None = None

    def __call__(self, function: Any) -> Any:
        """Replace the language as ``function`` sees it, unless this launch has done so."""
        seen = language_of(function)
        if self._replaced is not None and seen <= self._replaced:
            return Nothing()
        outermost = self._replaced is None
        scope = self._replace(function)
        self._replaced = seen | (self._replaced or frozenset())
        if outermost:
            self._forget_with(scope)
        return scope

    def _forget_with(self, scope: Any) -> None:
        restore = scope.restore

        def restore_and_forget() -> None:
            self._replaced = None
            restore()

        scope.restore = restore_and_forget


@cache
def language_of(function: Any) -> frozenset[int]:
    """Which modules of Triton's language a function sees, by their identity."""
    modules = (value for value in function.__globals__.values() if inspect.ismodule(value))
    return frozenset(id(module) for module in modules if module in (tl, tl.core))


def once_per_type(construct: Callable[..., None]) -> Callable[..., None]:
    """The constructor of a tensor, which finds out once for each type what is the same for all tensors of it."""
    known: dict[str, dict[str, Any]] = {}

    @wraps(construct)
    def constructed(tensor: Any, handle: Any, type: Any) -> None:
        if type.name not in known:
            construct(tensor, handle, type)
            known[type.name] = {name: value for name, value in vars(tensor).items() if value is not handle}
        else:
            vars(tensor).update(known[type.name], handle=handle)

    return constructed


def once_per_shape(construct: Callable[..., None]) -> Callable[..., None]:
    """The constructor of a block's type, which finds out once for each element and shape what follows from them."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    @wraps(construct)
    def constructed(block: Any, element_ty: Any, shape: Any) -> None:
        given = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if given not in known:
            construct(block, element_ty, shape)
            known[given] = dict(vars(block))
        else:
            vars(block).update(known[given])

    return constructed


def once_per_name(numpy_type: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The type of NumPy for one of Triton's, looked up by its name: Triton makes a table of all for each look."""
    known: dict[str, Any] = {}

    @wraps(numpy_type)
    def looked_up(type: Any) -> Any:
        if type.name not in known:
            known[type.name] = numpy_type(type)
        return known[type.name]

    return looked_up


def hasten() -> None:
    """Spare the interpreter of this process what changes no result; nothing where it works differently."""
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None or isinstance(patch, OncePerLaunch):
        return
    interpreter._patch_lang = OncePerLaunch(patch)
    interpreter._get_np_dtype = once_per_name(interpreter._get_np_dtype)
    tl.core.tensor.__init__ = once_per_type(tl.core.tensor.__init__)
    tl.core.block_type.__init__ = once_per_shape(tl.core.block_type.__init__)
    options = interpreter.interpreter_builder.options
    # Its assertions are those of debug mode: without it the check of overflow ends in nothing.
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
