"""Decorators and helpers of autograd functions: backward once, autocast off, outside compilers and checkpointing."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import _pop_mode, _push_mode
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode


def autocast_disabled(device: torch.device) -> torch.autocast:
    """While this lasts, autocast is off for ``device``."""
    return torch.autocast(device.type, enabled=False)


def disable_autocast_in_backward(results: Iterable[Tensor], inputs: Iterable[Tensor | None]) -> None:
    """Autocast is off while the gradients of ``inputs`` are computed from those of ``results``.

    Autograd's own steps, those between the two, would follow one around the backward.
    """
    seen: set[Any] = {found.grad_fn for found in inputs if found is not None}
    ahead: list[Any] = [result.grad_fn for result in results if result.grad_fn is not None]
    while ahead:
        node = ahead.pop()
        # A leaf adds up what it is given.
        if node in seen or type(node).__name__ == "AccumulateGrad":
            continue
        seen.add(node)
        _keep(node)
        ahead += [before for before, _ in node.next_functions if before is not None]


def _keep(node: Any) -> None:
    before: list[tuple[str, bool]] = []

    def enter(gradients: tuple[Tensor | None, ...]) -> None:
        kinds = {gradient.device.type for gradient in gradients if gradient is not None}
        before[:] = [(kind, torch.is_autocast_enabled(kind)) for kind in kinds]
        for kind, _ in before:
            torch.set_autocast_enabled(kind, False)

    def leave(found: object, given: object) -> None:
        for kind, enabled in before:
            torch.set_autocast_enabled(kind, enabled)

    node.register_prehook(enter)
    node.register_hook(leave)


Gradients = tuple[Tensor | None, ...]
HOST = torch.device("cpu")


def savable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was made in inference mode: such a one cannot be saved for backward."""
    return tensor.clone() if tensor.is_inference() else tensor


def materialized(tensor: Tensor) -> Tensor:
    """Its values as kernels read them: not negated in name alone, and not zeros that are nowhere."""
    return tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg()


def for_kernels(tensor: Tensor) -> Tensor:
    """Contiguous, negated in memory and not in name, and fit to be saved for backward: a copy where it has to be."""
    held = materialized(tensor).contiguous()
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


def unpack_saved(ctx: Any, where: object, names: Sequence[str | None]) -> list[Any]:
    """``ctx.saved_tensors`` as kernels read them: a hook that unpacks them may lay out the same values otherwise.

    names: of the saved tensors, in order; None for one that backward does not read. Raises ``ValueError`` if the
    storage of one that has a name was freed after forward.
    """
    saved = ctx.saved_tensors
    for name, held in zip(names, saved, strict=True):
        if held is not None and name is not None:
            raise_if_freed(where, name, held)
    return [None if held is None else materialized(held).contiguous() for held in saved]


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """A ``backward`` whose results cannot be differentiated again, in its turn: ``ctx.call_lock``, set in forward.

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
        with ctx.call_lock.taken(begun=True), autocast_disabled(device):
            return backward(ctx, *(None if found is None else materialized(found) for found in gradients))

    return guarded


GivenP = ParamSpec("GivenP")
ResultT = TypeVar("ResultT")

# Its compiler, which takes a second or two to import. Who has not imported it cannot be compiling.
COMPILER = "torch._dynamo"
# The modes of selective activation checkpointing, in forward and in recompute.
REPLAYING = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)

_disabled: Callable[[Any], Any] = cache(torch.compiler.disable)


def runs_eagerly(function: Callable[GivenP, ResultT]) -> Callable[GivenP, ResultT]:
    """``function``, which a compiler neither looks into nor into what it calls."""

    @wraps(function)
    def called(*arguments: GivenP.args, **options: GivenP.kwargs) -> ResultT:
        if COMPILER in sys.modules:
            return cast(ResultT, _disabled(function)(*arguments, **options))
        return function(*arguments, **options)

    return called


def outside_selective_checkpoint(function: Callable[GivenP, ResultT]) -> Callable[GivenP, ResultT]:
    """``function``, with its operations hidden from the dispatch modes of selective activation checkpointing.

    In recompute such a mode returns what an operation gave in forward without running it: a collective would not take
    place, a tag would be that of an earlier step, and a buffer that is written in place would stay unwritten. Modes
    that only watch, as those that count operations or memory, see everything.
    """

    @wraps(function)
    def called(*arguments: GivenP.args, **options: GivenP.kwargs) -> ResultT:
        # Usually no mode is active.
        if torch._C._len_torch_dispatch_stack() == 0:
            return function(*arguments, **options)
        with _without_replay():
            return function(*arguments, **options)

    return called


@contextmanager
def _without_replay() -> Iterator[None]:
    """While this lasts, none of the active dispatch modes is one of selective checkpointing."""
    before = [_pop_mode() for _ in range(torch._C._len_torch_dispatch_stack())]
    for mode in reversed(before):
        if not isinstance(mode, REPLAYING):
            _push_mode(mode)
    try:
        yield
    finally:
        while torch._C._len_torch_dispatch_stack():
            _pop_mode()
        for mode in reversed(before):
            _push_mode(mode)


# From this release on, PyTorch keeps the node of a Python autograd function alive between the two halves.
KEPT_SINCE = (2, 13)


def release_of(version: str) -> tuple[int, ...]:
    """Major and minor number.

    >>> release_of("2.11.0+cu130"), release_of("2.13.0a0+git1")
    ((2, 11), (2, 13))
    """
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


KEEPS_NODES = release_of(torch.__version__) >= KEPT_SINCE


def apply_function(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """``function.apply(*arguments)``, one tensor, whose backward ``torch.distributed.pipelining`` may split in two.

    Between the halves that keeps the gradient of the result and the Python object of the node. Up to PyTorch 2.12 the
    object does not own the node itself ("_input_metadata is invalid"), so the gradient has to.
    """
    result: Tensor = function.apply(*arguments)
    return result if KEEPS_NODES or not result.requires_grad else _kept_by_its_gradient(result)


@outside_selective_checkpoint
def _kept_by_its_gradient(result: Tensor) -> Tensor:
    """``result`` behind one more node, whose hook attaches the edge of ``result`` to the gradient. Not a view.

    A hook on the function's own node would make the node hold itself, and it would never be freed.
    """
    gradient_edge = get_gradient_edge(result)
    passed_on: Tensor = torch.ops.aten._unsafe_view(result, result.shape)

    def keep(gradients: tuple[Tensor | None, ...], _: object) -> None:
        # A view of the gradient that came in, which its owner may keep for longer than the graph.
        for gradient in gradients:
            if gradient is not None:
                gradient.sonic_ep_edge = gradient_edge  # type: ignore[attr-defined]

    assert passed_on.grad_fn is not None
    passed_on.grad_fn.register_hook(keep)
    return passed_on
