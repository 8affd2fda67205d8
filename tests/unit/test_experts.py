"""Experts: each row by its own expert, exact zeros for empty ones, rows past the valid ones unread; their kernels."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from near import assert_near
from on_ranks import on_ranks
from promises import promise
from same import assert_same_bits
from torch import Tensor

from sonic_ep.activation import ACTIVATIONS, GATE_LAYOUTS, Swiglu
from sonic_ep.backend import ExpertWeights
from sonic_ep.reference.experts import apply_experts
from sonic_ep.testing import Rank, assert_as_accurate, assert_bitwise
from sonic_ep.testing.cases import GPT_OSS, TIGHT

NAN, LAYOUT = float("nan"), GATE_LAYOUTS["concat"]


def test_rows_past_the_valid_ones_are_never_read_and_an_empty_expert_has_zero_gradients() -> None:
    group_ends, options = torch.tensor([2, 2, 5]).int(), {"activation": ACTIVATIONS["swiglu"], "layout": LAYOUT}
    shapes, found = {"w1": (8, 6), "w2": (6, 4), "b1": (8,), "b2": (6,)}, []
    for behind in (0.0, NAN):
        generator = torch.Generator().manual_seed(0)
        rows = torch.cat([torch.randn(5, 6, generator=generator), torch.full((4, 6), behind)])
        weights = {name: torch.randn(3, *shape, generator=generator) for name, shape in shapes.items()}
        leaves = [tensor.requires_grad_() for tensor in (rows, *weights.values())]
        y = apply_experts(rows, group_ends, ExpertWeights(**weights, **options))
        dy = torch.ones_like(y)
        dy[5:] = behind
        of_rows, *of_weights = torch.autograd.grad(y, leaves, dy)
        assert y[5:].eq(0).all()
        assert of_rows[5:].eq(0).all()
        assert all(grad[1].eq(0).all() and grad[0].ne(0).any() for grad in of_weights)
        found.append([y[:5], of_rows[:5], *of_weights])
    assert_same_bits(*found)


ROWS, WIDTH, BEHIND = 66, 37, 4
GROUP_ENDS = [3, 3, 40, 50, ROWS]
FLOATS = (torch.float32, torch.bfloat16)


KINDS = {
    **ACTIVATIONS,
    "gpt_oss": GPT_OSS,
    "tight": TIGHT,
    "alpha": Swiglu(alpha=0.5),
    "limit": Swiglu(limit=1.0),
    "offset": Swiglu(up_offset=-1.5),
}
EVERYDAY = [("gpt_oss", "interleaved"), ("tight", "concat"), ("tight", "split")]


def between(rank: Rank, name: str, layout: str, dtype: torch.dtype) -> SimpleNamespace:
    """Rows between the two products, NaN behind the valid ones: h, dA, and scores by slot.

    parts: h as kernels get it, one tensor, or two where the layout is "split".
    """
    generator, activation = torch.Generator().manual_seed(0), KINDS[name]

    def rows(width: int) -> Tensor:
        valid = torch.randn(ROWS, width, generator=generator, dtype=torch.float64)
        return torch.cat([valid, torch.full((BEHIND, width), NAN)]).to(rank.device, dtype)

    slots = torch.randperm(100, generator=generator)[:ROWS].to(rank.device)
    hidden, grad = rows(activation.up_width(WIDTH)), rows(WIDTH)
    scores = torch.rand(100, generator=generator).to(rank.device)
    group_ends = torch.tensor(GROUP_ENDS, dtype=torch.int32, device=rank.device)
    slot_of_row = torch.cat([slots, slots.new_full((BEHIND,), -1)]).int()
    sizes = {
        "experts_per_rank": len(GROUP_ENDS),
        "row_capacity": ROWS + BEHIND,
        "rank": 0,
        "max_tokens": 100,
        "top_k": 1,
    }
    plan = SimpleNamespace(group_ends=group_ends, slot_of_row=slot_of_row, **sizes)
    expert_of_row = torch.searchsorted(group_ends, torch.arange(ROWS, device=rank.device), right=True)
    of_rows = {"score_of_row": scores[slots].double()[:, None], "expert_of_row": expert_of_row}
    split, form = layout == "split", (activation, GATE_LAYOUTS["concat" if layout == "split" else layout])
    parts = [part.contiguous() for part in hidden.chunk(2, dim=1)] if split else [hidden]
    given = SimpleNamespace(hidden=hidden, parts=parts, grad=grad, scores=scores, plan=plan, form=form, **of_rows)
    two_ranks(given, 100)
    return given


def kernels_of(given: SimpleNamespace) -> Any:
    """The kernels for the form in which h is given."""
    from sonic_ep.fast.activation import activation_form

    first = given.parts[0]
    return activation_form(first.device, first.dtype, first.shape[1], len(given.parts), *given.form)


def two_ranks(given: SimpleNamespace, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Slots from ``max_tokens`` on are those of another rank: what both receive, 7 at first, and its addresses."""
    plan, device = given.plan, given.scores.device
    plan.max_tokens, plan.expert_ids = max_tokens, torch.empty(2, max_tokens, 1, device=device)
    received = torch.full((2, max_tokens), 7.0, device=device)
    return received, torch.tensor([of_rank.data_ptr() for of_rank in received], device=device)


