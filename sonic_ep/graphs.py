"""Layers as CUDA graphs in an eager program: forward and backward are captured once, and replayed by each call.

    capture    once without gradients, eagerly (checks) ─ twice with them (kernels, shared memory) ─ two graphs
    call       arguments ─ copied to static inputs ─ forward's graph ─ copies of the static outputs
    backward   gradients ─ copied to static gradients ─ backward's graph ─ copies of the gradients

What leaves a replay is a copy, so nothing that a caller holds is overwritten. What stays between forward and backward,
the activations, is checked: a backward whose activations another replay has overwritten raises.
"""

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from sonic_ep import compat, ops
from sonic_ep.autograd_utils import runs_eagerly
from sonic_ep.capture_conditions import CaptureConditions, check_captures, check_module
from sonic_ep.checks import ArgumentChecker
from sonic_ep.distributed.group import resolve_group
from sonic_ep.sharding import is_dtensor

ResultT = TypeVar("ResultT")
# The first call of a shape compiles kernels and allocates shared memory, the second does neither.
WARM_UPS = 2
BY_OTHER_FORWARD, BY_OTHER_GRAPH = "another forward of the same graph", "a graph that was captured before this one"
BY_BACKWARD = "their own backward"


@dataclass(kw_only=True)
class ForwardPass:
    """One forward, whose activations wait for backward. overwritten_by: what has overwritten them, if anything has."""

    overwritten_by: str = ""


class ReplayOrder:
    """Whose activations a replay overwrites, where graphs share memory.

    Graphs are numbered as they are captured. Activations have a place of their own until their graph is freed; what a
    graph uses only while it runs, later ones use again, for activations as well. So a replay overwrites what later
    graphs have left for backward: blocks run forward in the order in which they were captured, and backward in reverse.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._awaiting: dict[int, ForwardPass] = {}

    def new_number(self) -> int:
        """The number of the graph that is captured next."""
        return next(self._numbers)

    def overwrite(self, number: int) -> None:
        """Graph ``number`` is replayed, forward or backward."""
        for later in [other for other in self._awaiting if other >= number]:
            by = BY_OTHER_FORWARD if later == number else BY_OTHER_GRAPH
            self._awaiting.pop(later).overwritten_by = by

    def expect_backward(self, number: int) -> ForwardPass:
        """Graph ``number`` has run forward, and its backward may come."""
        self._awaiting[number] = ForwardPass()
        return self._awaiting[number]


class GraphMemory:
    """Memory that graphs of one device share, the stream that they are captured on, and the order of their replays."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.order = device, ReplayOrder()
        self.stream = torch.cuda.Stream(device)
        self._last_stream: torch.cuda.Stream | None = None
        # The memory lives as long as a graph in it.
        self._first = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._first, stream=self.stream, capture_error_mode="thread_local"):
            torch.zeros(1, device=device)

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """On the stream of captures, between what is queued here."""
        ahead = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(ahead)
        with torch.cuda.stream(self.stream):
            yield
        ahead.wait_stream(self.stream)

    def captured(self, work: Callable[[], ResultT]) -> tuple[torch.cuda.CUDAGraph, ResultT]:
        """``work`` as a graph, and its result, whose values come with each replay."""
        graph = torch.cuda.CUDAGraph()
        options: dict[str, Any] = {"pool": self._first.pool(), "stream": self.stream}
        with torch.cuda.graph(graph, capture_error_mode="thread_local", **options):
            result = work()
        return graph, result

    def begin(self, number: int) -> None:
        """Before a replay: it comes after the last one, on whatever stream, and overwrites activations."""
        if torch.cuda.is_current_stream_capturing():
            got = "got a replay in graph capture, expected a call of the function itself"
            raise ValueError(f"{resolve_group(None)}: graphed: {got}")
        stream = torch.cuda.current_stream(self.device)
        if self._last_stream is not None and self._last_stream != stream:
            stream.wait_stream(self._last_stream)
        self._last_stream = stream
        self.order.overwrite(number)


