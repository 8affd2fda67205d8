"""Triton's interpreter, several times faster: kernels on the CPU, for tests.

What takes most of its time changes no result. It replaces the functions of Triton's language by its own whenever a
kernel calls another function, where once for each launch is enough. It works out whether sums and products of integers
overflow, only to assert it in a mode of Triton that it never runs in. It works out anew for each value what the type of
the value alone decides. And most operations have two operands of one type, for which NumPy does what is asked.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache, wraps
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

ONE_LAUNCH = threading.Lock()

# Types of Triton whose sums, products and comparisons are those of NumPy.
NUMPY_TYPES = {"int32": np.int32, "int64": np.int64, "fp32": np.float32}
OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
COMPARISONS = {
    "less_than": np.less,
    "less_equal": np.less_equal,
    "greater_than": np.greater,
    "greater_equal": np.greater_equal,
    "equal": np.equal,
    "not_equal": np.not_equal,
}


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


@cache
def called_directly(package: Any) -> list[tuple[str, Callable[..., Any]]]:
    """The functions of a module or class of Triton's language, by name, each carried out by the interpreter."""

    def direct(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            named["_semantic"] = interpreter.interpreter_semantic
            return function(*arguments, **named)

        return called

    return [(name, direct(member)) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def replace_functions(package: Any, builder: Any, scope: Any) -> None:
    """What the interpreter does to a module or class at each launch, with functions that were made once."""
    for name, function in called_directly(package):
        scope.set_attr(package, name, function)


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


def common_type(one: Any, other: Any) -> Any:
    """The type of both operands, or of the block if the other is a scalar of its elements' type; None if they differ.

    A number of Python has the type of the tensor beside it, if it is an integer of 32 bits or the tensor is of floats.
    """
    if type(one) is not tl.tensor:
        one, other = other, one
    if type(one) is not tl.tensor or one.type.scalar.name not in NUMPY_TYPES:
        return None
    if type(other) is tl.tensor:
        if other.type.name == one.type.name:
            return one.type
        if other.type.scalar.name != one.type.scalar.name or one.type.is_block() == other.type.is_block():
            return None
        return one.type if one.type.is_block() else other.type
    wanted = (int,) if one.type.scalar.is_int() else (int, float)
    return one.type if type(other) in wanted and -(2**31) <= other < 2**31 else None


@lru_cache(maxsize=4096)
def constant(number: float, numpy_type: Any) -> Any:
    """A number of Python as the interpreter holds one. Numbers that are alike share it: nobody writes to operands."""
    return np.array([number], dtype=numpy_type)


def pointer_and_offset(one: Any, other: Any) -> bool:
    """Whether ``one`` is a pointer, or a block of pointers, and ``other`` as many signed integers."""
    if type(one) is not tl.tensor or type(other) is not tl.tensor or not one.type.scalar.is_ptr():
        return False
    sizes, others = (getattr(operand.type, "shape", ()) for operand in (one, other))
    return other.type.scalar.name in ("int32", "int64") and list(sizes) == list(others)


def straight(operation: Callable[..., Any], numpy_operation: Any, result: Any = None) -> Callable[..., Any]:
    """An operation of Triton on two operands: NumPy's own on two of one type, and else as before.

    result: the type of the results' elements, by default that of the operands.
    """

    @wraps(operation)
    def carried_out(semantic: Any, one: Any, other: Any, *how: Any, **named: Any) -> Any:
        type_ = common_type(one, other)
        if type_ is None:
            if numpy_operation is np.add and pointer_and_offset(one, other):
                return tl.tensor(semantic.builder.create_addptr(one.handle, other.handle), one.type)
            return operation(semantic, one, other, *how, **named)
        numpy_type = NUMPY_TYPES[type_.scalar.name]
        left, right = (
            operand.handle.data if type(operand) is tl.tensor else constant(operand, numpy_type)
            for operand in (one, other)
        )
        handle = interpreter.TensorHandle(numpy_operation(left, right), type_.scalar)
        return tl.tensor(handle, type_ if result is None else type_.with_element_ty(result))

    return carried_out


def hasten() -> None:
    """Spare the interpreter of this process what changes no result; nothing where it works differently."""
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None or isinstance(patch, OncePerLaunch):
        return
    interpreter._patch_lang = OncePerLaunch(patch)
    interpreter._patch_builtin = replace_functions
    interpreter._get_np_dtype = once_per_name(interpreter._get_np_dtype)
    tl.core.tensor.__init__ = once_per_type(tl.core.tensor.__init__)
    tl.core.block_type.__init__ = once_per_shape(tl.core.block_type.__init__)
    options = interpreter.interpreter_builder.options
    # Its assertions are those of debug mode: without it the check of overflow ends in nothing.
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
        semantic = interpreter.TritonSemantic
        for name, operation in OPERATIONS.items():
            setattr(semantic, name, straight(getattr(semantic, name), operation))
        for name, comparison in COMPARISONS.items():
            setattr(semantic, name, straight(getattr(semantic, name), comparison, tl.int1))