def by_autograd(given: SimpleNamespace, dtype: torch.dtype) -> dict[str, Tensor]:
    """Activation and gradients in ``dtype``, by PyTorch."""
    hidden = given.hidden[:ROWS].to(dtype).requires_grad_()
    activation, layout = given.form
    activated = activation(hidden, layout)
    (hidden_grad,) = torch.autograd.grad(activated, hidden, (given.grad[:ROWS].double() * given.score_of_row).to(dtype))
    weighted = (activated.detach().double() * given.score_of_row).to(dtype)
    return {"activated": activated.detach(), "hidden": hidden_grad, "weighted": weighted}


@pytest.mark.fast
@on_ranks(1)
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, way, marks=() if name in ACTIVATIONS or (name, way) in EVERYDAY else pytest.mark.thorough)
        for name in KINDS
        for way in (*GATE_LAYOUTS, "split")
        if KINDS[name].gated or way != "split"
    ],
)
def test_activations_and_their_gradients_by_kernels(rank: Rank, name: str, layout: str) -> None:
    for dtype in (*FLOATS, torch.float16):
        given = between(rank, name, layout, dtype)
        truth, plain = by_autograd(given, torch.float64), by_autograd(given, dtype)
        kernels = kernels_of(given)
        activated = kernels.activate(given.parts, given.plan)
        found = kernels.gradient(given.parts, given.grad.clone(), given.scores, given.plan)
        got = {"activated": activated, "hidden": torch.cat(found.hidden, dim=1), "weighted": found.weighted}
        for what, rows in got.items():
            assert_as_accurate(rows[:ROWS], truth[what], plain[what], f"{what} of {name}, {dtype}")
        # Rows past the valid ones are not written, even where their values are finite.
        sevens = ([torch.full_like(part, 7.0) for part in given.parts], torch.full_like(given.grad, 7.0))
        weighted = kernels.gradient(*sevens, given.scores, given.plan).weighted
        assert weighted[ROWS:].eq(7).all()
        assert_near(found.dots[:ROWS], (given.grad[:ROWS].double() * truth["activated"]).sum(dim=1), 100)
        # The same numbers are pushed to other ranks' slots, if they are asked for.
        received, origins = two_ranks(given, 50)
        pushed = kernels.gradient(given.parts, given.grad.clone(), given.scores, given.plan, origins)
        assert_bitwise(pushed.dots[:ROWS], found.dots[:ROWS])
        assert_pushed(received, found.dots, given.plan)


@pytest.mark.fast
@on_ranks(1)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu", "relu", "relu_sq"])
def test_nan_and_the_ends_of_the_range(rank: Rank, name: str, dtype: torch.dtype) -> None:
    """NaN stays NaN and reaches no other number; the ends of the range have the limits of the activation."""
    given = between(rank, name, "concat", dtype)
    given.hidden[:ROWS, :5] = torch.tensor([NAN, -1e30, 1e4, -0.0, -1e4], device=rank.device).to(dtype)
    kernels = kernels_of(given)
    activated = kernels.activate([given.hidden], given.plan)[:ROWS]
    assert activated[:, 0].isnan().all()
    assert activated[:, [1, 3, 4]].eq(0).all()
    assert_bitwise(activated[:, 2], given.hidden[:ROWS, 2] ** (2 if name == "relu_sq" else 1))
    assert activated[:, 1:].isfinite().all()
    found = kernels.gradient([given.hidden], given.grad.clone(), given.scores, given.plan)
    assert found.hidden[0][:ROWS, 1:].isfinite().all()


