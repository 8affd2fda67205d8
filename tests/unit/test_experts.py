"""Experts: each row by its own, exact zeros for empty ones, nothing read past the valid rows; and their kernels."""

from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from near import assert_near
from torch import Tensor

from sonic_ep.activation import ACTIVATIONS, GATE_LAYOUTS
from sonic_ep.backend import Experts
from sonic_ep.reference.experts import apply_experts
from sonic_ep.testing import Rank, RankPool, assert_as_accurate, assert_bitwise

HIDDEN, INTERMEDIATE = 6, 4
ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)


def some_experts() -> Experts:
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    return Experts(
        w1=weight(3, 2 * INTERMEDIATE, HIDDEN),
        w2=weight(3, HIDDEN, INTERMEDIATE),
        b1=weight(3, 2 * INTERMEDIATE),
        b2=weight(3, HIDDEN),
        activation=ACTIVATIONS["swiglu"],
        layout=GATE_LAYOUTS["concat"],
    )


def one_row(row: torch.Tensor, experts: Experts, expert: int) -> torch.Tensor:
    assert experts.b1 is not None
    assert experts.b2 is not None
    hidden = experts.w1[expert] @ row + experts.b1[expert]
    gate, up = hidden[:INTERMEDIATE], hidden[INTERMEDIATE:]
    return experts.w2[expert] @ (up * gate * torch.sigmoid(gate)) + experts.b2[expert]


def test_each_row_by_its_own_expert() -> None:
    experts = some_experts()
    rows = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    y = apply_experts(rows, ENDS, experts)
    expected = torch.stack([one_row(row, experts, e) for row, e in zip(rows, [0, 0, 2, 2, 2], strict=True)])
    assert_near(y, expected, 100)


def test_rows_past_the_valid_ones_are_never_read() -> None:
    found = []
    for behind in (0.0, float("nan")):
        experts = some_experts()
        rows = torch.full((9, HIDDEN), behind)
        rows[:5] = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
        rows.requires_grad_()
        y = apply_experts(rows, ENDS, experts)
        assert y[5:].eq(0).all()
        grad = torch.full_like(y, behind)
        grad[:5] = 1
        y.backward(grad)
        assert rows.grad is not None
        assert rows.grad[5:].eq(0).all()
        found.append([y[:5], rows.grad[:5], experts.w1.grad, experts.w2.grad, experts.b1.grad, experts.b2.grad])
    for clean, poisoned in zip(*found, strict=True):
        assert_bitwise(poisoned, clean)


def test_an_empty_expert_gets_exact_zeros() -> None:
    experts = some_experts()
    rows = torch.randn(5, HIDDEN)
    apply_experts(rows, ENDS, experts).sum().backward()
    for weight in (experts.w1, experts.w2, experts.b1, experts.b2):
        assert weight is not None
        assert weight.grad is not None
        assert weight.grad[1].eq(0).all()
        assert weight.grad[0].ne(0).any()


def test_no_rows_at_all_still_carry_gradients() -> None:
    experts = some_experts()
    y = apply_experts(torch.zeros(0, HIDDEN), torch.zeros(3, dtype=torch.int32), experts)
    assert y.shape == (0, HIDDEN)
    y.sum().backward()
    assert experts.w1.grad is not None
    assert experts.w1.grad.eq(0).all()


ROWS, WIDTH, BEHIND = 66, 37, 4
GROUP_ENDS = [3, 3, 40, 50, ROWS]
NAN = float("nan")


@dataclass(frozen=True, kw_only=True, eq=False)
class Between:
    """Rows between the two products, NaN behind the valid ones: h, dA, and scores by slot."""

    hidden: Tensor
    grad: Tensor
    scores: Tensor
    plan: Any
    experts: Experts

    @property
    def score_of_row(self) -> Tensor:
        """(ROWS, 1) fp64."""
        return self.scores[self.plan.slot_of_row[:ROWS].long()].double()[:, None]

    @property
    def expert_of_row(self) -> Tensor:
        """(ROWS,)."""
        return torch.searchsorted(self.plan.group_ends, torch.arange(ROWS, device=self.scores.device), right=True)


def between(rank: Rank, name: str, layout: str, dtype: torch.dtype) -> Between:
    generator = torch.Generator().manual_seed(0)

    def rows(width: int) -> Tensor:
        valid = torch.randn(ROWS, width, generator=generator, dtype=torch.float64)
        return torch.cat([valid, torch.full((BEHIND, width), NAN)]).to(rank.device, dtype)

    slots = torch.cat([torch.randperm(100, generator=generator)[:ROWS], torch.full((BEHIND,), -1)])
    index = {"dtype": torch.int32, "device": rank.device}
    plan = SimpleNamespace(
        group_ends=torch.tensor(GROUP_ENDS, **index),
        experts_per_rank=len(GROUP_ENDS),
        row_capacity=ROWS + BEHIND,
        slot_of_row=slots.to(**index),
    )
    activation = ACTIVATIONS[name]
    unused = torch.empty(len(GROUP_ENDS), 5, WIDTH, device=rank.device, dtype=dtype)
    return Between(
        hidden=rows(activation.up_width(WIDTH)),
        grad=rows(WIDTH),
        scores=torch.rand(100, generator=generator).to(rank.device),
        plan=plan,
        experts=Experts(w1=unused, w2=unused, b1=None, b2=None, activation=activation, layout=GATE_LAYOUTS[layout]),
    )


