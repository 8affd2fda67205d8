"""The GEMMs of a layer by themselves: the least that its experts take."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.context import BenchCase, other_inputs
from sonic_ep.profiler.problem import Shape
from sonic_ep.testing.checks import assert_as_accurate
from sonic_ep.testing.layer_problem import LayerProblem

# Bytes that a row has to be a multiple of for ``grouped_mm``.
ROW_MULTIPLE = 16


class Products:
    """Random operands: ends (e,) int32; rows, out_grad (R, H); hidden_grad (R, 2I or I); activated (R, I)."""

    def __init__(self, problem: LayerProblem, ends_e: Tensor, rows: int) -> None:
        w1, w2 = problem.call.experts.up_weights[0].detach(), problem.call.experts.w2.detach()
        generator = torch.Generator(w1.device).manual_seed(problem.group.rank)

        def normal(width: int) -> Tensor:
            return w1.new_empty((rows, width)).normal_(generator=generator)

        hidden, intermediate = w2.shape[1:]
        self.ends, self.w1, self.w2 = ends_e, w1, w2
        self.rows, self.out_grad = normal(hidden), normal(hidden)
        self.hidden_grad, self.activated = normal(w1.shape[1]), normal(intermediate)

    def case(self, name: str, shape: Shape, *, backward: bool) -> BenchCase:
        """The two products of a forward, or all six."""
        operands = self.operands(backward=backward)

        def check(got: list[Tensor]) -> None:
            for place, (found, (left, right)) in enumerate(zip(got, operands, strict=True)):
                self.expect_of_one_group(found, left, right, f"product {place}")

        return BenchCase(
            name=name,
            shape=shape,
            run=lambda: self.all_of(operands),
            check=check,
            other_inputs=lambda: other_inputs(self.rows, self.out_grad, self.hidden_grad, self.activated),
        )

    def operands(self, *, backward: bool) -> list[tuple[Tensor, Tensor]]:
        """Left (R, .) and right of the two of a forward, or of all six; a right of (R, .) is summed over rows."""
        forward = [(self.rows, self.w1.transpose(1, 2)), (self.activated, self.w2.transpose(1, 2))]
        of_rows = [(self.out_grad, self.w2), (self.hidden_grad, self.w1)]
        of_weights = [(self.out_grad, self.activated), (self.hidden_grad, self.rows)]
        return [*forward, *of_rows, *of_weights] if backward else forward

    def all_of(self, operands: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Each of the products, in order."""
        widths = (self.rows.shape[1], self.hidden_grad.shape[1], self.activated.shape[1])
        refused = any(width * self.rows.element_size() % ROW_MULTIPLE for width in widths)
        multiply = self.one_by_one if refused else partial(F.grouped_mm, offs=self.ends)
        return [multiply(left if right.ndim == 3 else left.t(), right) for left, right in operands]

    def one_by_one(self, left: Tensor, right: Tensor) -> Tensor:
        """The same in plain PyTorch, for rows that ``grouped_mm`` refuses. Reads the host."""
        starts_and_ends = list(pairwise([0, *self.ends.tolist()]))
        if right.ndim == 3:
            return torch.cat([left[a:b] @ weight for (a, b), weight in zip(starts_and_ends, right, strict=True)])
        return torch.stack([left[:, a:b] @ right[a:b] for a, b in starts_and_ends])

    def expect_of_one_group(self, found: Tensor, left: Tensor, right: Tensor, name: str) -> None:
        """The group with most rows, as accurate as a product of its own."""
        sizes = self.ends.diff(prepend=self.ends.new_zeros(1))
        group = int(sizes.argmax())
        rows = slice(int(self.ends[group] - sizes[group]), int(self.ends[group]))
        by_rows = right.ndim == 3
        a, b = (left[rows], right[group]) if by_rows else (left[rows].t(), right[rows])
        wide = torch.float64 if a.dtype is torch.float32 else torch.float32
        assert_as_accurate(found[rows] if by_rows else found[group], a.to(wide) @ b.to(wide), a @ b, name)