_shared_memory: weakref.WeakValueDictionary[torch.device, GraphMemory] = weakref.WeakValueDictionary()


def _memory_of(device: torch.device, *, shared: bool) -> GraphMemory:
    if not shared:
        return GraphMemory(device)
    found = _shared_memory.get(device)
    if found is None:
        found = _shared_memory[device] = GraphMemory(device)
    return found


class StaticGradient:
    """A gradient as backward's graph leaves it, until the next replay. Its memory is free for other graphs."""

    def __init__(self, gradient: Any) -> None:
        local = gradient.to_local() if is_dtensor(gradient) else gradient
        self._memory = compat.unowned(local.detach())
        self._form: dict[str, Any] = {}
        if is_dtensor(gradient):
            self._form = {"device_mesh": gradient.device_mesh, "placements": gradient.placements, "run_check": False}
            self._form |= {"shape": gradient.shape, "stride": gradient.stride()}

    def copy(self) -> Tensor:
        """Its values now, as a tensor of their own."""
        own = self._memory.clone()
        if not self._form:
            return own
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(own, **self._form)


class Recording:
    """The graphs of one function at one shape, and the static tensors that they read and write."""

    def __init__(
        self,
        function: Callable[..., object],
        samples: Sequence[Tensor],
        conditions: CaptureConditions,
        memory: GraphMemory,
    ) -> None:
        self._function, self.conditions, self._memory = function, conditions, memory
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = [_static(sample) for sample in samples]
        named = {} if conditions.module is None else dict(conditions.module.named_parameters())
        trained = {name: p for name, p in named.items() if p.requires_grad and conditions.grad_enabled}
        self.parameters = tuple(trained.values())
        # Same memory, other leaves: hooks and gradient accumulators of the parameters stay outside of the graphs.
        self._stand_ins = {name: p.detach().requires_grad_() for name, p in trained.items()}
        self._leaves = [static for static in (*self._inputs, *self._stand_ins.values()) if static.requires_grad]
        self._number = memory.order.new_number()
        self._warm_up()
        (self._forward, (held, self._rebuilt)) = memory.captured(self._outputs)
        # With them what autograd has saved lives on.
        self._outputs_held: list[Tensor] = held
        self.differentiable = [output.requires_grad for output in held]
        self.trained = any(self.differentiable)
        self._output_gradients = [torch.zeros_like(o) if o.requires_grad else None for o in held]
        self._gradients: list[StaticGradient | None] = []
        if self.trained:
            self._backward, self._gradients = memory.captured(self._captured_gradients)

    def replay_forward(self, given: Sequence[Tensor]) -> tuple[list[Tensor], ForwardPass]:
        """Outputs, and what backward needs."""
        self._memory.begin(self._number)
        for static, value in zip(self._inputs, given, strict=True):
            if not isinstance(value, nn.Parameter):
                static.copy_(value)
        self._forward.replay()
        outputs = [output.clone() for output in self._outputs_held]
        return outputs, self._memory.order.expect_backward(self._number) if self.trained else ForwardPass()

    def replay_backward(self, forward_pass: ForwardPass, given: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the inputs, then of the parameters."""
        self.conditions.check_open()
        if forward_pass.overwritten_by:
            got = f"activations that were overwritten by {forward_pass.overwritten_by}"
            expected = "expected one backward for each forward, before that (docs/graphs.md)"
            raise RuntimeError(f"{self.conditions.checker.group}: backward of graphed: got {got}, {expected}")
        self._memory.begin(self._number)
        forward_pass.overwritten_by = BY_BACKWARD
        for static, value in zip(self._output_gradients, given, strict=True):
            if static is not None:
                static.zero_() if value is None else static.copy_(value)
        self._backward.replay()
        copies = iter([None if gradient is None else gradient.copy() for gradient in self._gradients])
        statics = (*self._inputs, *self._stand_ins.values())
        return [next(copies) if static.requires_grad else None for static in statics]

    def rebuilt(self, outputs: Sequence[Tensor]) -> Any:
        """Outputs as the function returns them."""
        return self._rebuilt(outputs)

    def _warm_up(self) -> None:
        """Calls at this shape, without gradients and then with them. Collective where the function is."""
        before = {ep: ep.steps for ep in ops.registered_now()}
        with self._memory.warming_up():
            with torch.no_grad(), self._autocast_uncached():
                self._function(*self._inputs)
            self.conditions.eps.extend(ep for ep in ops.registered_now() if ep.steps != before.get(ep, 0))
            for ep in self.conditions.eps:
                check_captures(ep)
            for _ in range(WARM_UPS):
                outputs, _ = self._outputs()
                if any(output.requires_grad for output in outputs):
                    self._check_leaves(outputs)
                    self._gradients_of(outputs, [torch.zeros_like(o) for o in outputs if o.requires_grad])
                del outputs

    def _outputs(self) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
        """Call the function: its tensors, and what makes its result of such."""
        with self._autocast_uncached():
            if self._stand_ins:
                assert self.conditions.module is not None
                result = functional_call(self.conditions.module, self._stand_ins, tuple(self._inputs))
            else:
                result = self._function(*self._inputs)
        outputs, rebuilt = compat.flattened(result)
        for output in outputs:
            self.conditions.checker.instance("result of graphed", output, Tensor, "tensors, alone or in tuples")
        return outputs, rebuilt

    def _captured_gradients(self) -> list[StaticGradient | None]:
        given = [gradient for gradient in self._output_gradients if gradient is not None]
        found = self._gradients_of(self._outputs_held, given, retain_graph=True)
        return [None if gradient is None else StaticGradient(gradient) for gradient in found]

    def _gradients_of(
        self, outputs: Sequence[Tensor], given: Sequence[Tensor], *, retain_graph: bool = False
    ) -> Sequence[Tensor | None]:
        trained = [output for output in outputs if output.requires_grad]
        options: dict[str, Any] = {"allow_unused": True, "retain_graph": retain_graph}
        # As a backward after the block of autocast.
        with torch.autocast(self._memory.device.type, enabled=False):
            return torch.autograd.grad(trained, self._leaves, given, **options)

    @contextmanager
    def _autocast_uncached(self) -> Iterator[None]:
        """Autocast as captured; weights that it has cast before would be constants of the graph."""
        enabled, dtype = self.conditions.autocast
        with torch.autocast(self._memory.device.type, dtype=dtype, enabled=enabled, cache_enabled=False):
            yield

    def _check_leaves(self, outputs: Sequence[Tensor]) -> None:
        """Raise ``ValueError`` if the function reads trained tensors that it was not given: they would get nothing."""
        known = {id(leaf) for leaf in self._leaves}
        for leaf in _leaves_below(outputs):
            got = f"one that reads a tensor {tuple(leaf.shape)} that requires a gradient and is none of its arguments"
            expected = "a module with that parameter, or the tensor as an argument"
            self.conditions.checker.require(id(leaf) in known, "function of graphed", got, expected)


def _static(sample: Tensor) -> Tensor:
    own = sample.detach() if isinstance(sample, nn.Parameter) else sample.detach().clone()
    return own.requires_grad_(sample.requires_grad)


def _leaves_below(outputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """Leaves that a backward from ``outputs`` gives gradients."""
    seen: set[Any] = set()
    ahead: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            ahead += [before for before, _ in node.next_functions if before is not None]
            if (leaf := getattr(node, "variable", None)) is not None:
                yield leaf


class ReplayFunction(torch.autograd.Function):
    """The arguments and parameters of a call to its outputs, by one graph each way."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, count: int, *given: Tensor) -> tuple[Tensor, ...]:
        """given: ``count`` arguments, then the parameters."""
        outputs, ctx.forward_pass = recording.replay_forward(given[:count])
        ctx.recording = recording
        ctx.set_materialize_grads(False)
        pairs = zip(outputs, recording.differentiable, strict=True)
        ctx.mark_non_differentiable(*(output for output, differentiable in pairs if not differentiable))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of the arguments and parameters."""
        return None, None, *ctx.recording.replay_backward(ctx.forward_pass, gradients)


class Graphed(Generic[ResultT]):
    """A function or module that ``graphed`` has captured: called like it, by place, with tensors like the samples."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    @runs_eagerly
    def __call__(self, *given: Tensor, **options: object) -> ResultT:
        """Replay. Raises ``ValueError``, ``TypeError`` or ``ClosedError`` where the graph is not that of this call."""
        recording = self._recording
        recording.conditions.check(given, options)
        if recording.trained and torch.is_grad_enabled():
            outputs = ReplayFunction.apply(recording, len(given), *given, *recording.parameters)
        else:
            with torch.no_grad():
                outputs, _ = recording.replay_forward(given)
        result: ResultT = recording.rebuilt(outputs)
        return result


def graphed(function: Callable[..., ResultT], *sample_args: Tensor, shares_memory: bool = True) -> Graphed[ResultT]:
    """``function`` as CUDA graphs: one of its forward, one of its backward, replayed by each call. Collective.

    function: an ``nn.Module``, whose parameters get their gradients, or any function of tensors. It returns a tensor,
    or tensors in tuples, lists or dictionaries. It stays as it is, for eager calls. sample_args: tensors on one CUDA
    device, of the shape, dtype and ``requires_grad`` that every call will have; their values are used to warm up. A
    ``nn.Parameter`` among them is read in place, every other argument is copied. Under ``torch.no_grad()`` or
    ``inference_mode()`` there is no backward, and calls are made without gradients.

    shares_memory: with other graphs of the device. They then have to run forward in the order in which they were
    captured, and backward in reverse; a backward that comes otherwise raises ``RuntimeError``.

    All ranks capture the same functions, and replay them in the order of their calls, eager ones among them. Results
    and gradients are those of an eager call, bit for bit, and no replay overwrites them. Gradients of results that take
    no part in the loss are computed, as zeros. One forward at a time: a second one before backward makes the first's
    backward raise ``RuntimeError``; so does a second backward.

    Raises ``ValueError`` for samples on other devices, hooks, buffers that require gradients, trained tensors that are
    neither parameters nor arguments, ``cpu_sync_on_runtime`` and the backend "reference"; ``TypeError`` for arguments
    that are no tensors.
    """
    checker = ArgumentChecker(group=resolve_group(None))
    if not callable(function):
        raise TypeError(f"{checker.group}: function of graphed: got {type(function).__name__}, expected a function")
    checker.flag("shares_memory", shares_memory)
    checker.require(bool(sample_args), "sample_args of graphed", "none", "the tensors of a call")
    for place, sample in enumerate(sample_args):
        checker.instance(f"argument {place} of graphed", sample, Tensor, "a torch.Tensor: bind others to the function")
        if is_dtensor(sample):
            raise TypeError(f"{checker.group}: argument {place} of graphed: got a DTensor, expected its to_local()")
    if isinstance(function, nn.Module):
        check_module(checker, function)
    device = sample_args[0].device
    for place, sample in enumerate(sample_args):
        holds = sample.device == device and device.type == "cuda"
        checker.require(holds, f"device of argument {place} of graphed", sample.device, "one CUDA device for all")
    if torch.cuda.is_current_stream_capturing():
        checker.require(False, "graphed", "a call in graph capture", "one outside: it captures graphs itself")
    with torch.cuda.device(device):
        memory = _memory_of(device, shared=shares_memory)
        # Should capture fail, PyTorch leaves its stream on.
        with torch.cuda.stream(torch.cuda.current_stream()):
            conditions = CaptureConditions.of(checker, function, sample_args)
            return Graphed(Recording(function, sample_args, conditions, memory))
