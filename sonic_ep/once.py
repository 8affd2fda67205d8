"""Backward functions that are not differentiable themselves, and say so; and what may be saved for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from sonic_ep.precision import full_precision

Gradients = tuple[Tensor | None, ...]
HOST = torch.device("cpu")


def savable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was made in inference mode: such a one cannot be saved for backward."""
    return tensor.clone() if tensor.is_inference() else tensor


class Refusal(torch.autograd.Function):
    """Passes tensors on, and raises where a derivative through them is asked for."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors; ``anchor`` requires a gradient, so that they do."""
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        """Raises ``RuntimeError``."""
        raise RuntimeError("sonic_ep: trying to differentiate twice a function that is once_differentiable")


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """A ``backward`` whose results cannot be differentiated again, in its turn: ``ctx.turn``, set in forward.

    PyTorch's decorator of this name lets them pass for constants where the incoming gradient requires none itself.
    """

    @wraps(backward)
    def guarded(ctx: Any, *gradients: Tensor | None) -> Gradients:
        device = next((found.device for found in gradients if found is not None), HOST)
        with ctx.turn.taken(begun=True), torch.no_grad(), full_precision(device):
            # Kernels read what stands in memory: what is negated in name alone would have the wrong sign.
            results = backward(ctx, *(None if found is None else found.resolve_neg() for found in gradients))
        present = [result for result in results if result is not None]
        if not torch.is_grad_enabled() or not present:
            return results
        refusing = iter(Refusal.apply(torch.zeros((), requires_grad=True), *present))
        return tuple(None if result is None else next(refusing) for result in results)

    return guarded
