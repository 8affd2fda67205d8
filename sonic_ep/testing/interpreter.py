"""Triton's interpreter, several times faster: kernels on the CPU, for tests.

What takes most of its time changes no result. It replaces the functions of Triton's language by its own whenever a
kernel calls another function, where once for each launch is enough. It works out whether sums and products of integers
overflow, only to assert it in a mode of Triton that it never runs in. It works out anew for each value what the type of
the value alone decides. And most operations have two operands of one type, for which NumPy does what is asked.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import cache, lru_cache, wraps
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

# Operations of Triton that are NumPy's, and the types of operands for which they are.
ARITHMETIC = {"int32": np.int32, "int64": np.int64, "fp32": np.float32}
LOGIC = {"int1": np.bool_, "int32": np.int32, "int64": np.int64}
ARITHMETIC_OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
LOGIC_OPERATIONS = {"and_": np.bitwise_and, "or_": np.bitwise_or}
COMPARISONS = {
    "less_than": np.less,
    "less_equal": np.less_equal,
    "greater_than": np.greater,
    "greater_equal": np.greater_equal,
    "equal": np.equal,
    "not_equal": np.not_equal,
}


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


def common_type(one: Any, other: Any, types: dict[str, Any]) -> Any:
    """The type of both operands, or of the block if the other is a scalar of its elements' type.

    None if they differ, or if it is none of ``types``. A number of Python has the type of the tensor beside it, if that
    holds floats or the number is an integer of 32 bits. 0.0 has none: versions of Triton differ over the sign of -0.0.
    """
    if type(one) is not tl.tensor:
        one, other = other, one
    if type(one) is not tl.tensor or one.type.scalar.name not in types:
        return None
    if type(other) is tl.tensor:
        if other.type.name == one.type.name:
            return one.type
        return shared_block(one, other) if other.type.scalar.name == one.type.scalar.name else None
    if one.type.scalar.is_bool() or (type(other) is float and other == 0):
        return None
    wanted = (int,) if one.type.scalar.is_int() else (int, float)
    return one.type if type(other) in wanted and -(2**31) <= other < 2**31 else None


def shared_block(one: Any, other: Any) -> Any:
    """The type of the block, where one operand is a block and the other a scalar; else None."""
    if one.type.is_block() == other.type.is_block():
        return None
    return one.type if one.type.is_block() else other.type


@lru_cache(maxsize=4096)
def constant(number: float, numpy_type: Any) -> Any:
    """A number of Python as the interpreter holds one. Equal numbers share it: no operation writes to its operands."""
    return np.array([number], dtype=numpy_type)


def straight(
    operation: Callable[..., Any], numpy_operation: Any, types: dict[str, Any], result: Any = None
) -> Callable[..., Any]:
    """An operation of Triton on two operands: NumPy's own on two of one type, and else as before.

    types: for which. result: the type of the results' elements, by default that of the operands.
    """

    @wraps(operation)
    def carried_out(semantic: Any, one: Any, other: Any, *how: Any, **named: Any) -> Any:
        type_ = common_type(one, other, types)
        if type_ is None:
            return operation(semantic, one, other, *how, **named)
        numpy_type = types[type_.scalar.name]
        left = one.handle.data if type(one) is tl.tensor else constant(one, numpy_type)
        right = other.handle.data if type(other) is tl.tensor else constant(other, numpy_type)
        handle = interpreter.TensorHandle(numpy_operation(left, right), type_.scalar)
        return tl.tensor(handle, type_ if result is None else type_.with_element_ty(result))

    return carried_out


def moved_pointers(pointers: Any, offsets: Any) -> Any:
    """The type of the sum of pointers and signed integers: scalars, blocks of one shape, or a block and a scalar.

    None for all other operands.
    """
    if type(pointers) is not tl.tensor or type(offsets) is not tl.tensor or not pointers.type.scalar.is_ptr():
        return None
    if offsets.type.scalar.name not in ("int32", "int64"):
        return None
    if not offsets.type.is_block():
        return pointers.type
    if not pointers.type.is_block():
        return offsets.type.with_element_ty(pointers.type)
    return pointers.type if list(pointers.type.shape) == list(offsets.type.shape) else None


def straight_to_addresses(add: Callable[..., Any]) -> Callable[..., Any]:
    """Triton's sum, without its checks where a pointer is moved."""

    @wraps(add)
    def carried_out(semantic: Any, one: Any, other: Any, *how: Any, **named: Any) -> Any:
        moved = moved_pointers(one, other)
        if moved is None:
            return add(semantic, one, other, *how, **named)
        return tl.tensor(semantic.builder.create_addptr(one.handle, other.handle), moved)

    return carried_out


def skip_checks_of_types(semantic: Any) -> None:
    """Replace the operations of Triton's semantics, a class, by ones that go straight to NumPy where they can."""
    semantic.add = straight_to_addresses(semantic.add)
    for operations, types, result in (
        (ARITHMETIC_OPERATIONS, ARITHMETIC, None),
        (LOGIC_OPERATIONS, LOGIC, None),
        (COMPARISONS, ARITHMETIC, tl.int1),
    ):
        for name, numpy_operation in operations.items():
            setattr(semantic, name, straight(getattr(semantic, name), numpy_operation, types, result))


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
        skip_checks_of_types(interpreter.TritonSemantic)
