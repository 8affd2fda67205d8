"""Helpers of autograd functions: backward once, autocast off, outside compilers and selective checkpointing."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, wraps
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from sonic_ep import compat

GivenP = ParamSpec("GivenP")
ResultT = TypeVar("ResultT")
Gradients = tuple[Tensor | None, ...]
# Importing the compiler takes seconds. Nothing is compiled before it has been imported.
COMPILER = "torch._dynamo"
# Nothing else in PyTorch splits a backward, and what that takes is a tenth of a call.
PIPELINING = "torch.distributed.pipelining"

NO_STRIDES: Mapping[str, tuple[int, ...]] = MappingProxyType({})

_disabled: Callable[[Any], Any] = cache(torch.compiler.disable)


def disable_autocast_in_backward(results: Iterable[Tensor], inputs: Iterable[Tensor | None]) -> None:
    """Turn autocast off in backward from ``results`` to ``inputs``, also for autograd's own nodes between them."""
    seen: set[Any] = {found.grad_fn for found in inputs if found is not None}
    ahead: list[Any] = [result.grad_fn for result in results if result.grad_fn is not None]
    while ahead:
        node = ahead.pop()
        if node in seen or type(node).__name__ == "AccumulateGrad":
            continue
        seen.add(node)
        _disable_autocast_in(node)
        ahead += [before for before, _ in node.next_functions if before is not None]


def _disable_autocast_in(node: Any) -> None:
    before: list[tuple[str, bool]] = []

    def enter(gradients: Gradients) -> None:
        kinds = {gradient.device.type for gradient in gradients if gradient is not None}
        before[:] = [(kind, torch.is_autocast_enabled(kind)) for kind in kinds]
        for kind, _ in before:
            torch.set_autocast_enabled(kind, False)

    def leave(found: object, given: object) -> None:
        for kind, enabled in before:
            torch.set_autocast_enabled(kind, enabled)

    node.register_prehook(enter)
    node.register_hook(leave)


def savable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one made in inference mode, which autograd cannot save."""
    return tensor.clone() if tensor.is_inference() else tensor


def joined(tensor: Tensor, world_size: int) -> Tensor:
    """The tensor, requiring a gradient if other ranks may go backward, so that this rank takes part in it."""
    if not torch.is_grad_enabled():
        return tensor
    tensor = savable(tensor)
    return tensor if world_size == 1 or tensor.requires_grad else tensor.detach().requires_grad_()


def materialized(tensor: Tensor) -> Tensor:
    """Its values in memory, as kernels read them: no negation by flag, no zeros without memory."""
    if compat.is_zero_without_memory(tensor):
        return tensor.clone()
    # PyTorch's dispatcher would take longer to find that there is nothing to do.
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def trained_as(tensor: Tensor, held: Tensor) -> Tensor:
    """``held``, the tensor or a copy of it, requiring a gradient as the tensor does.

    A copy made where gradients are off does not. Ranks compare what is trained, of which one may copy and another not;
    and reentrant checkpointing runs the first forward so.
    """
    return held.requires_grad_() if tensor.requires_grad and not held.requires_grad else held


def for_kernels(tensor: Tensor) -> Tensor:
    """Materialized, contiguous, and savable for backward: a copy where needed."""
    held = materialized(tensor).contiguous()
    return trained_as(tensor, savable(held) if torch.is_grad_enabled() else held)


def as_it_lies(tensor: Tensor) -> Tensor:
    """As ``for_kernels``, but of any strides with which no two elements share memory."""
    held = materialized(tensor)
    held = held.contiguous() if overlaps(held) else held
    return savable(held) if torch.is_grad_enabled() else held


def overlaps(tensor: Tensor) -> bool:
    """Whether elements may share memory, as those of an expanded tensor do.

    >>> overlaps(torch.zeros(3, 4)[:, ::2].t()), overlaps(torch.zeros(3, 1).expand(3, 4))
    (False, True)
    """
    if tensor.is_contiguous():
        return False
    reach = 1
    for stride, extent in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if extent > 1:
            if stride < reach:
                return True
            reach += (extent - 1) * stride
    return False


def is_transposed(weight_eFH: Tensor) -> bool:
    """Whether the columns of matrices, and not their rows, are contiguous: (e, H, F) was transposed to (e, F, H)."""
    return weight_eFH.stride(1) == 1 and weight_eFH.stride(2) != 1 and not weight_eFH.is_contiguous()


def bytes_reached(tensor: Tensor) -> int:
    """Bytes of memory from its first element to its last.

    >>> bytes_reached(torch.zeros(3, 4)), bytes_reached(torch.zeros(3, 4)[:, :1])
    (48, 36)
    """
    if tensor.is_contiguous():
        return tensor.nbytes
    reach = 1 + sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return reach * tensor.itemsize


def raise_if_freed(where: object, name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` if the storage of ``tensor`` was freed, as FSDP does between uses of a parameter."""
    if tensor.numel() == 0:
        return
    needed = tensor.storage_offset() * tensor.itemsize + bytes_reached(tensor)
    held = tensor.untyped_storage().nbytes()
    if held < needed:
        raise ValueError(f"{where}: memory of {name}: got {held} bytes, expected at least {needed}: was it freed?")


