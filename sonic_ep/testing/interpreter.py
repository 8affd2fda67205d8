"""Triton's interpreter, several times faster: kernels on the CPU, for tests.

Most of its time changes no result: it patches Triton's language at every call of a function, checks integers for
overflow, and computes and checks for each value what its type alone decides.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Hashable
from functools import cache, lru_cache, wraps
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

ARITHMETIC = {"int32": np.int32, "int64": np.int64, "fp32": np.float32}
LOGIC = {"int1": np.bool_, "int32": np.int32, "int64": np.int64}
# Operations of Triton that are NumPy's, for which types of operands, and the element type of results.
OPERATIONS = (
    ({"add": np.add, "sub": np.subtract, "mul": np.multiply}, ARITHMETIC, None),
    ({"and_": np.bitwise_and, "or_": np.bitwise_or}, LOGIC, None),
    ({"less_than": np.less, "less_equal": np.less_equal, "equal": np.equal}, ARITHMETIC, tl.int1),
    ({"greater_than": np.greater, "greater_equal": np.greater_equal, "not_equal": np.not_equal}, ARITHMETIC, tl.int1),
)


def patch_once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """In place of the interpreter's function that patches the language as a function sees it, at each of its calls.

    The language stays patched: from then on nothing can be compiled in this process.
    """
    patched: set[int] = set()

    @wraps(patch)
    def patched_for_good(function: Any) -> Any:
        if not language_of(function) <= patched:
            patch(function)
            patched.update(language_of(function))
        return SimpleNamespace(restore=lambda: None)

    return patched_for_good


@cache
def language_of(function: Any) -> frozenset[int]:
    """Ids of the modules of Triton's language that a function sees."""
    modules = (value for value in function.__globals__.values() if inspect.ismodule(value))
    return frozenset(id(module) for module in modules if module in (tl, tl.core))


