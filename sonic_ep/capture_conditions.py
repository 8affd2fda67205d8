"""What a CUDA graph of ``sonic_ep.graphed`` was captured with, which every call is checked for."""

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

    def fits(self, value: object) -> bool:
        """Whether it is an argument like the sample; without gradients, also one that requires none."""
        if not isinstance(value, Tensor) or (self.parameter is not None and value is not self.parameter):
            return False
        same = value.shape == self.shape and value.dtype == self.dtype and value.device == self.device
        return same and (value.requires_grad == self.requires_grad or not torch.is_grad_enabled())


@dataclass(frozen=True, kw_only=True)
class ParameterPlace:
    """A parameter, where its module holds it, its memory, and whether it requires a gradient."""

    parameter: Any
    held_in: Mapping[str, Any]
    name: str
    is_distributed: bool
    address: int
    requires_grad: bool

    @staticmethod
    def all_of(module: nn.Module) -> "tuple[ParameterPlace, ...]":
        """Those of a module and all modules in it."""
        return tuple(
            ParameterPlace(
                parameter=parameter,
                held_in=part._parameters,
                name=name,
                is_distributed=is_dtensor(parameter),
                address=_address(parameter, is_distributed=is_dtensor(parameter)),
                requires_grad=parameter.requires_grad,
            )
            for part in module.modules()
            for name, parameter in part._parameters.items()
            if parameter is not None
        )

    def holds(self) -> bool:
        """Whether nothing of this has changed."""
        found = self.parameter
        same = found.requires_grad == self.requires_grad and self.held_in.get(self.name) is found
        return same and _address(found, is_distributed=self.is_distributed) == self.address


@dataclass(frozen=True, kw_only=True)
class CaptureConditions:
    """What a graph was captured with, and every call has to come with."""

    checker: ArgumentChecker
    module: nn.Module | None
    forms: tuple[SampleForm, ...]
    training: bool | None
    grad_enabled: bool
    autocast: tuple[bool, torch.dtype]
    parameters: tuple[ParameterPlace, ...]
    eps: list[ExpertParallel] = field(default_factory=list)

    @classmethod
    def of(cls, checker: ArgumentChecker, function: object, samples: Sequence[Tensor]) -> "CaptureConditions":
        """Those of here and now."""
        module = function if isinstance(function, nn.Module) else None
        return cls(
            checker=checker,
            module=module,
            forms=tuple(map(SampleForm.of, samples)),
            training=None if module is None else module.training,
            grad_enabled=torch.is_grad_enabled(),
            autocast=autocast_state(samples[0].device),
            parameters=() if module is None else ParameterPlace.all_of(module),
        )

    def check(self, given: Sequence[object], options: Mapping[str, object]) -> None:
        """Raise ``ValueError``, ``TypeError`` or ``ClosedError`` for a call that the graph does not compute."""
        if options:
            got = f"got {', '.join(options)} by name, expected all arguments by place"
            raise TypeError(f"{self.checker.group}: arguments of graphed: {got}")
        self._expect("arguments of graphed", len(given), len(self.forms))
        for place, (value, form) in enumerate(zip(given, self.forms, strict=True)):
            if not form.fits(value):
                self._refuse_argument(f"argument {place} of graphed", value, form)
        if torch.is_grad_enabled() and not self.grad_enabled:
            self._expect("grad mode of graphed", True, False)
        self._expect("autocast (enabled, dtype) of graphed", autocast_state(self.forms[0].device), self.autocast)
        if self.module is not None:
            self._expect("training of graphed", self.module.training, self.training)
        if not all(place.holds() for place in self.parameters):
            got = "some that were replaced, moved, frozen or unfrozen since capture"
            self.checker.require(False, "parameters of graphed", got, "those of capture: capture a new graph")
        self.check_open()

    def check_open(self) -> None:
        """Raise ``ClosedError`` unless calls may follow: graphs use shared memory of each ``ExpertParallel``."""
        for ep in self.eps:
            if not ep.usable:
                raise ClosedError(f"{ep.group}: graphed: the ExpertParallel of this graph is closed: capture a new one")

    def _expect(self, name: str, got: object, expected: object) -> None:
        if got != expected:
            self.checker.require(False, name, got, f"{expected}, as captured: call the function itself")

    def _refuse_argument(self, name: str, value: object, form: SampleForm) -> None:
        tensor = self.checker.instance(name, value, Tensor, "a torch.Tensor")
        for what, expected in (("shape", form.shape), ("dtype", form.dtype), ("device", form.device)):
            found = getattr(tensor, what)
            self._expect(f"{what} of {name}", tuple(found) if what == "shape" else found, expected)
        if form.parameter is not None:
            kept = "the parameter that was captured, which the graph reads in place"
            self.checker.require(False, name, "another tensor", kept)
        self._expect(f"requires_grad of {name}", tensor.requires_grad, form.requires_grad)


def autocast_state(device: torch.device) -> tuple[bool, torch.dtype]:
    """Whether it is on, and the dtype that it casts to."""
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def _address(parameter: Any, *, is_distributed: bool) -> int:
    if not is_distributed:
        return int(parameter.data_ptr())
    # Else it would be an operation for autograd.
    with torch.no_grad():
        return int(parameter.to_local().data_ptr())


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