def unpack_saved(
    ctx: Any, where: object, names: Sequence[str], strides: Mapping[str, tuple[int, ...]] = NO_STRIDES
) -> list[Any]:
    """``ctx.saved_tensors``, materialized and contiguous: hooks may unpack them in another layout.

    names: in order. strides: of those that backward reads as they were saved, by name; they become contiguous only if
    they come back with others. Raises ``ValueError`` if one was freed.
    """
    found: list[Any] = list(ctx.saved_tensors)
    for place, held in enumerate(found):
        # Contiguous, with its values, in memory that is still there. No function a tensor: every backward asks.
        if held is None or (
            held.is_contiguous()
            and not (held.is_neg() or compat.is_zero_without_memory(held))
            and held.untyped_storage().nbytes() >= held.nbytes + held.storage_offset() * held.itemsize
        ):
            continue
        raise_if_freed(where, names[place], held)
        held = materialized(held)
        found[place] = held if held.stride() == strides.get(names[place]) else held.contiguous()
    return found


def in_halves(given: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The first and the second half: weights of up-projections, and their biases.

    >>> in_halves(["w_gate", "w_up", None, None])
    (['w_gate', 'w_up'], [None, None])
    """
    return given[: len(given) // 2], given[len(given) // 2 :]


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """A ``backward`` under ``ctx.call_lock``, set in forward, that refuses to be differentiated.

    Raises ``RuntimeError`` with ``create_graph=True``: PyTorch's decorator of this name refuses later, and not where
    autograd finds no path through the result. Raises ``NotImplementedError`` for a gradient with a tangent.
    """

    @wraps(backward)
    def guarded(ctx: Any, *gradients: Tensor | None) -> Gradients:
        if torch.is_grad_enabled():
            raise RuntimeError("sonic_ep: create_graph=True is not supported: backward is once_differentiable")
        if compat.in_forward_mode() and any(found is not None and compat.has_tangent(found) for found in gradients):
            raise NotImplementedError("sonic_ep: forward-mode differentiation: got a gradient with a tangent")
        with ctx.call_lock.begun_call:
            held = [None if found is None else materialized(found) for found in gradients]
            if not compat.any_autocast_enabled():
                return backward(ctx, *held)
            device = next((found.device for found in gradients if found is not None), torch.device("cpu"))
            with torch.autocast(device.type, enabled=False):
                return backward(ctx, *held)

    return guarded


def summed_together(gradients: Sequence[Tensor | None], add: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    """``add`` of the gradients (fp32), which are laid end to end for it and cut up again; None stays None."""
    parts = [gradient.flatten() for gradient in gradients if gradient is not None]
    if not parts:
        return list(gradients)
    total = add(parts[0] if len(parts) == 1 else torch.cat(parts))
    sums = iter(total.split([part.numel() for part in parts]))
    return [None if gradient is None else next(sums).view_as(gradient) for gradient in gradients]


def runs_eagerly(function: Callable[GivenP, ResultT]) -> Callable[GivenP, ResultT]:
    """``function``, hidden from ``torch.compile`` with all that it calls."""

    @wraps(function)
    def called(*arguments: GivenP.args, **options: GivenP.kwargs) -> ResultT:
        # Where the compiler reads this, or compiles frames as they begin.
        if COMPILER in sys.modules and (torch.compiler.is_compiling() or compat.compiles_frames() is not None):
            return cast(ResultT, _disabled(function)(*arguments, **options))
        return function(*arguments, **options)

    return called


def outside_selective_checkpoint(function: Callable[GivenP, ResultT]) -> Callable[GivenP, ResultT]:
    """``function``, hidden from the dispatch modes of selective activation checkpointing; other modes see it.

    In recompute such a mode returns what an operation gave in forward without running it: a collective would be
    skipped, a tag would be that of an earlier step, and a buffer written in place would stay unwritten.
    """

    @wraps(function)
    def called(*arguments: GivenP.args, **options: GivenP.kwargs) -> ResultT:
        if not compat.dispatch_modes_active():
            return function(*arguments, **options)
        with compat.without_dispatch_modes(compat.CHECKPOINT_MODES):
            return function(*arguments, **options)

    return called


def apply_function(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """``function.apply(*arguments)``, one tensor, whose backward ``torch.distributed.pipelining`` may split in two.

    Between the halves only the gradient and the node's Python object live. Before PyTorch 2.13 that object does not own
    the node ("_input_metadata is invalid"), so the gradient has to.
    """
    result: Tensor = compat.applied(function, *arguments)
    if compat.KEEPS_NODES or PIPELINING not in sys.modules or not result.requires_grad:
        return result
    return _kept_by_its_gradient(result)


def _kept_by_its_gradient(result: Tensor) -> Tensor:
    """``result`` behind one more node, whose hook attaches the edge of ``result`` to the gradient. Not a view.

    A hook on the function's own node would make the node hold itself, and it would never be freed.
    """
    gradient_edge = get_gradient_edge(result)
    passed_on: Tensor = torch.ops.aten._unsafe_view(result, result.shape)

    def keep(gradients: Gradients, _: object) -> None:
        # A view of the gradient that came in, which its owner may keep for longer than the graph.
        for gradient in gradients:
            if gradient is not None:
                gradient.sonic_ep_edge = gradient_edge  # type: ignore[attr-defined]

    assert passed_on.grad_fn is not None
    passed_on.grad_fn.register_hook(keep)
    return passed_on
