"""What accurate means, as assertions. Nothing here has a tolerance of its own: every bound is derived."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from sonic_ep.profiler.verification import expect

# An implementation may be this much less accurate than plain PyTorch in the same dtype.
ACCURACY_FACTOR = 2.0


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Distance from the truth, relative to its size.

    norm: Frobenius norms, of the difference over the truth. worst_row: the largest of any row (last dimension), over
    the row's own norm or the root mean square of all rows' norms if larger.
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

    @property
    def ratio(self) -> float:
        """The larger of both errors over their bounds: at most 1 if ok."""
        return max(_ratio(self.got.norm, self.bound.norm), _ratio(self.got.worst_row, self.bound.worst_row))

    def __str__(self) -> str:
        return (
            f"{self.name}: relative error {self.got.norm:.3g} (at most {self.bound.norm:.3g}), "
            f"worst row {self.got.worst_row:.3g} (at most {self.bound.worst_row:.3g})"
        )


class Yardstick:
    """The truth of a whole tensor, in fp64, and how far plain PyTorch in the tested dtype is from it.

    Shares of ranks are judged together: a rank with two rows has no statistics of its own.
    """

    def __init__(self, truth: Tensor, plain: Tensor) -> None:
        expect(truth.shape == plain.shape, f"got shape {tuple(plain.shape)}, expected {tuple(truth.shape)}")
        # An infinite yardstick would let everything pass.
        expect(bool(truth.isfinite().all() & plain.isfinite().all()), "the truth or plain PyTorch is not finite")
        self._plain, self._truth = plain, truth.detach().double()
        row_norms = torch.linalg.vector_norm(self._truth, dim=-1)
        self._norm = float(torch.linalg.vector_norm(self._truth))
        typical = self._norm / max(row_norms.numel(), 1) ** 0.5
        self._row_scale = row_norms.clamp(min=typical)
        # Rows that even rounding does not touch have to be exact.
        self._zero_rows = (self._truth == 0).all(dim=-1) & (plain == 0).all(dim=-1)
        self._bound = bound_of(_joined([self.part(plain)], self._norm), plain.dtype)

    def part(self, got: Tensor, share: slice = slice(None)) -> Tensor:
        """The part of ``got``, which is ``share`` of the whole: the square of its distance, and its worst row.

        Infinite if anything is not finite, or not zero in a row that is exactly zero in the truth and in plain PyTorch.
        """
        truth = self._truth[share]
        expect(got.dtype == self._plain.dtype, f"got {got.dtype}, expected {self._plain.dtype}")
        expect(got.shape == truth.shape, f"got shape {tuple(got.shape)}, expected {tuple(truth.shape)}")
        if got.numel() == 0:
            return truth.new_zeros(2)
        difference = got.detach().double() - truth
        nonzero = bool((got.detach()[self._zero_rows[share]] != 0).any())
        if nonzero or not bool(difference.isfinite().all()):
            return truth.new_full((2,), inf)
        distance = torch.linalg.vector_norm(difference, dim=-1)
        # A scale of zero means a truth of zeros only; a difference from that is infinitely wrong.
        relative = torch.where(distance > 0, distance / self._row_scale[share], 0.0)
        return torch.stack([difference.square().sum(), relative.max()])

    def parts(self, got: Tensor, share: slice = slice(None)) -> Tensor:
        """A share as ``pooled`` takes it, (3, 2): the parts of the truth itself, of ``got`` and of plain PyTorch."""
        square = self._truth[share].square().sum()
        size = torch.stack([square, torch.zeros_like(square)])
        return torch.stack([size, self.part(got, share), self.part(self._plain[share], share)])

    def judge(self, name: str, parts: Iterable[Tensor]) -> Accuracy:
        """The errors of the whole from the parts of all shares."""
        return Accuracy(name=name, got=_joined(parts, self._norm), bound=self._bound)


def pooled(name: str, shares: Iterable[Tensor], dtype: torch.dtype) -> Accuracy:
    """The errors of a tensor from each rank's ``Yardstick.parts``: squares are summed, and the worst row of all counts.

    >>> shares = [torch.tensor([[size, 0.0], [9.0, 0.0], [8.0, 0.0]]) for size in (9.0, 16.0)]
    >>> found = pooled("y", shares, torch.float32)
    >>> round(found.got.norm ** 2, 6), round(found.bound.norm ** 2, 6)
    (0.72, 2.56)
    """
    truth, got, plain = zip(*shares, strict=True)
    size = _joined(truth, 1.0).norm
    return Accuracy(name=name, got=_joined(got, size), bound=bound_of(_joined(plain, size), dtype))


def bound_of(plain: Errors, dtype: torch.dtype) -> Errors:
    """The errors that are admitted where plain PyTorch in ``dtype`` makes those of ``plain``."""
    # No result can be expected to be better than the truth, rounded.
    half_ulp = torch.finfo(dtype).eps / 2
    norm, worst_row = (ACCURACY_FACTOR * max(error, half_ulp) for error in (plain.norm, plain.worst_row))
    return Errors(norm=norm, worst_row=worst_row)


def assert_as_accurate(got: Tensor, truth: Tensor, plain: Tensor, name: str = "tensor") -> None:
    """Raise ``AssertionError`` unless ``got`` is at most ``ACCURACY_FACTOR`` times as far from ``truth`` as ``plain``.

    truth: in fp64. plain: by PyTorch in the dtype of ``got``; its error counts as at least half a unit in the last
    place. Both ``Errors`` count, and rows that are exact zeros in both have to be exact zeros.
    """
    if got.ndim < 2:
        # A vector is one row.
        got, truth, plain = (tensor.reshape(1, -1) for tensor in (got, truth, plain))
    yardstick = Yardstick(truth, plain)
    accuracy = yardstick.judge(name, [yardstick.part(got)])
    expect(accuracy.ok, str(accuracy))


def _joined(parts: Iterable[Tensor], size: float) -> Errors:
    """The errors of all parts together, where the truth has the norm ``size``."""
    squares, worst_rows = torch.stack(list(parts)).unbind(dim=1)
    return Errors(norm=_ratio(float(squares.sum()) ** 0.5, size), worst_row=float(worst_rows.max()))


def _ratio(distance: float, size: float) -> float:
    if distance == 0:
        return 0.0
    return distance / size if size > 0 else inf