@pytest.mark.fast
@on_ranks(1)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16], ids=str)
def test_limits_of_swiglu_are_those_of_the_reference(rank: Rank, dtype: torch.dtype) -> None:
    """At the limit, one step beyond and before, and at NaN and infinity, for every pair of gate and up."""
    # One limit that every dtype holds, and one that none does.
    for limit in (7.0, 0.1):
        at = torch.tensor(limit, dtype=dtype)
        steps = [at, at.nextafter(at * 2), at.nextafter(at * 0), at * 0, at / 8]
        ends = [torch.tensor(value, dtype=dtype) for value in (math.inf, NAN, torch.finfo(dtype).max / 64)]
        values = torch.stack([sign * value for value in (*steps, *ends) for sign in (1, -1)])
        # Each of the values, and the last again, for as many gates as there are columns.
        values = values[[*range(len(values)), *[-1] * (ROWS - len(values))]].to(rank.device)
        given = between(rank, "gpt_oss", "split", dtype)
        kind = Swiglu(alpha=1.702, limit=limit, up_offset=1.0)
        given.form = (kind, LAYOUT)
        gate, up = values[:, None].expand(ROWS, WIDTH), values[None, :WIDTH].expand(ROWS, WIDTH)
        for part, half in zip(given.parts, (gate, up), strict=True):
            part[:ROWS] = half
        given.grad[:ROWS] = 1
        given.scores[:] = 1
        leaf = torch.cat([gate, up], dim=1).clone().requires_grad_()
        expected = kind(leaf, LAYOUT)
        (expected_grad,) = torch.autograd.grad(expected, leaf, torch.ones_like(expected))
        kernels = kernels_of(given)
        found = kernels.activate(given.parts, given.plan)[:ROWS]
        grads = kernels.gradient(given.parts, given.grad, given.scores, given.plan).hidden
        got = torch.cat(grads, dim=1)[:ROWS]
        for one, other in ((found, expected.detach()), (got, expected_grad)):
            # Both are NaN, or zero, or infinite in the same places, and near elsewhere.
            assert_bitwise(one.isnan(), other.isnan())
            assert_bitwise(one.eq(0), other.eq(0))
            assert_bitwise(one.isinf(), other.isinf())
            finite = one.isfinite() & (one.abs() < 1e4)
            assert_near(one[finite], other[finite], 4)
        assert got[:, WIDTH:][2].ne(0).any()


@promise("fp32")
@pytest.mark.fast
@on_ranks(1)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sums_over_the_rows_of_experts(rank: Rank, dtype: torch.dtype) -> None:
    from sonic_ep.fast.experts import add_bias_dots, sum_groups

    given = between(rank, "relu", "concat", dtype)
    rows, expert = given.grad, given.expert_of_row
    member = (expert == torch.arange(len(GROUP_ENDS), device=rank.device)[:, None]).double()
    for scores, weight in ((None, 1.0), (given.scores, given.score_of_row)):
        sums, truth = sum_groups(rows, scores, given.plan), member @ (rows[:ROWS].double() * weight)
        assert_as_accurate(sums, truth, truth.to(dtype))
        assert sums[1].eq(0).all()
    bias = rows[: len(GROUP_ENDS)].clone()
    dots = torch.ones(ROWS + BEHIND, device=rank.device)
    received, origins = two_ranks(given, 95)
    add_bias_dots(rows, bias, dots, given.plan, origins)
    expected = (rows[:ROWS].double() * bias.double()[expert]).sum(dim=1) + 1
    assert_near(dots[:ROWS], expected, 100)
    assert dots[ROWS:].eq(1).all()
    if dtype == torch.float32:
        assert_bitwise(dots[:ROWS], expected.float())
    assert_pushed(received, dots, given.plan)


def assert_pushed(received: Tensor, values_R: Tensor, plan: SimpleNamespace) -> None:
    """To rank 1 came the values of its slots; nothing else was written. See ``two_ranks``."""
    expected = torch.full_like(received, 7.0)
    slots = plan.slot_of_row[:ROWS].long()
    theirs = slots >= plan.max_tokens
    assert 0 < int(theirs.sum()) < ROWS
    expected[1, slots[theirs] - plan.max_tokens] = values_R[:ROWS][theirs]
    assert_bitwise(received, expected)