@cache
def interpreted_functions(package: Any) -> list[tuple[str, Callable[..., Any]]]:
    """The functions of a module or class of Triton's language, as the interpreter runs them."""

    def direct(function: Callable[..., Any]) -> Callable[..., Any]:
        # Triton's decorator only looks whether there is a _semantic.
        function = getattr(function, "__wrapped__", function)

        def called(*arguments: Any, **named: Any) -> Any:
            named["_semantic"] = interpreter.interpreter_semantic
            return function(*arguments, **named)

        return called

    return [(name, direct(member)) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def patch_functions(package: Any, builder: Any, scope: Any) -> None:
    """Patch a module or class at a launch, as the interpreter does, but with functions that are made once."""
    for name, function in interpreted_functions(package):
        scope.set_attr(package, name, function)


def construct_once(construct: Callable[..., None], key: Callable[..., Hashable], varying: str = "") -> Any:
    """A constructor that computes its attributes once for each ``key``. varying: the one that is its first argument."""
    known: dict[Hashable, dict[str, Any]] = {}

    @wraps(construct)
    def constructed(made: Any, first: Any, second: Any) -> None:
        given = key(first, second)
        if given in known:
            vars(made).update(known[given])
            if varying:
                vars(made)[varying] = first
        else:
            construct(made, first, second)
            known[given] = {name: value for name, value in vars(made).items() if name != varying}

    return constructed


def once_per_name(numpy_type: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """NumPy's type for one of Triton's, by name: Triton builds a table of all for each look-up."""
    known: dict[str, Any] = {}

    @wraps(numpy_type)
    def looked_up(type: Any) -> Any:
        if type.name not in known:
            known[type.name] = numpy_type(type)
        return known[type.name]

    return looked_up


def common_type(one: Any, other: Any, types: dict[str, Any]) -> Any:
    """The type of both operands, or of the block if the other is a scalar of its element type.

    None if they differ, or if it is none of ``types``. A Python number has the type of the tensor beside it, if that
    holds floats or the number is a 32-bit integer. 0.0 has none: versions of Triton differ over the sign of -0.0.
    """
    if type(one) is not tl.tensor:
        one, other = other, one
    if type(one) is not tl.tensor or one.type.scalar.name not in types:
        return None
    if type(other) is tl.tensor:
        if other.type.name == one.type.name:
            return one.type
        if other.type.scalar.name != one.type.scalar.name or one.type.is_block() == other.type.is_block():
            return None
        return one.type if one.type.is_block() else other.type
    if one.type.scalar.is_bool() or (type(other) is float and other == 0):
        return None
    wanted = (int,) if one.type.scalar.is_int() else (int, float)
    return one.type if type(other) in wanted and -(2**31) <= other < 2**31 else None


@lru_cache(maxsize=4096)
def constant(number: float, numpy_type: Any) -> Any:
    """A Python number as the interpreter holds one. Equal numbers share it: no operation writes to its operands."""
    return np.array([number], dtype=numpy_type)


def on_numpy(operation: Callable[..., Any], numpy_operation: Any, types: dict[str, Any], result: Any) -> Any:
    """Triton's ``operation``, done by NumPy for two operands of one of ``types``. result: None for their own type."""

    @wraps(operation)
    def computed(semantic: Any, one: Any, other: Any, *how: Any, **named: Any) -> Any:
        type_ = common_type(one, other, types)
        if type_ is None:
            return operation(semantic, one, other, *how, **named)
        numpy_type = types[type_.scalar.name]
        left = one.handle.data if type(one) is tl.tensor else constant(one, numpy_type)
        right = other.handle.data if type(other) is tl.tensor else constant(other, numpy_type)
        handle = interpreter.TensorHandle(numpy_operation(left, right), type_.scalar)
        return tl.tensor(handle, type_ if result is None else type_.with_element_ty(result))

    return computed


def on_addresses(add: Callable[..., Any]) -> Any:
    """Triton's addition, done by NumPy where an integer, or a block of them, is added to one address."""

    @wraps(add)
    def computed(semantic: Any, one: Any, other: Any, *how: Any, **named: Any) -> Any:
        if type(one) is not tl.tensor or not one.type.is_ptr() or one.type.element_ty.is_ptr():
            return add(semantic, one, other, *how, **named)
        if type(other) is tl.tensor and other.type.scalar.name in ("int32", "int64"):
            offsets, shape = other.handle.data, other.type.get_block_shapes() if other.type.is_block() else None
        elif type(other) is int and 0 <= other < 2**31:
            offsets, shape = constant(other, np.int64), None
        else:
            return add(semantic, one, other, *how, **named)
        element_bytes = np.uint64(max(one.type.element_ty.primitive_bitwidth, 8) // 8)
        handle = interpreter.TensorHandle(one.handle.data + element_bytes * offsets.astype(np.uint64), one.type)
        return tl.tensor(handle, one.type if shape is None else tl.core.block_type(one.type, shape))

    return computed


def hasten() -> None:
    """Make the interpreter of this process faster without changing a result; no effect where its internals differ."""
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None or hasattr(patch, "__wrapped__"):
        return
    interpreter._patch_lang = patch_once(patch)
    interpreter._patch_builtin = patch_functions
    interpreter._get_np_dtype = once_per_name(interpreter._get_np_dtype)
    block, tensor = tl.core.block_type, tl.core.tensor
    tensor.__init__ = construct_once(tensor.__init__, lambda handle, type: type.name, varying="handle")
    block.__init__ = construct_once(
        block.__init__, lambda element, shape: (element.name, *(getattr(size, "value", size) for size in shape))
    )
    options = interpreter.interpreter_builder.options
    # Outside of debug mode the result of the overflow check is not used.
    if options.debug:
        return
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    semantic = interpreter.TritonSemantic
    for operations, types, result in OPERATIONS:
        for name, numpy_operation in operations.items():
            setattr(semantic, name, on_numpy(getattr(semantic, name), numpy_operation, types, result))
    semantic.add = on_addresses(semantic.add)
