"""No gradient and no result holds unwritten memory: fresh memory of these ranks reads as NaN."""

from dataclasses import replace

import pytest
import torch
from backends import both_backends
from layer_inputs import layer_inputs, routing_of
from matrix import DIAGONAL
from on_ranks import on_ranks
from promises import promise
from same import assert_same_bits
from there_and_back import Modes, by_modes
from torch import Tensor

from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.testing import CASES, Case, Rank, assert_bitwise, draw
from sonic_ep.testing.oracle import leaf, leaf_experts

FLAGS = [{}, {"redispatch_x_in_backward": True}, {"cpu_sync_on_runtime": True}, {"max_rows": 1000}]


def small(case: Case) -> Case:
    """The same kind of routing in few rows."""
    tokens = tuple(min(count, most) for count, most in zip((*case.tokens, *case.tokens), (4, 2), strict=False))
    return replace(case, tokens=tokens, hidden=8, intermediate=4, num_experts=8, top_k=2)


@promise("written")
@on_ranks(1, 2)
@both_backends
def test_rows_without_a_slot_have_the_gradient_zero(rank: Rank, backend: str) -> None:
    """One token of which one slot is dropped, so that one of two rows is valid."""
    with ExpertParallel(backend=backend) as ep:
        idx = torch.tensor([[0, -1]], device=rank.device)
        plan = ep.plan(idx[: 1 if rank.rank == 0 else 0], 2)
        tokens = plan.num_tokens
        rows = torch.ones(plan.row_capacity, 4, device=rank.device, requires_grad=True)
        scores = torch.ones(tokens, 2, device=rank.device, requires_grad=True)
        ep.combine(rows, scores, plan).sum().backward()
        expected = torch.zeros_like(rows)
        expected[: plan.rows()] = 1
        assert_bitwise(rows.grad, expected)
        assert scores.grad.tolist() == [[4.0, 0.0]] * tokens


def scaled_and_shifted(rank: Rank, case: Case, backend: str, config: EPConfig) -> list[Tensor]:
    """Gradients of a scale and a bias, whose sums run over invalid rows too."""
    idx, scores = routing_of(rank, case)
    x = layer_inputs(rank, case)[0]
    with ExpertParallel(backend=backend, config=config) as ep:
        plan = ep.plan(idx, case.num_experts)
        valid = torch.arange(plan.row_capacity, device=rank.device) < plan.group_ends[-1]
        scale, bias = (torch.full((case.hidden,), n, device=rank.device, requires_grad=True) for n in (2.0, 1.0))
        rows = torch.where(valid[:, None], ep.dispatch(x, plan), 0)
        with torch.autograd.detect_anomaly(check_nan=True):
            y = ep.combine(rows * scale + bias, scores, plan)
            return list(torch.autograd.grad(y.sum(), [scale, bias]))


@promise("written")
@on_ranks(1, 2)
@pytest.mark.fast
@by_modes
def test_sums_over_all_rows_are_those_of_the_reference(rank: Rank, modes: Modes) -> None:
    case, config = small(CASES["dropped_slots"]), EPConfig(dispatch=modes[0], combine=modes[1])
    found, expected = (scaled_and_shifted(rank, case, backend, config) for backend in ("fast", "reference"))
    assert all(want.isfinite().all() for want in expected)
    assert_same_bits(found, expected)


def assert_written(tensors: dict[str, Tensor | None], what: str) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            assert bool(tensor.isfinite().all()), f"{what}: {name} holds unwritten memory"


@promise("written")
@on_ranks(2)
@pytest.mark.parametrize("case", ["dropped_slots_bf16", "empty_experts", "zero_token_ranks", "no_tokens_at_all"])
@both_backends
def test_everything_handed_out_is_written(rank: Rank, backend: str, case: str) -> None:
    for number, flags in enumerate(FLAGS):
        dispatch, combine = DIAGONAL[number % len(DIAGONAL)]
        everything(rank, small(CASES[case]), backend, EPConfig(dispatch=dispatch, combine=combine, **flags))


def everything(rank: Rank, case: Case, backend: str, config: EPConfig) -> None:
    """Every tensor of calls and their backwards, but for rows of dispatch past the valid ones."""
    inputs = draw(case, rank.world_size, rank.device)
    idx, scores = routing_of(rank, case)
    held = leaf_experts(inputs.experts, inputs.experts_of(rank.rank))
    x, router_w, scores = leaf(inputs.x[inputs.tokens_of(rank.rank)]), leaf(inputs.router_w), leaf(scores)
    experts = {"w1": held.w1, "w2": held.w2, "b1": held.b1, "b2": held.b2}
    options = {"activation": case.activation, "gate_layout": case.gate_layout}

    def assert_gradients(loss: Tensor, leaves: dict[str, Tensor | None], what: str) -> None:
        wanted = {name: tensor for name, tensor in leaves.items() if tensor is not None}
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        assert_written(dict(zip(wanted, found, strict=True)), what)

    with ExpertParallel(backend=backend, config=config) as ep:
        out = ep.moe(x, router_w, top_k=case.top_k, **experts, **options)
        assert_written(out._asdict(), "moe")
        loss = out.y.float().sum() + out.router_logits.sum()
        assert_gradients(loss, {"x": x, "router_w": router_w, **experts}, "moe")
        y = ep.moe_routed(x, idx, scores, **experts, **options)
        assert_written({"y": y}, "moe_routed")
        assert_gradients(y.float().sum(), {"x": x, "scores": scores, **experts}, "moe_routed")
        plan = ep.plan(idx, case.num_experts)
        plan.check()
        rows = ep.dispatch(x, plan)
        assert_written({"rows": rows[: plan.rows()]}, "dispatch")
        assert_gradients(rows[: plan.rows()].float().sum(), {"x": x}, "dispatch")
        given = torch.zeros_like(rows).requires_grad_()
        y = ep.combine(given, scores, plan)
        assert_written({"y": y}, "combine")
        assert_gradients(y.float().sum(), {"rows": given, "scores": scores}, "combine")
