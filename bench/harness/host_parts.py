"""What a layer's calls are made of on the host: PyTorch's own operations and one launch, each alone.

Their host times, times how many of them a call makes (``tests/distributed/test_call_counts.py`` holds that), are what a
call would take if nothing else ran on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sonic_ep.profiler.problem import Shape

ALLOCATION, LAUNCH, PRODUCT = "one tensor's memory", "one launch of a kernel", "one product of the router"
GROUPED, AUTOGRAD = "one grouped product", "three autograd functions, forward and backward"


class Passed(torch.autograd.Function):
    """An input to itself; saves another, as functions of the layer do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, saved: Tensor) -> Tensor:
        """X of any shape."""
        ctx.save_for_backward(saved)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Its gradient, and none of what was saved."""
        assert len(ctx.saved_tensors) == 1
        return grad, None


def host_parts(shape: Shape, device: torch.device) -> Mapping[str, Callable[[], object]]:
    """By name, in bf16 at the sizes of one rank: H and K of ``shape``, E experts here."""
    # Not at the top: it needs triton, which the reference does without.
    from sonic_ep.fast.all_reduce import BLOCK, sum_parts_kernel
    from sonic_ep.fast.gemm import grouped_gemm
    from sonic_ep.fast.launch import Launcher
    from sonic_ep.fast.router import product

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device).bfloat16()

    x, router_w = drawn(shape.tokens, shape.hidden), drawn(shape.num_experts, shape.hidden)
    rows, weight = drawn(shape.tokens * shape.top_k, shape.hidden), drawn(shape.num_experts, shape.hidden, shape.hidden)
    ends = torch.arange(1, shape.num_experts + 1, dtype=torch.int32, device=device) * (len(rows) // shape.num_experts)
    gemm = grouped_gemm((rows, weight))
    run = Launcher(sum_parts_kernel, device, {"NUMEL": BLOCK, "PARTS": 1, "BLOCK": BLOCK})
    numbers, total = torch.zeros(BLOCK, device=device), torch.empty(BLOCK, device=device)
    trained, grad = drawn(shape.tokens, shape.hidden).requires_grad_(), drawn(shape.tokens, shape.hidden)

    def through_autograd() -> None:
        with torch.enable_grad():
            out = trained
            for _ in range(3):
                out = Passed.apply(out, router_w)
            out.backward(grad)
        trained.grad = None

    return {
        ALLOCATION: partial(x.new_empty, (shape.tokens, shape.hidden)),
        LAUNCH: partial(run, (1,), numbers, total),
        PRODUCT: lambda: product(x, router_w.t(), torch.float32),
        GROUPED: partial(gemm.rows, rows, weight, ends),
        AUTOGRAD: through_autograd,
    }
