"""What equal and accurate mean, as assertions. Nothing here has a tolerance of its own: every bound is derived."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

# An implementation may be this much less accurate than plain PyTorch in the same dtype.
ACCURACY_FACTOR = 2.0

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_bitwise(got: Tensor, expected: Tensor, name: str = "tensor") -> None:
    """The same shape, dtype and bits (NaN equals NaN of the same bits, +0 differs from -0).

    Raises ``AssertionError`` that counts the differing elements and shows the first.
    """
    assert got.dtype == expected.dtype, f"{name}: got {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, (
        f"{name}: got shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    )
    bits = _BITS[got.element_size()]
    differs = got.detach().contiguous().view(bits) != expected.detach().contiguous().view(bits)
    if differs.any():
        first = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(differs.sum())} of {differs.numel()} elements differ, the first at {first}: "
            f"got {got[first].item()!r}, expected {expected[first].item()!r}"
        )


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Distance from the truth, relative to its size.

    norm: the Frobenius norm of the difference over that of the truth. worst_row: the largest over all rows (last
    dimension) of the row's difference, over the row's own norm or the root mean square of all rows' norms if larger.
    """

    norm: float
    worst_row: float


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """One tensor's errors beside those that it may have."""

    name: str
    got: Errors
    bound: Errors

    @property
    def ok(self) -> bool:
        """Whether both errors are within their bounds."""
        return self.got.norm <= self.bound.norm and self.got.worst_row <= self.bound.worst_row

    def __str__(self) -> str:
        return (
            f"{self.name}: relative error {self.got.norm:.3g} (at most {self.bound.norm:.3g}), "
            f"worst row {self.got.worst_row:.3g} (at most {self.bound.worst_row:.3g})"
        )


def measure_errors(got: Tensor, truth: Tensor, must_be_zero: Tensor | None = None) -> Errors:
    """Errors of ``got`` against ``truth``; infinite for anything that is not finite.

    must_be_zero: a mask of rows that have to be exact zeros; another value there is an infinite error.
    """
    got_NH, truth_NH = _as_rows(got), _as_rows(truth)
    if truth_NH.numel() == 0:
        return Errors(norm=0.0, worst_row=0.0)
    difference_NH = got_NH - truth_NH
    stray = must_be_zero is not None and bool((got_NH[must_be_zero] != 0).any())
    if stray or not bool(difference_NH.isfinite().all()):
        return Errors(norm=inf, worst_row=inf)
    size_N = truth_NH.norm(dim=1)
    distance_N = difference_NH.norm(dim=1)
    row_scale_N = size_N.clamp(min=float(size_N.square().mean().sqrt()))
    return Errors(
        norm=_ratio(float(difference_NH.norm()), float(truth_NH.norm())),
        worst_row=max(map(_ratio, distance_N.tolist(), row_scale_N.tolist())),
    )


def measure_accuracy(got: Tensor, truth: Tensor, plain: Tensor, name: str = "tensor") -> Accuracy:
    """``got`` against the fp64 ``truth``, with ``plain`` (PyTorch in the same dtype) as the yardstick.

    The bound is ``ACCURACY_FACTOR`` times the error of ``plain``, which counts as at least half a unit in the last
    place: no result can be expected to be better than the truth, rounded. Rows that are exact zeros in the truth and
    in ``plain`` have to be exact zeros.
    """
    assert got.dtype == plain.dtype, f"{name}: got {got.dtype}, expected {plain.dtype}"
    assert got.shape == truth.shape == plain.shape, (
        f"{name}: got {tuple(got.shape)}, expected {tuple(truth.shape)}"
    )
    half_ulp = torch.finfo(got.dtype).eps / 2
    yardstick = measure_errors(plain, truth)
    zero_rows = (_as_rows(truth) == 0).all(dim=1) & (_as_rows(plain) == 0).all(dim=1)
    return Accuracy(
        name=name,
        got=measure_errors(got, truth, must_be_zero=zero_rows),
        bound=Errors(
            norm=ACCURACY_FACTOR * max(yardstick.norm, half_ulp),
            worst_row=ACCURACY_FACTOR * max(yardstick.worst_row, half_ulp),
        ),
    )


def assert_as_accurate(got: Tensor, truth: Tensor, plain: Tensor, name: str = "tensor") -> None:
    """Raise ``AssertionError`` unless ``got`` is as accurate as ``measure_accuracy`` asks."""
    accuracy = measure_accuracy(got, truth, plain, name)
    assert accuracy.ok, str(accuracy)


def _as_rows(tensor: Tensor) -> Tensor:
    """(N, last dimension) in fp64; a vector is one row."""
    wide = tensor.detach().double()
    return wide.reshape(1, -1) if wide.ndim < 2 else wide.flatten(0, -2)


def _ratio(distance: float, size: float) -> float:
    if distance == 0:
        return 0.0
    return distance / size if size > 0 else inf
