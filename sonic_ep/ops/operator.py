"""What an operator is: an eager call whose saved tensors travel as the memory of one small tensor.

An operator makes the eager call, with its bits, checks and errors. Besides the results it returns ``graph``, (1,) int64
on the CPU: its memory owns what autograd saved in the call, and frees it with the last tensor that has this memory.
``sonic_ep::backward`` turns ``graph``, the inputs and gradients of the results into gradients of the inputs. So
compilers see tensors alone, and nothing of a backend.
"""

import itertools
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

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


def registered_now() -> list[Any]:
    """Every ``ExpertParallel`` of this process that is alive."""
    return list(_callables.values())


class Owner(bytearray):
    """Memory of a tensor that keeps an object alive; the tensor's address finds it. owned: the object."""

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


@dataclass(frozen=True, kw_only=True)
class _OfInput:
    """A saved tensor that is part of an input. place: of the input. offset: of its first element, from the input's."""

    place: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Inputs:
    """The inputs of a call, which its graph does not keep: backward gets them again.

    The graph may not keep them: a compiler does not know that it reads them, and uses their memory for something else.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._strides = [tensor.stride() for tensor in tensors]
        self._tensors = list(tensors)

    def pack(self, saved: Tensor) -> Tensor | _OfInput:
        """What the graph keeps in place of a tensor that it saves."""
        memory = saved.untyped_storage().data_ptr() if saved.numel() else 0
        for place, tensor in enumerate(self._tensors):
            if memory and tensor.untyped_storage().data_ptr() == memory and _begins_in(tensor, saved):
                offset = int(saved.storage_offset() - tensor.storage_offset())
                return _OfInput(place=place, size=saved.size(), stride=saved.stride(), offset=offset)
        return saved

    def unpack(self, kept: Tensor | _OfInput) -> Tensor:
        """The tensor again, of the inputs that backward got."""
        if isinstance(kept, Tensor):
            return kept
        tensor = self._tensors[kept.place]
        return tensor.as_strided(kept.size, kept.stride, tensor.storage_offset() + kept.offset)

    @contextmanager
    def given(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """While backward runs: the inputs again, of the strides that they had."""
        pairs = zip(tensors, self._strides, strict=True)
        self._tensors = [
            tensor.detach() if tensor.stride() == stride else _laid(tensor, stride) for tensor, stride in pairs
        ]
        try:
            yield
        finally:
            self._tensors = []

    def forget(self) -> None:
        """After forward."""
        self._tensors = []


def _laid(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    if tensor.stride() == stride:
        return tensor.detach()
    return torch.empty_strided(tensor.size(), stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _begins_in(tensor: Tensor, part: Tensor) -> bool:
    """Whether the first element of ``part`` is one of ``tensor``: inputs may be halves of one weight."""
    left = part.storage_offset() - tensor.storage_offset()
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True):
        index = min(left // stride, size - 1) if stride else 0
        left -= index * stride
    return left == 0 and part.dtype == tensor.dtype


@dataclass(frozen=True, kw_only=True, eq=False)
class _Graph:
    """What a call saved for backward.

    leaves: where gradients of the inputs come out. edges: where the gradient of each result enters, or None. inputs:
    what gives the graph its inputs in backward. expert_ids: of the plan, (W, C, K). group, step: of the call.
    """

    leaves: list[GradientEdge]
    edges: list[GradientEdge | None]
    inputs: _Inputs
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
    """An operator that makes a call.

    run: from the ``ExpertParallel`` and the arguments by name, the results, then ``expert_ids``. fake: from the
    arguments, the results without values, for tracing.
    """

    name: str
    schema: str
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
        given, tensors = self._given(arguments), tensors_of(arguments)
        ep, trained, inputs = registered(given["ep"]), given["trained"], _Inputs(tensors)
        autocast = torch.autocast(tensors[0].device.type, enabled=given["autocast"])
        with compat.autograd_in_operator(), torch.set_grad_enabled(any(trained)), autocast:
            pairs = zip(tensors, trained, strict=True)
            leaves = [tensor.detach().requires_grad_(needed) for tensor, needed in pairs]
            of_leaves = self._given(_in_place_of_tensors(arguments, iter(leaves), lambda other: other))
            with saved_tensors_hooks(inputs.pack, inputs.unpack):
                *results, expert_ids = self.run(ep, of_leaves)
            edges = [get_gradient_edge(result) if result.requires_grad else None for result in results]
            outlets = [get_gradient_edge(leaf) for leaf in leaves if leaf.requires_grad]
        inputs.forget()
        for leaf in leaves:
            if leaf.requires_grad:
                # The graph has this leaf, which needs no memory: only its edge is asked for.
                leaf.data = leaf.data.new_empty(0)
        of_call = {"expert_ids": expert_ids, "group": ep.group, "step": ep.steps}
        graph = _Graph(leaves=outlets, edges=edges, inputs=inputs, **of_call)
        # Copies: backward reads these results again, and a caller may overwrite them.
        y, *others = (result.detach() for result in results)
        return (y.contiguous(), *(other.clone().contiguous() for other in others), Owner.tensor_of(graph))

    def _fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        return (*self.fake(self._given(arguments)), Owner.fake())


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """``graph`` and the inputs, which it does not keep."""
    ctx.set_materialize_grads(False)
    ctx.trained, graph = inputs[-1], output[-1]
    ctx.save_for_backward(graph, *tensors_of(inputs))
    ctx.places = _in_place_of_tensors(inputs, itertools.repeat(True), lambda _: None)
    # A recompute brings another graph, whose routing has to be this one's.
    ctx.expert_ids = Owner.owned_by(graph).expert_ids if compat.selective_checkpoint_active() else None


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Of each input, as it was given: a tensor, a list of tensors, or None."""
    if torch.is_grad_enabled():
        raise RuntimeError("sonic_ep: create_graph=True is not supported: backward is once_differentiable")
    graph, *inputs = ctx.saved_tensors
    found = iter(torch.ops.sonic_ep.backward(graph, grads[:-1], inputs, ctx.trained, ctx.expert_ids))
    of_tensors = iter([next(found) if needed else None for needed in ctx.trained])
    return tuple(
        [next(of_tensors) for _ in place] if isinstance(place, list) else next(of_tensors) if place else None
        for place in ctx.places
    )


