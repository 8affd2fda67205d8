"""What an operator is: an eager call whose saved tensors travel as the memory of one small tensor.

An operator makes the eager call, with its bits, checks and errors. Besides the results it returns ``graph``, (1,) int64
on the CPU: its memory owns what autograd saved in the call, and frees it with the last tensor that has this memory.
``sonic_ep::backward`` turns ``graph`` and gradients of the results into gradients of the inputs. So compilers see
tensors whose shapes follow from those of the inputs, and nothing of a backend.
"""

import itertools
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from sonic_ep import compat
from sonic_ep.autograd_utils import runs_eagerly
from sonic_ep.plan import recompute_error

GivenP = ParamSpec("GivenP")
ResultT = TypeVar("ResultT")
# The arguments of an operator by name.
Given = Mapping[str, Any]

_numbers = itertools.count()
_callables: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_owners: weakref.WeakValueDictionary[int, "Owner"] = weakref.WeakValueDictionary()


def register(ep: object) -> str:
    """The name by which operators find ``ep`` while it lives: "ep0", "ep1", ... in the order of construction."""
    name = f"ep{next(_numbers)}"
    _callables[name] = ep
    return name


def registered(name: str) -> Any:
    """The ``ExpertParallel`` of this name."""
    ep = _callables.get(name)
    if ep is None:
        expected = "expected an ExpertParallel that is alive: epN is the N-th that this process made, from 0"
        raise ValueError(f"torch.ops.sonic_ep: ep: got {name!r}, {expected}")
    return ep


class Owner(bytearray):
    """An object as the memory of a tensor, whose address leads back to it. owned: the object."""

    owned: Any

    @staticmethod
    def tensor_of(owned: object) -> Tensor:
        """(1,) int64 on the CPU, zero, whose memory owns the object."""
        owner = Owner(8)
        owner.owned = owned
        tensor = torch.frombuffer(owner, dtype=torch.int64)
        _owners[tensor.data_ptr()] = owner
        return tensor

    @staticmethod
    def owned_by(tensor: Tensor) -> Any:
        """The object of a tensor that ``tensor_of`` made."""
        owner = _owners.get(tensor.data_ptr())
        if owner is None:
            got = "got a copy, expected the tensor that a call returned: hooks on saved tensors must not copy it"
            raise RuntimeError(f"torch.ops.sonic_ep: graph: {got}")
        return owner.owned

    @staticmethod
    def fake() -> Tensor:
        """What ``tensor_of`` returns, without values."""
        return torch.empty(1, dtype=torch.int64, device="cpu")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Graph:
    """What a call saved for backward.

    leaves: what backward computes gradients of. edges: where the gradient of each result enters, or None. expert_ids:
    of the plan, (W, C, K). group, step: of the call.
    """

    leaves: list[Tensor]
    edges: list[GradientEdge | None]
    expert_ids: Tensor
    group: object
    step: int


def tensors_of(arguments: Sequence[Any]) -> list[Tensor]:
    """All tensors, those of lists included, in order."""
    flat = itertools.chain.from_iterable(given if isinstance(given, list) else [given] for given in arguments)
    return [given for given in flat if isinstance(given, Tensor)]


def _is_list_of_tensors(given: object) -> bool:
    return isinstance(given, list) and all(isinstance(item, Tensor) for item in given)


def _in_place_of_tensors(arguments: Sequence[Any], values: Iterator[Any], other: Callable[[Any], Any]) -> list[Any]:
    """The arguments, with the next value for each tensor, also in lists, and ``other(argument)`` for the rest."""

    def replaced(given: Any) -> Any:
        if _is_list_of_tensors(given):
            return [next(values) for _ in given]
        return next(values) if isinstance(given, Tensor) else other(given)

    return [replaced(given) for given in arguments]


