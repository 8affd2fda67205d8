"""Weights as they lie: no copy of one, whatever its strides; gradients that lie as it does; casts under autocast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import both_backends
from edge_calls import whole
from hostile import shifted
from layer_inputs import routing_of
from on_ranks import on_ranks
from promises import promise
from same import assert_same_bits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sonic_ep import Activation, EPConfig, ExpertParallel, expert_checks
from sonic_ep.autograd_utils import as_it_lies, is_transposed
from sonic_ep.testing import CASES, Case, Rank, assert_bitwise, verify_routed
from sonic_ep.testing.cases import GPT_OSS, draw, transposed
from sonic_ep.testing.oracle import RoutedCall, routed_call

CASE = replace(CASES["uniform_bf16"], tokens=(5,), hidden=40, intermediate=24, num_experts=4, activation=GPT_OSS)
FORMS = ("whole", "transposed", "split")
by_form = pytest.mark.parametrize("form", FORMS)
by_again = pytest.mark.parametrize("again", [False, True], ids=["x kept", "x dispatched again"])


class Copies(TorchDispatchMode):
    """Sizes of the tensors that operations have copied in the same dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy):
            source = args[1] if func.overloadpacket is torch.ops.aten.copy_ else args[0]
            if source.dtype == out.dtype:
                self.sizes.add(out.numel())
        return out


@promise("uncopied-weights")
@on_ranks(1)
@by_again
@by_form
@both_backends
def test_no_weight_is_copied_and_its_gradient_lies_as_it_does(rank: Rank, backend: str, form: str, again: bool) -> None:
    call = routed_call(draw(replace(CASE, form=form), 1, rank.device), 0)
    weights = {name: weight for name, weight in call.weights.items() if name[0] == "w"}
    of_weights = {weight.numel() for weight in weights.values()}
    assert not of_weights & {tensor.numel() for tensor in (call.x, call.topk_scores)}
    assert any(is_transposed(weight) for weight in weights.values()) == (form != "whole")
    with ExpertParallel(backend=backend, config=EPConfig(redispatch_x_in_backward=again)) as ep:
        call.forward(ep)
        with Copies() as copies:
            call.forward(ep)["y"].backward(call.dy)
    # That copies are seen is tested below: on a GPU there may be none at all.
    assert not copies.sizes & of_weights
    for name, weight in weights.items():
        assert weight.grad is not None
        assert weight.grad.stride() == weight.stride(), name


@on_ranks(1)
@by_again
@both_backends
def test_one_half_of_a_split_weight_may_be_frozen(rank: Rank, backend: str, again: bool) -> None:
    """The other has the gradient that it has beside it."""
    call = routed_call(draw(replace(CASE, form="split"), 1, rank.device), 0)
    halves = [call.weights[name] for name in ("w1[0]", "w1[1]")]
    with ExpertParallel(backend=backend, config=EPConfig(redispatch_x_in_backward=again)) as ep:
        expected = torch.autograd.grad(call.forward(ep)["y"], halves, call.dy)
        for place, half in enumerate(halves):
            halves[1 - place].requires_grad_(False)
            assert_bitwise(*torch.autograd.grad(call.forward(ep)["y"], half, call.dy), expected[place])
            halves[1 - place].requires_grad_()


@on_ranks(1)
def test_a_stride_that_int32_cannot_count_in_a_tile_is_copied(rank: Rank) -> None:
    """256 rows of a tile times the stride: an offset of 2^31 and more."""
    far = 2**23 + 2**17
    weight = torch.empty_strided((1, 2, 4), (2 * far, far, 1), device="meta")
    near = torch.empty_strided((1, 2, 4), (64, 32, 1), device="meta")
    kept = [expert_checks._weight_as_read("w1", one, torch.float32) is one for one in (weight, near)]
    assert kept == [False, True]


@on_ranks(1)
def test_a_copy_of_a_weight_would_be_seen(rank: Rank) -> None:
    weight = torch.zeros(2, 3, 4, device=rank.device)
    with Copies() as copies:
        as_it_lies(weight.mT)
        assert copies.sizes == set()
        as_it_lies(weight[:1].expand(2, 3, 4))
        assert copies.sizes == {24}


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "transposed": lambda tensor: transposed(tensor) if tensor.ndim == 3 else tensor,
    "at an odd address": shifted,
    "every other": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
}


@on_ranks(1)
@by_again
@both_backends
def test_hooks_may_unpack_saved_weights_in_any_layout(rank: Rank, backend: str, again: bool) -> None:
    """Whole numbers, so that no order of summation changes a bit."""
    shapes = {"x": (5, 8), "w1[0]": (4, 16, 8), "w1[1]": (4, 16, 8), "w2": (4, 8, 16)}
    idx = (torch.arange(10).view(5, 2) % 4).to(rank.device)
    scores = torch.ones(5, 2, device=rank.device)
    with ExpertParallel(backend=backend, config=EPConfig(redispatch_x_in_backward=again)) as ep:
        expected: list[Tensor] | None = None
        for held in (torch.clone, transposed):
            values = {name: whole(shape, seed).to(rank.device) for seed, (name, shape) in enumerate(shapes.items())}
            leaves = [(held(t) if t.ndim == 3 else t).requires_grad_() for t in values.values()]
            x, gate, up, w2 = leaves
            for unpack in LAYOUTS.values():
                with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
                    y = ep.moe_routed(x, idx, scores, (gate, up), w2, activation="reglu")
                found = [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]
                expected = expected or found
                assert_same_bits([t + 0 for t in found], [t + 0 for t in expected])


