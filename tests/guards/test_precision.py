"""Autocast changes no bit, around a call or around its backward, and is on again for what is the caller's."""

import pytest
import torch
from backends import both_backends
from layer_inputs import layer_inputs
from on_ranks import on_ranks
from promises import promise

from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.testing import CASES, Case, Rank, assert_bitwise


@promise("autocast")
@pytest.mark.parametrize("case", [CASES["uniform_bf16"], CASES["uneven_tokens"]], ids=lambda case: case.name)
@both_backends
@on_ranks(1)
def test_autocast_changes_no_bit_forward_and_backward(rank: Rank, backend: str, case: Case) -> None:
    """Forward and backward under an autocast that would change every product; with backward alone in it, too."""
    x, weights, dy = layer_inputs(rank, case)
    lower = torch.float16 if case.dtype == torch.bfloat16 else torch.bfloat16
    for again in (False, True):
        with ExpertParallel(backend=backend, config=EPConfig(redispatch_x_in_backward=again)) as ep:
            y = ep.moe(x, *weights, case.top_k).y
            expected = [y.detach(), *torch.autograd.grad(y, [x, *weights], dy, retain_graph=True)]
            with torch.autocast(rank.device.type, dtype=lower):
                late = torch.autograd.grad(y, [x, *weights], dy)
                before = x * 1
                seen: list[bool] = []
                # It is on again for what is the caller's, in front of the layer and behind.
                before.register_hook(lambda grad, seen=seen: seen.append(torch.is_autocast_enabled(grad.device.type)))
                before.grad_fn.register_hook(
                    lambda *_, seen=seen: seen.append(torch.is_autocast_enabled(x.device.type))
                )
                within = ep.moe(before, *weights, case.top_k).y
                found = [within.detach(), *torch.autograd.grad(within, [x, *weights], dy)]
                assert seen == [True, True]
                assert torch.mm(x.detach(), x.detach().t()).dtype == lower
            for got, want in zip((*found, *late), (*expected, *expected[1:]), strict=True):
                assert_bitwise(got, want)
