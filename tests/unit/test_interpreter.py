"""The faster operations of Triton's interpreter: each has the outcome of Triton's own."""

import inspect
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from on_ranks import on_ranks
from programs import run_program

from sonic_ep.testing import Rank

SCALARS = {
    "int1": [False, True, True],
    "int8": [-128, -1, 127],
    "int32": [-(2**31), -1, 2**31 - 1],
    "uint32": [0, 5, 2**32 - 1],
    "int64": [-(2**63), 7, 2**63 - 1],
    "float16": [-1.5, 0.0, 6e4],
    "float32": [float("nan"), -0.0, 3e38],
    "float64": [1e300, -0.5, 2.0],
}
NUMBERS = [0, 0.0, -0.0, 1, -1, 2**31 - 1, -(2**31), 2**31, 2**40, 2**63, True, 0.5, -3.0, float("inf")]
ARITHMETIC = ["add", "sub", "mul"]
OTHERS = ["and_", "or_", "less_than", "less_equal", "greater_than", "greater_equal", "equal", "not_equal"]


def operands() -> list[Any]:
    """Numbers; and scalars, blocks of two shapes and pointers of every kind."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    made: list[Any] = list(NUMBERS)
    pointer = tl.pointer_type(tl.float32)
    for name, values in SCALARS.items():
        scalar = getattr(tl, name)
        data = np.array([*values, values[0]], dtype=_get_np_dtype(scalar))
        made += [tl.tensor(TensorHandle(data[i : i + 1], scalar), scalar) for i in range(3)]
        made.append(tl.tensor(TensorHandle(data, scalar), tl.block_type(scalar, [4])))
        made.append(tl.tensor(TensorHandle(data.reshape(2, 2), scalar), tl.block_type(scalar, [2, 2])))
    addresses = np.array([4096, 8192, 2**63, 16], dtype=np.uint64)
    for kind in (pointer, *map(tl.pointer_type, (tl.int1, tl.int64, pointer))):
        made.append(tl.tensor(TensorHandle(addresses[:1], kind), kind))
    made.append(tl.tensor(TensorHandle(addresses, pointer), tl.block_type(pointer, [4])))
    return made


def outcome(operation: Any, *arguments: Any) -> tuple[Any, ...]:
    """Type, shape and bits of the result, or type and message of the error."""
    from triton.runtime.interpreter import interpreter_semantic

    try:
        result = operation(interpreter_semantic, *arguments)
    except Exception as error:
        return type(error), str(error)
    data = result.handle.data
    return str(result.type), str(result.handle.dtype), data.dtype.str, data.shape, data.tobytes()


@pytest.mark.fast
@on_ranks(1, pool="cpu_pool")
@pytest.mark.parametrize("name", [*ARITHMETIC, *OTHERS])
def test_an_operation_has_the_outcome_of_tritons_own(rank: Rank, name: str) -> None:
    from triton.runtime.interpreter import TritonSemantic

    faster = getattr(TritonSemantic, name)
    original = inspect.unwrap(faster)
    assert original is not faster
    pairs = list(product(operands(), repeat=2))
    assert len(pairs) > 2000
    with np.errstate(all="ignore"):
        for pair in pairs:
            arguments = (*pair, False) if name in ARITHMETIC else pair
            found, expected = outcome(faster, *arguments), outcome(original, *arguments)
            assert found == expected, (name, pair, found, expected)


AS_A_USER_RUNS_IT = """
import sys, warnings
import torch
from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.config import CombineMode, DispatchMode

# Of the interpreter of Triton 3.6 itself, with numpy 2.
warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)
for dispatch, combine in list(zip(DispatchMode, CombineMode, strict=True))[: int(sys.argv[1])]:
    found = []
    for backend in ("fast", "reference"):
        torch.manual_seed(0)
        x, router_w, w1, w2 = (torch.randn(s).requires_grad_() for s in ((2, 4), (2, 4), (2, 4, 4), (2, 4, 2)))
        with ExpertParallel(None, backend, EPConfig(dispatch, combine)) as ep:
            y = ep.moe(x, router_w, w1, w2, 2).y
            found.append((y, *torch.autograd.grad(y.sum(), (x, router_w, w1, w2))))
    for fast, reference in zip(*found, strict=True):
        torch.testing.assert_close(fast, reference)
"""


@pytest.mark.fast
@pytest.mark.parametrize("pairs", ["1", pytest.param("3", marks=pytest.mark.thorough)])
def test_kernels_run_under_tritons_own_interpreter(pairs: str, tmp_path: Path) -> None:
    """Which is what ``TRITON_INTERPRET=1`` gives a user: the other tests run the faster one of ``sonic_ep.testing``."""
    assert run_program(tmp_path, AS_A_USER_RUNS_IT, [pairs]) == [(0, "")]