def cast_call(call: RoutedCall, dtype: torch.dtype) -> tuple[dict[str, Any], list[Tensor]]:
    """Arguments with weights in ``dtype``, fp32 leaves of the same values, and the leaves."""
    weights = {name: weight.detach().float().requires_grad_() for name, weight in call.weights.items()}
    given = call.experts.with_tensors({name: weight.to(dtype) for name, weight in weights.items()})
    arguments = {**replace(call, experts=given).arguments, "topk_idx": call.topk_idx, "topk_scores": call.topk_scores}
    return arguments, [call.x, *weights.values()]


@promise("autocast")
@on_ranks(1)
@pytest.mark.parametrize("again", [pytest.param(False, marks=pytest.mark.thorough), True])
@pytest.mark.parametrize("form", FORMS[1:])
@both_backends
def test_fp32_weights_under_autocast_are_those_cast_by_the_caller(
    rank: Rank, backend: str, form: str, again: bool
) -> None:
    """Bit for bit, with gradients in fp32; not in other cases."""
    call = routed_call(draw(replace(CASE, form=form), 1, rank.device), 0)
    found = []
    with ExpertParallel(backend=backend, config=EPConfig(redispatch_x_in_backward=again)) as ep:
        for dtype in (torch.float32, torch.bfloat16):
            arguments, leaves = cast_call(call, dtype)
            with torch.autocast(rank.device.type, dtype=torch.bfloat16):
                y = ep.moe_routed(**arguments)
            grads = torch.autograd.grad(y, leaves, call.dy)
            assert [grad.dtype for grad in grads] == [torch.bfloat16] + [torch.float32] * (len(leaves) - 1)
            found.append([y.detach(), *grads])
            with torch.no_grad(), torch.autocast(rank.device.type, dtype=torch.bfloat16):
                assert_same_bits([ep.moe_routed(**arguments)], [y.detach()])
        assert_same_bits(*found)
        arguments, _ = cast_call(call, torch.float32)
        said = r"dtype of x: got torch.bfloat16, expected torch.float32, as w1.*, w2: pass x.to"
        with pytest.raises(ValueError, match=said):
            ep.moe_routed(**arguments)
        arguments, _ = cast_call(call, torch.float16)
        said = r"dtype of x: got torch.bfloat16, expected torch.float16, as w1.*, w2: pass x.to"
        with torch.autocast(rank.device.type), pytest.raises(ValueError, match=said):
            ep.moe_routed(**arguments)
        wide = {"x": call.x.detach().float(), "topk_scores": call.topk_scores.detach()}
        with (
            torch.autocast(rank.device.type),
            pytest.raises(ValueError, match=r"got torch\.float32, expected torch\.float16"),
        ):
            ep.moe_routed(**{**arguments, **wide})


MISH = Activation(name="mish", gated=True, pointwise=F.mish)


@promise("accuracy")
@on_ranks(2)
@pytest.mark.parametrize("form", ["whole", "split"])
def test_an_activation_of_ones_own_runs_on_the_reference(rank: Rank, form: str) -> None:
    case = replace(CASES["uneven_tokens"], activation=MISH, form=form)
    with ExpertParallel(backend="reference", config=EPConfig(redispatch_x_in_backward=True)) as ep:
        assert not (wrong := [str(found) for found in verify_routed(case, ep, rank.device) if not found.ok]), wrong


@promise("arguments")
@on_ranks(2)
def test_an_activation_without_a_kernel_is_refused_before_any_communication(rank: Rank) -> None:
    case: Case = CASES["uniform"]
    inputs = draw(case, rank.world_size, rank.device)
    idx, scores = routing_of(rank, case)
    experts = routed_call(inputs, rank.rank).experts
    x, weights = inputs.x[inputs.tokens_of(rank.rank)], (experts.w1, experts.w2)
    with ExpertParallel(backend="fast") as ep:
        # One that has but the name of one with a kernel is no better.
        for kind in (MISH, replace(MISH, name="swiglu")):
            expected = rf"activation: got '{kind.name}', a custom Activation, expected .*'geglu'.*Swiglu"
            for refused in (
                lambda: ep.moe_routed(x, idx, scores, *weights, activation=kind),  # noqa: B023
                lambda: ep.moe(x, inputs.router_w, *weights, 2, activation=kind),  # noqa: B023
            ):
                with pytest.raises(ValueError, match=rf"^{ep.group}: {expected}.*backend='reference' takes any"):
                    refused()
        assert ep._collectives._begun == 0
        assert ep.moe_routed(x, idx, scores, *weights).isfinite().all()