@dataclass(frozen=True, kw_only=True, eq=False)
class Operator:
    """An operator that makes a call. run: from its arguments, the results, then ``expert_ids``. fake: the results.

    saved: the arguments that backward may read, and that a compiler may overwrite before: it does not know that they
    are saved. Weights are not copied.
    """

    name: str
    schema: str
    saved: tuple[str, ...]
    run: Callable[[Any, Given], tuple[Tensor, ...]]
    fake: Callable[[Given], tuple[Tensor, ...]]

    def define(self) -> None:
        """Make ``torch.ops.sonic_ep.<name>``."""
        made = torch.library.custom_op(f"sonic_ep::{self.name}", self._call, mutates_args=(), schema=self.schema)
        made.register_fake(self._fake)
        made.register_autograd(_gradients, setup_context=_save)

    def _given(self, arguments: Sequence[Any]) -> Given:
        names = re.findall(r"(\w+)(?=[,)])", self.schema.split("->")[0])
        return dict(zip(names, arguments, strict=True))

    def _call(self, *arguments: Any) -> tuple[Tensor, ...]:
        given = self._given(arguments)
        ep, trained = registered(given["ep"]), given["trained"]
        if any(trained) and not compat.selective_checkpoint_active():
            arguments = tuple(value.clone() if name in self.saved else value for name, value in given.items())
        tensors = tensors_of(arguments)
        autocast = torch.autocast(tensors[0].device.type, enabled=given["autocast"])
        with compat.autograd_in_operator(), torch.set_grad_enabled(any(trained)), autocast:
            pairs = zip(tensors, trained, strict=True)
            leaves = [tensor.detach().requires_grad_(needed) for tensor, needed in pairs]
            of_leaves = self._given(_in_place_of_tensors(arguments, iter(leaves), lambda other: other))
            *results, expert_ids = self.run(ep, of_leaves)
            edges = [get_gradient_edge(result) if result.requires_grad else None for result in results]
        of_call = {"expert_ids": expert_ids, "group": ep.group, "step": ep.steps}
        graph = _Graph(leaves=[leaf for leaf in leaves if leaf.requires_grad], edges=edges, **of_call)
        # Backward reads the others again, and who has them may overwrite them.
        y, *others = (result.detach() for result in results)
        return (y.contiguous(), *(other.clone().contiguous() for other in others), Owner.tensor_of(graph))

    def _fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        return (*self.fake(self._given(arguments)), Owner.fake())


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """``graph``, and the inputs whose gradients are needed, for the form of these."""
    ctx.set_materialize_grads(False)
    ctx.trained, graph = inputs[-1], output[-1]
    like = (tensor for tensor, needed in zip(tensors_of(inputs), ctx.trained, strict=True) if needed)
    ctx.save_for_backward(graph, *like)
    ctx.places = _in_place_of_tensors(inputs, itertools.repeat(True), lambda _: None)
    # A recompute brings another graph, whose routing has to be this one's.
    ctx.expert_ids = Owner.owned_by(graph).expert_ids if compat.selective_checkpoint_active() else None


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Of each input, as it was given: a tensor, a list of tensors, or None."""
    if torch.is_grad_enabled():
        raise RuntimeError("sonic_ep: create_graph=True is not supported: backward is once_differentiable")
    graph, *like = ctx.saved_tensors
    found = iter(torch.ops.sonic_ep.backward(graph, grads[:-1], like, ctx.expert_ids))
    of_tensors = iter([next(found) if needed else None for needed in ctx.trained])
    return tuple(
        [next(of_tensors) for _ in place] if isinstance(place, list) else next(of_tensors) if place else None
        for place in ctx.places
    )


def _backward(graph: Tensor, grads: Sequence[Any], like: Sequence[Tensor], expert_ids: Tensor | None) -> list[Tensor]:
    """Gradients with the form of ``like``; zeros where the results do not depend on an input."""
    held: _Graph = Owner.owned_by(graph)
    _raise_if_rerouted(held, expert_ids)
    entering = [(edge, grad) for edge, grad in zip(held.edges, grads, strict=True) if edge and grad is not None]
    if not entering:
        return [_with_form(None, form) for form in like]
    edges, given = zip(*entering, strict=True)
    # The graph is freed with its tensor, so that a caller may keep his for a second backward.
    with compat.autograd_in_operator():
        found = torch.autograd.grad(edges, held.leaves, given, retain_graph=True, allow_unused=True)
    return [_with_form(grad, form) for grad, form in zip(found, like, strict=True)]


def _backward_fake(graph: Tensor, grads: object, like: Sequence[Tensor], expert_ids: object) -> list[Tensor]:
    return [torch.empty_like(form) for form in like]


def _raise_if_rerouted(recomputed: _Graph, before: Tensor | None) -> None:
    """Raise ``RecomputeError``, on all ranks alike, if selective checkpointing ran forward again with other ids."""
    again = recomputed.expert_ids
    if before is None or before.data_ptr() == again.data_ptr():
        return
    capturing = again.is_cuda and torch.cuda.is_current_stream_capturing()
    if not capturing and not torch.equal(before, again):
        raise recompute_error(recomputed.group, recomputed.step)


def flags_of(arguments: Sequence[Any]) -> list[Any]:
    """The last two arguments of a call's operator: whether autocast is on, and which tensors require a gradient."""
    tensors = tensors_of(arguments)
    trained = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
    return [torch.is_autocast_enabled(tensors[0].device.type), trained]


def _owns_memory(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _with_form(grad: Tensor | None, form: Tensor) -> Tensor:
    """The gradient with the strides of ``form``, in memory of its own, as an operator has to return it."""
    held = torch.empty_like(form)
    if grad is None:
        return held.zero_()
    return grad if _owns_memory(grad) and grad.stride() == held.stride() else held.copy_(grad)


_BACKWARD = "(Tensor graph, Tensor?[] grads, Tensor[] like, Tensor? expert_ids) -> Tensor[]"
torch.library.custom_op("sonic_ep::backward", _backward, mutates_args=(), schema=_BACKWARD).register_fake(
    _backward_fake
)


def by_operator(
    operator: Callable[..., Any],
) -> Callable[[Callable[GivenP, tuple[ResultT, Tensor]]], Callable[GivenP, ResultT]]:
    """A method, of which ``operator`` takes the calls that are traced or under selective checkpointing.

    The method returns its result and the plan's ``expert_ids``; callers get the result, operators both (``with_ids``).
    """

    def decorated(method: Callable[GivenP, tuple[ResultT, Tensor]]) -> Callable[GivenP, ResultT]:
        eagerly = runs_eagerly(method)

        @wraps(method)
        def called(*given: GivenP.args, **options: GivenP.kwargs) -> ResultT:
            if torch.compiler.is_compiling() or compat.sees_operators():
                return cast(ResultT, operator(*given, **options))
            return eagerly(*given, **options)[0]

        called.with_ids = eagerly  # type: ignore[attr-defined]
        return called

    return decorated
