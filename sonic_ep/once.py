"""Backward functions that are not differentiable themselves, and say so; and what may be saved for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sonic_ep.precision import full_precision

Gradients = tuple[Tensor | None, ...]
HOST = torch.device("cpu")


def savable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was made in inference mode: such a one cannot be saved for backward."""
    return tensor.clone() if tensor.is_inference() else tensor


def in_memory(tensor: Tensor) -> Tensor:
    """Its values as kernels read them: not negated in name alone, and not zeros that are nowhere."""
    return tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg()


def as_kernels_read(tensor: Tensor) -> Tensor:
    """Contiguous, negated in memory and not in name, and fit to be saved for backward: a copy where it has to be."""
    held = in_memory(tensor).contiguous()
    return savable(held) if torch.is_grad_enabled() else held


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation would go through it. Outside of its levels the answer costs nothing."""
    # Written by PyTorch when a level begins or ends; what looks into a tensor takes ten times as long.
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def raise_if_freed(where: object, name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` if the storage of ``tensor`` is smaller than its view of it. ``where`` begins the message.

    FSDP frees the storage of a parameter between uses; tensors over that storage keep their shapes.
    """
    if tensor.numel() == 0:
        return
    last = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    if held < needed:
        raise ValueError(f"{where}: memory of {name}: got {held} bytes, expected at least {needed}: was it freed?")


def saved_by(ctx: Any, where: object, names: Sequence[str | None]) -> list[Any]:
    """``ctx.saved_tensors`` as kernels read them: a hook that unpacks them may lay out the same values otherwise.

    names: of the saved tensors, in order; None for one that backward does not read. Raises ``ValueError`` if the
    storage of one that has a name was freed after forward.
    """
    saved = ctx.saved_tensors
    for name, held in zip(names, saved, strict=True):
        if held is not None and name is not None:
            raise_if_freed(where, name, held)
    return [None if held is None else in_memory(held).contiguous() for held in saved]


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """A ``backward`` whose results cannot be differentiated again, in its turn: ``ctx.turn``, set in forward.

    Raises ``RuntimeError`` with ``create_graph=True``. PyTorch's decorator of this name refuses later, where a second
    derivative reaches the results: where autograd sees no way from them to what is asked for, it passes for zero.
    Raises ``NotImplementedError``, one of the same, for a gradient with a tangent.
    """

    @wraps(backward)
    def guarded(ctx: Any, *gradients: Tensor | None) -> Gradients:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "sonic_ep: got a backward with create_graph=True, expected one without: it is once_differentiable"
            )
        if any(found is not None and has_tangent(found) for found in gradients):
            raise NotImplementedError(
                "sonic_ep: got a gradient with a tangent of forward-mode differentiation, expected none: backward is "
                "once_differentiable"
            )
        device = next((found.device for found in gradients if found is not None), HOST)
        with ctx.turn.taken(begun=True), full_precision(device):
            return backward(ctx, *(None if found is None else in_memory(found) for found in gradients))

    return guarded
