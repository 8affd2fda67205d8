"""Every activation against its textbook formula in fp64, and the gate layouts against plain indexing."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from near import assert_near
from same import assert_same_bits
from torch import Tensor

from sonic_ep.activation import ACTIVATIONS, GATE_LAYOUTS, Activation, Swiglu

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()),
    "relu": lambda x: x * (x > 0),
    "relu_sq": lambda x: (x * (x > 0)) ** 2,
}
GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
FORMULAS |= {name: FORMULAS[of_gate] for name, of_gate in GATED.items()}


@pytest.mark.parametrize("layout", GATE_LAYOUTS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_of_fp64_and_one_rounding_of_fewer_bits(name: str, layout: str) -> None:
    activation, gate_layout = ACTIVATIONS[name], GATE_LAYOUTS[layout]
    hidden = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    gate, up = (hidden[:, :4], hidden[:, 4:]) if layout == "concat" else (hidden[:, ::2], hidden[:, 1::2])
    expected = up * FORMULAS[name](gate) if name in GATED else FORMULAS[name](hidden)
    assert (activation.gated, activation.up_width(7)) == ((True, 14) if name in GATED else (False, 7))
    assert_near(activation(hidden, gate_layout), expected, 64)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = hidden.to(dtype)
        found = activation(rounded, gate_layout)
        assert found.dtype == dtype
        assert torch.equal(found, activation(rounded.float(), gate_layout).to(dtype))


CONCAT = GATE_LAYOUTS["concat"]
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("numbers", [(1.702, 7.0, 1.0), (1.702, 0.5, 1.0), (0.5, INF, 0.0), (1.0, 2.0, -1.5)])
def test_swiglu_with_numbers_and_its_gradient(numbers: tuple[float, float, float]) -> None:
    alpha, limit, offset = numbers
    hidden = torch.randn(64, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    leaf = hidden.clone().requires_grad_()
    found = Swiglu(alpha=alpha, limit=limit, up_offset=offset)(leaf, CONCAT)
    gate, up = hidden[:, :4].clamp(max=limit), hidden[:, 4:].clamp(-limit, limit)
    sigmoid = 1 / (1 + (-alpha * gate).exp())
    assert_near(found, (up + offset) * gate * sigmoid, 64)
    (grad,) = torch.autograd.grad(found.sum(), leaf)
    of_gate = (up + offset) * (sigmoid + gate * alpha * sigmoid * (1 - sigmoid)) * (hidden[:, :4] <= limit)
    of_up = gate * sigmoid * (hidden[:, 4:].abs() <= limit)
    assert_near(grad, torch.cat([of_gate, of_up], dim=1), 64)


def test_swiglu_at_its_limits_and_beyond() -> None:
    """The gradient passes at a limit and is 0 beyond, whatever comes in; NaN stays NaN in value and gradient."""
    above = float(torch.tensor(7.0).nextafter(torch.tensor(INF)))
    values = torch.tensor([7.0, above, INF, -7.0, -above, -INF, NAN])
    gate, up = values.clone().requires_grad_(), values.clone().requires_grad_()
    one = torch.ones(7)
    kind = Swiglu(alpha=1.702, limit=7.0, up_offset=1.0)
    of_gate, of_up = kind.of_gate_and_up(gate, one), kind.of_gate_and_up(one, up)
    (gate_grad,) = torch.autograd.grad(of_gate, gate, one)
    (up_grad,) = torch.autograd.grad(of_up, up, one)
    assert of_gate[:3].eq(of_gate[0]).all()
    assert of_up[:3].eq(of_up[0]).all()
    assert of_up[3:6].eq(of_up[3]).all()
    assert gate_grad.ne(0).tolist() == [True, False, False, True, True, True, True]
    assert up_grad.ne(0).tolist() == [True, False, False, True, False, False, True]
    assert all(found[6].isnan() for found in (of_gate, of_up, gate_grad))
    (poisoned,) = torch.autograd.grad(kind.of_gate_and_up(up, up), up, one * NAN)
    assert poisoned.isnan().tolist() == [True, False, False, True, True, True, True]


def test_swiglu_without_numbers_is_swiglu_in_bits() -> None:
    values = torch.tensor([0.0, -0.0, 1.5, -2.5, INF, -INF, NAN, 1e30, -1e30])
    hidden = torch.cat([values.repeat(9), values.repeat_interleave(9)])
    assert ACTIVATIONS["swiglu"] == Swiglu() == Swiglu(alpha=1, up_offset=-0.0)
    gate, up = hidden.chunk(2)
    assert_same_bits([Swiglu()(hidden, CONCAT)], [up * F.silu(gate)])


@pytest.mark.parametrize("kind", [*ACTIVATIONS.values(), Swiglu(limit=7)], ids=lambda kind: kind.identity)
def test_copies_of_an_activation_are_equal_and_say_the_same_to_other_ranks(kind: Activation) -> None:
    for twin in (copy.deepcopy(kind), pickle.loads(pickle.dumps(kind))):
        assert (twin, hash(twin), twin.identity, twin.is_builtin) == (kind, hash(kind), kind.identity, kind.is_builtin)
    # Of one's own, the function counts as well.
    other = Activation(name=kind.name, gated=kind.gated, pointwise=F.mish)
    assert not other.is_builtin
    assert other.identity not in (kind.identity, Activation(name=kind.name, gated=True, pointwise=F.elu).identity)


WRONG_NUMBERS: list[tuple[dict[str, Any], str]] = [
    ({"alpha": 0.0}, "alpha: got 0.0, expected a finite number above 0"),
    ({"alpha": INF}, "alpha: got inf"),
    ({"alpha": NAN}, "alpha: got nan"),
    ({"alpha": 1e39}, "alpha: got 1e[+]39, expected a finite number above 0, that fp32 holds"),
    ({"limit": 0}, "limit: got 0, expected a number above 0, or math.inf"),
    ({"limit": -7.0}, "limit: got -7.0"),
    ({"limit": NAN}, "limit: got nan"),
    ({"limit": 1e-60}, "limit: got 1e-60"),
    ({"limit": None}, "limit: got None"),
    ({"up_offset": INF}, "up_offset: got inf, expected a finite number"),
    ({"up_offset": True}, "up_offset: got True"),
    ({"up_offset": "1"}, "up_offset: got '1'"),
]


@pytest.mark.parametrize(("numbers", "message"), WRONG_NUMBERS)
def test_wrong_numbers(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Swiglu: {message}"):
        Swiglu(**numbers)


def test_wrong_fields() -> None:
    right = {"name": "mish", "gated": True, "pointwise": F.mish}
    for name, value in {"name": 1, "gated": 1, "pointwise": "mish"}.items():
        with pytest.raises(TypeError, match=f"^Activation: {name}: got {value!r}, expected a name, True or False"):
            Activation(**{**right, name: value})
    with pytest.raises(TypeError, match="positional"):
        Swiglu(1.702)
