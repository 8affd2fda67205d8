"""What a CUDA graph of ``sonic_ep.graphed`` was captured with, which every call is checked for."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sonic_ep.api import ExpertParallel
from sonic_ep.checks import ArgumentChecker
from sonic_ep.errors import ClosedError
from sonic_ep.sharding import is_dtensor

KINDS_OF_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True, kw_only=True)
class SampleForm:
    """What is compared of an argument. parameter: the argument itself, if it is one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    parameter: nn.Parameter | None

    @classmethod
    def of(cls, sample: Tensor) -> "SampleForm":
        """That of a sample, which it does not keep."""
        parameter = sample if isinstance(sample, nn.Parameter) else None
        same = {name: getattr(sample, name) for name in ("dtype", "device", "requires_grad")}
        return cls(parameter=parameter, shape=tuple(sample.shape), **same)


@dataclass(frozen=True, kw_only=True)
class CaptureConditions:
    """What a graph was captured with, and every call has to come with."""

    checker: ArgumentChecker
    module: nn.Module | None
    forms: tuple[SampleForm, ...]
    training: bool | None
    grad_enabled: bool
    autocast: tuple[bool, torch.dtype]
    parameters: tuple[nn.Parameter, ...]
    places: tuple[tuple[int, bool], ...]
    eps: list[ExpertParallel] = field(default_factory=list)

    @classmethod
    def of(cls, checker: ArgumentChecker, function: object, samples: Sequence[Tensor]) -> "CaptureConditions":
        """Those of here and now."""
        module = function if isinstance(function, nn.Module) else None
        parameters = () if module is None else tuple(module.parameters())
        return cls(
            checker=checker,
            module=module,
            forms=tuple(map(SampleForm.of, samples)),
            training=None if module is None else module.training,
            grad_enabled=torch.is_grad_enabled(),
            autocast=autocast_state(samples[0].device),
            parameters=parameters,
            places=_places(parameters),
        )

    def check(self, given: Sequence[object], options: Mapping[str, object]) -> None:
        """Raise ``ValueError``, ``TypeError`` or ``ClosedError`` for a call that the graph does not compute."""
        if options:
            got = f"got {', '.join(options)} by name, expected all arguments by place"
            raise TypeError(f"{self.checker.group}: arguments of graphed: {got}")
        self._expect("arguments of graphed", len(given), len(self.forms))
        for place, (value, form) in enumerate(zip(given, self.forms, strict=True)):
            self._check_argument(f"argument {place} of graphed", value, form)
        if torch.is_grad_enabled() and not self.grad_enabled:
            self._expect("grad mode of graphed", True, False)
        self._expect("autocast (enabled, dtype) of graphed", autocast_state(self.forms[0].device), self.autocast)
        if self.module is not None:
            self._expect("training of graphed", self.module.training, self.training)
            self._check_parameters(tuple(self.module.parameters()))
        self.check_open()

    def check_open(self) -> None:
        """Raise ``ClosedError`` unless calls may follow: graphs use shared memory of each ``ExpertParallel``."""
        for ep in self.eps:
            if not ep.usable:
                raise ClosedError(f"{ep.group}: graphed: the ExpertParallel of this graph is closed: capture a new one")

    def _expect(self, name: str, got: object, expected: object) -> None:
        if got != expected:
            self.checker.require(False, name, got, f"{expected}, as captured: call the function itself")

    def _check_argument(self, name: str, value: object, form: SampleForm) -> None:
        tensor = self.checker.instance(name, value, Tensor, "a torch.Tensor")
        if form.parameter is not None and tensor is not form.parameter:
            expected = "the parameter that was captured, which the graph reads in place"
            self.checker.require(False, name, "another tensor", expected)
        self._expect(f"shape of {name}", tuple(tensor.shape), form.shape)
        self._expect(f"dtype of {name}", tensor.dtype, form.dtype)
        self._expect(f"device of {name}", tensor.device, form.device)
        if torch.is_grad_enabled():
            self._expect(f"requires_grad of {name}", tensor.requires_grad, form.requires_grad)

    def _check_parameters(self, found: Sequence[nn.Parameter]) -> None:
        same = len(found) == len(self.parameters) and all(map(operator.is_, found, self.parameters))
        if not (same and _places(found) == self.places):
            got = "some that were replaced, moved, frozen or unfrozen since capture"
            self.checker.require(False, "parameters of graphed", got, "those of capture: capture a new graph")


def autocast_state(device: torch.device) -> tuple[bool, torch.dtype]:
    """Whether it is on, and the dtype that it casts to."""
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


@torch.no_grad()
def _places(parameters: Sequence[Any]) -> tuple[tuple[int, bool], ...]:
    """Where each is, and whether it requires a gradient."""
    held = [parameter.to_local() if is_dtensor(parameter) else parameter for parameter in parameters]
    return tuple((local.data_ptr(), given.requires_grad) for local, given in zip(held, parameters, strict=True))


def check_captures(ep: ExpertParallel) -> None:
    """Raise ``ValueError`` where calls of ``ep`` cannot be captured."""
    checker, why = ArgumentChecker(group=ep.group), "in a CUDA graph: the host cannot read sizes there"
    checker.require(ep.backend == "fast", "backend of graphed", repr(ep.backend), f"'fast' {why}")
    checker.require(not ep.config.cpu_sync_on_runtime, "cpu_sync_on_runtime of graphed", True, f"False {why}")


def check_module(checker: ArgumentChecker, module: nn.Module) -> None:
    """No hooks, which would run in capture alone, and no trained buffers, which would get no gradients."""
    for name, part in module.named_modules():
        hooks = [kind for kind in KINDS_OF_HOOKS if getattr(part, kind)]
        place = f"{type(part).__name__} {name}".strip()
        checker.require(not hooks, f"hooks of {place}", ", ".join(hooks), "none: a replay runs no Python")
    for name, buffer in module.named_buffers():
        checker.require(not buffer.requires_grad, f"requires_grad of buffer {name}", True, "False: make it a parameter")
