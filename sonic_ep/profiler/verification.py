"""Exact checks of results, as assertions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

# Fills integers: no valid id, row or count.
POISON = -7
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def expect(holds: bool, message: str) -> None:
    """Raise ``AssertionError`` unless ``holds``, also under ``python -O``."""
    if not holds:
        raise AssertionError(message)


def assert_bitwise(got: Tensor, expected: Tensor, name: str = "tensor") -> None:
    """Raise ``AssertionError`` unless shape, dtype and bits are equal; NaN equals NaN of the same bits."""
    expect(got.dtype == expected.dtype, f"{name}: got {got.dtype}, expected {expected.dtype}")
    expect(got.shape == expected.shape, f"{name}: got shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    bits = _BITS[got.element_size()]
    differs = got.detach().contiguous().view(bits) != expected.detach().contiguous().view(bits)
    if differs.any():
        first = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(differs.sum())} of {differs.numel()} elements differ, the first at {first}: "
            f"got {got[first].item()!r}, expected {expected[first].item()!r}"
        )


def poison(result: Any) -> None:
    """Overwrite ``result``, a tensor, several, or a dataclass or mapping of tensors, with NaN or -7."""
    if is_dataclass(result):
        result = [getattr(result, field.name) for field in fields(result)]
    elif isinstance(result, Mapping):
        result = list(result.values())
    for tensor in result if isinstance(result, list | tuple) else [result]:
        if isinstance(tensor, Tensor):
            tensor.fill_(float("nan") if tensor.is_floating_point() else POISON)
