"""Activations, and the layouts of gate and up. Computed in fp32 (fp64 for fp64), rounded once to the input's dtype."""

import math
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

NUMBERS = torch.finfo(torch.float32)


@dataclass(frozen=True, kw_only=True)
class GateLayout:
    """Where gate and up lie in the 2I outputs of the up-projection: an einops pattern, (..., 2I) to (2, ..., I)."""

    name: str
    pattern: str

    def split(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up, each (..., I), as views of ``hidden`` (..., 2I).

        >>> GATE_LAYOUTS["interleaved"].split(torch.tensor([1, 2, 3, 4]))
        (tensor([1, 3]), tensor([2, 4]))
        >>> GATE_LAYOUTS["concat"].split(torch.tensor([1, 2, 3, 4]))
        (tensor([1, 2]), tensor([3, 4]))
        """
        gate, up = rearrange(hidden, self.pattern, two=2)
        return gate, up


# The caller's own activations that are alive, by their text.
_custom: weakref.WeakValueDictionary[str, "Activation"] = weakref.WeakValueDictionary()


@dataclass(frozen=True, kw_only=True)
class Activation:
    """``pointwise(hidden)`` or, if gated, ``up * pointwise(gate)``. The caller's own run on backend "reference".

    pointwise: element by element and differentiable; takes and returns fp32, or fp64. Raises ``TypeError`` for fields
    of another type.
    """

    name: str
    gated: bool
    pointwise: Callable[[Tensor], Tensor]
    # What ``activation_of`` finds it by: operators take no Python objects.
    text: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        kinds = {"name": isinstance(self.name, str), "gated": isinstance(self.gated, bool)}
        for name, right in (kinds | {"pointwise": callable(self.pointwise)}).items():
            if not right:
                expected = "a name, True or False, and a function of a tensor"
                raise TypeError(f"Activation: {name}: got {getattr(self, name)!r}, expected {expected}")
        self._register()

    def __setstate__(self, state: dict[str, object]) -> None:
        """A copy is found by a text of its own."""
        self.__dict__.update(state)
        self._register()

    def _register(self) -> None:
        object.__setattr__(self, "text", f"{self.name} #{id(self)}")
        _custom[self.text] = self

    @property
    def is_builtin(self) -> bool:
        """Whether this is one of ``ACTIVATIONS``."""
        return self == ACTIVATIONS.get(self.name)

    @property
    def identity(self) -> str:
        """What has to be the same on every rank, the same text in every process: of this library's own, the name."""
        if self.is_builtin:
            return self.name
        function = getattr(self.pointwise, "__qualname__", type(self.pointwise).__name__)
        return f"{self.name} ({'gated' if self.gated else 'not gated'}, {function})"

    def up_width(self, intermediate_size: int) -> int:
        """Outputs of the up-projection: 2I if gated, else I."""
        return 2 * intermediate_size if self.gated else intermediate_size

    def __call__(self, hidden: Tensor, layout: GateLayout) -> Tensor:
        """(..., 2I or I) to (..., I), in the dtype of ``hidden``. ``layout`` is used by gated activations only."""
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if not self.gated:
            return self.pointwise(wide).to(hidden.dtype)
        gate, up = layout.split(wide)
        return self.of_gate_and_up(gate, up).to(hidden.dtype)

    def of_gate_and_up(self, gate: Tensor, up: Tensor) -> Tensor:
        """``up * pointwise(gate)``."""
        return up * self.pointwise(gate)


@dataclass(frozen=True, kw_only=True)
class Swiglu(Activation):
    """``(clamp(up, -limit, limit) + up_offset) * g * sigmoid(alpha * g)`` with ``g = min(gate, limit)``.

    ``Swiglu()`` is "swiglu"; GPT-OSS has ``Swiglu(alpha=1.702, limit=7.0, up_offset=1.0)``. The gradient is 0 beyond
    the limit and passes at it, as that of ``torch.clamp``; NaN stays NaN.

    Raises ``ValueError`` unless alpha > 0, limit > 0 (infinite: none), and all but limit are finite, in fp32.
    """

    name: str = field(default="swiglu", init=False, repr=False)
    gated: bool = field(default=True, init=False, repr=False)
    pointwise: Callable[[Tensor], Tensor] = field(default_factory=lambda: F.silu, init=False, repr=False)
    alpha: float = 1.0
    limit: float = math.inf
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        for name in ("alpha", "limit", "up_offset"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            fits = number and (abs(value) <= NUMBERS.max or (name == "limit" and value == math.inf))
            if not (fits and (name == "up_offset" or value >= NUMBERS.tiny)):
                expected = {"up_offset": "a finite number", "limit": "a number above 0, or math.inf"}
                expected_one = expected.get(name, "a finite number above 0")
                raise ValueError(f"Swiglu: {name}: got {value!r}, expected {expected_one}, that fp32 holds")
            object.__setattr__(self, name, float(value))
        # Last: the text has the numbers as floats.
        super().__post_init__()

    def _register(self) -> None:
        if type(self) is Swiglu:
            text = f"Swiglu(alpha={self.alpha!r}, limit={self.limit!r}, up_offset={self.up_offset!r})"
            object.__setattr__(self, "text", text)
        else:
            super()._register()

    @property
    def identity(self) -> str:
        """The numbers, or "swiglu" where they are its."""
        return self.name if self.is_builtin else repr(self)

    def of_gate_and_up(self, gate: Tensor, up: Tensor) -> Tensor:
        """The formula, differentiable."""
        if self.is_builtin:
            return super().of_gate_and_up(gate, up)
        # Not ``clamp``, so that NaN stays NaN in the gradient too.
        gate = torch.where(gate.detach() > self.limit, self.limit, gate)
        up = torch.where(up.detach().abs() > self.limit, up.detach().clamp(-self.limit, self.limit), up)
        if self.up_offset != 0:
            up = up + self.up_offset
        return up * (gate * torch.sigmoid(self.alpha * gate))


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


# A function, which copies and pickles as itself: backends compare it.
def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ALL = (
    Swiglu(),
    Activation(name="geglu", gated=True, pointwise=_gelu_tanh),
    Activation(name="reglu", gated=True, pointwise=F.relu),
    Activation(name="silu", gated=False, pointwise=F.silu),
    Activation(name="gelu", gated=False, pointwise=_gelu_tanh),
    Activation(name="relu", gated=False, pointwise=F.relu),
    Activation(name="relu_sq", gated=False, pointwise=_relu_squared),
)
ACTIVATIONS: Mapping[str, Activation] = MappingProxyType({activation.name: activation for activation in _ALL})
for _activation in _ALL:
    object.__setattr__(_activation, "text", _activation.name)


def activation_of(text: str) -> Activation:
    """The activation with this ``text``. Raises ``ValueError`` if there is none in this process.

    >>> activation_of(Swiglu(limit=7.0).text)
    Swiglu(alpha=1.0, limit=7.0, up_offset=0.0)
    """
    found = ACTIVATIONS.get(text) or _custom.get(text)
    if found is None and text.startswith("Swiglu("):
        numbers = dict(re.findall(r"(\w+)=([^,)]+)", text))
        found = Swiglu(**{name: float(number) for name, number in numbers.items()})
    if found is None:
        raise ValueError(f"activation: got {text!r}, expected one that is alive in this process: keep the object")
    return found


_INTERLEAVED = GateLayout(name="interleaved", pattern="... (i two) -> two ... i")
_CONCAT = GateLayout(name="concat", pattern="... (two i) -> two ... i")
GATE_LAYOUTS: Mapping[str, GateLayout] = MappingProxyType({"interleaved": _INTERLEAVED, "concat": _CONCAT})