def by_autograd(given: Between, dtype: torch.dtype) -> dict[str, Tensor]:
    """Activation and gradients in ``dtype``, by PyTorch."""
    hidden = given.hidden[:ROWS].to(dtype).requires_grad_()
    activated = given.experts.activation(hidden, given.experts.layout)
    weighted = (given.grad[:ROWS].double() * given.score_of_row).to(dtype)
    (hidden_grad,) = torch.autograd.grad(activated, hidden, weighted)
    return {
        "activated": activated.detach(),
        "hidden": hidden_grad,
        "weighted": (activated.detach().double() * given.score_of_row).to(dtype),
    }


def activations_by_kernels(rank: Rank, name: str, layout: str) -> None:
    from sonic_ep.fast.experts import activate, activate_backward

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = between(rank, name, layout, dtype)
        truth, plain = by_autograd(given, torch.float64), by_autograd(given, dtype)
        activated = activate(given.hidden, given.experts, given.plan)
        found = activate_backward(given.hidden, given.grad.clone(), given.scores, given.experts, given.plan)
        got = {"activated": activated, "hidden": found.hidden, "weighted": found.weighted}
        for what, rows in got.items():
            assert_as_accurate(rows[:ROWS], truth[what], plain[what], f"{what} of {name}, {dtype}")
        # Behind the valid rows nothing is written, also where what would be read is a number.
        numbers = torch.full_like(given.hidden, 7.0)
        weighted = activate_backward(numbers, torch.full_like(given.grad, 7.0), given.scores, given.experts, given.plan)
        assert weighted.weighted[ROWS:].eq(7).all()
        dots = (given.grad[:ROWS].double() * truth["activated"]).sum(dim=1)
        assert_near(found.dots[:ROWS], dots, 100)


@pytest.mark.fast
@pytest.mark.parametrize("layout", GATE_LAYOUTS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_gradients_by_kernels(pool: RankPool, name: str, layout: str) -> None:
    pool.run(activations_by_kernels, name, layout, world_size=1)


def odd_numbers_by_kernels(rank: Rank) -> None:
    """NaN stays NaN and reaches no other number; the ends of the range have the limits of the activation."""
    from sonic_ep.fast.experts import activate, activate_backward

    for name, dtype in product(("silu", "gelu", "relu", "relu_sq"), (torch.float32, torch.bfloat16)):
        given = between(rank, name, "concat", dtype)
        given.hidden[:ROWS, :5] = torch.tensor([NAN, -1e30, 1e4, -0.0, -1e4], device=rank.device).to(dtype)
        activated = activate(given.hidden, given.experts, given.plan)[:ROWS]
        assert activated[:, 0].isnan().all()
        assert activated[:, [1, 3, 4]].eq(0).all()
        assert_bitwise(activated[:, 2], given.hidden[:ROWS, 2] ** (2 if name == "relu_sq" else 1))
        assert activated[:, 1:].isfinite().all()
        found = activate_backward(given.hidden, given.grad.clone(), given.scores, given.experts, given.plan)
        assert found.hidden[:ROWS, 1:].isfinite().all()


@pytest.mark.fast
def test_odd_numbers_stay_where_they_are(pool: RankPool) -> None:
    pool.run(odd_numbers_by_kernels, world_size=1)


def sums_by_kernels(rank: Rank) -> None:
    from sonic_ep.fast.experts import add_bias_dots, sum_groups

    for dtype in (torch.float32, torch.bfloat16):
        given = between(rank, "relu", "concat", dtype)
        rows, expert = given.grad, given.expert_of_row
        for scores, weight in ((None, 1.0), (given.scores, given.score_of_row)):
            sums = sum_groups(rows, scores, given.plan)
            member = (expert == torch.arange(len(GROUP_ENDS), device=rank.device)[:, None]).double()
            truth = member @ (rows[:ROWS].double() * weight)
            assert_as_accurate(sums, truth, truth.to(dtype))
            assert sums[1].eq(0).all()
        bias = rows[: len(GROUP_ENDS)].clone()
        dots = torch.ones(ROWS + BEHIND, device=rank.device)
        add_bias_dots(rows, bias, dots, given.plan)
        terms = rows[:ROWS].double() * bias.double()[expert]
        assert_near(dots[:ROWS], terms.sum(dim=1) + 1, 100)
        assert dots[ROWS:].eq(1).all()
        if dtype == torch.float32:
            assert_bitwise(dots[:ROWS], (terms.sum(dim=1) + 1).float())


@pytest.mark.fast
def test_sums_over_the_rows_of_experts(pool: RankPool) -> None:
    pool.run(sums_by_kernels, world_size=1)
