"""The matrix products of a layer by themselves: the least that its experts take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from sonic_ep.benchmark.layer_problem import LayerProblem
from sonic_ep.benchmark.oracle import wider
from sonic_ep.testing import assert_as_accurate

# Bytes that a row has to be a multiple of for ``grouped_mm``.
ROW_MULTIPLE = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Products:
    """The matrix products of a layer by ``grouped_mm``, at the rows that its routing sends here; random numbers.

    ends (e,) int32. rows, out_grad (R, H); hidden_grad (R, 2I or I); activated (R, I), with R = ends[-1].
    """

    ends: Tensor
    rows: Tensor
    out_grad: Tensor
    hidden_grad: Tensor
    activated: Tensor
    w1: Tensor
    w2: Tensor

    @staticmethod
    def of(problem: LayerProblem, ends_e: Tensor, rows: int) -> Products:
        """Drawn for ``rows`` rows."""
        w1, w2 = problem.inputs.w1.detach(), problem.inputs.w2.detach()
        generator = torch.Generator(w1.device).manual_seed(problem.group.rank)

        def normal(width: int) -> Tensor:
            return w1.new_empty((rows, width)).normal_(generator=generator)

        hidden, intermediate = w2.shape[1:]
        return Products(
            ends=ends_e,
            rows=normal(hidden),
            out_grad=normal(hidden),
            hidden_grad=normal(w1.shape[1]),
            activated=normal(intermediate),
            w1=w1,
            w2=w2,
        )

    def operands(self, *, backward: bool) -> list[tuple[Tensor, Tensor]]:
        """Left (R, .) and right of the two of a forward, or of all six.

        Rows are multiplied by a right of (e, ., .); of one of (R, .) the products with rows are summed, by expert.
        """
        forward = [(self.rows, self.w1.transpose(1, 2)), (self.activated, self.w2.transpose(1, 2))]
        if not backward:
            return forward
        of_rows = [(self.out_grad, self.w2), (self.hidden_grad, self.w1)]
        return [*forward, *of_rows, (self.out_grad, self.activated), (self.hidden_grad, self.rows)]

    def all_of(self, operands: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Each of the products, one behind the other."""
        return [self._product(left if right.ndim == 3 else left.t(), right) for left, right in operands]

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        widths = (self.rows.shape[1], self.hidden_grad.shape[1], self.activated.shape[1])
        if any(width * self.rows.element_size() % ROW_MULTIPLE for width in widths):
            return self._one_by_one(left, right)
        return F.grouped_mm(left, right, offs=self.ends)

    def _one_by_one(self, left: Tensor, right: Tensor) -> Tensor:
        """The same in plain PyTorch, for rows that ``grouped_mm`` refuses. Reads the host."""
        starts_and_ends = list(pairwise([0, *self.ends.tolist()]))
        if right.ndim == 3:
            return torch.cat([left[a:b] @ weight for (a, b), weight in zip(starts_and_ends, right, strict=True)])
        return torch.stack([left[:, a:b] @ right[a:b] for a, b in starts_and_ends])

    def expect_of_one_group(self, found: Tensor, left: Tensor, right: Tensor, name: str) -> None:
        """The group with most rows, as accurate as a product of its own."""
        sizes = self.ends.diff(prepend=self.ends.new_zeros(1))
        group = int(sizes.argmax())
        end = int(self.ends[group])
        rows = slice(end - int(sizes[group]), end)
        by_rows = right.ndim == 3
        a, b = (left[rows], right[group]) if by_rows else (left[rows].t(), right[rows])
        truth = a.to(wider(a.dtype)) @ b.to(wider(b.dtype))
        assert_as_accurate(found[rows] if by_rows else found[group], truth, a @ b, name)
