"""The experts' loop: each row by its own expert, exact zeros for empty ones, nothing read past the valid rows."""

import torch
from near import assert_near

from sonic_ep.activation import ACTIVATIONS, GATE_LAYOUTS
from sonic_ep.backend import Experts
from sonic_ep.reference.experts import apply_experts
from sonic_ep.testing import assert_bitwise

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