def _backward(
    graph: Tensor, grads: Sequence[Any], inputs: Sequence[Tensor], trained: Sequence[bool], expert_ids: Tensor | None
) -> list[Tensor]:
    """Gradients of the inputs that require one, with their form; zeros where no result depends on one."""
    held: _Graph = Owner.owned_by(graph)
    _raise_if_rerouted(held, expert_ids)
    entering = [(edge, grad) for edge, grad in zip(held.edges, grads, strict=True) if edge and grad is not None]
    forms = list(itertools.compress(inputs, trained))
    if not entering:
        return [_with_form(None, form) for form in forms]
    edges, given = zip(*entering, strict=True)
    # The graph is freed with its tensor, so that a caller may keep his for a second backward.
    with compat.autograd_in_operator(), held.inputs.given(inputs):
        found = torch.autograd.grad(edges, held.leaves, given, retain_graph=True, allow_unused=True)
    return [_with_form(grad, form) for grad, form in zip(found, forms, strict=True)]


def _backward_fake(
    graph: Tensor, grads: object, inputs: Sequence[Tensor], trained: Sequence[bool], expert_ids: object
) -> list[Tensor]:
    return [torch.empty_like(form) for form in itertools.compress(inputs, trained)]


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


_BACKWARD = "(Tensor graph, Tensor?[] grads, Tensor[] inputs, bool[] trained, Tensor? expert_ids) -> Tensor[]"
torch.library.custom_op("sonic_ep::backward", _backward, mutates_args=(), schema=_BACKWARD).register_fake(
    _backward_fake
)


def by_operator(
    operator: Callable[..., Any],
) -> Callable[[Callable[GivenP, tuple[ResultT, Tensor]]], Callable[GivenP, ResultT]]:
    """Decorate a method: ``operator`` takes calls that are traced or under selective checkpointing, the method others.

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
