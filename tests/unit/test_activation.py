"""Every activation against its textbook formula in fp64, and the gate layouts against plain indexing."""

import math
from collections.abc import Callable

import pytest
import torch
from near import assert_near
from torch import Tensor

from sonic_ep.activation import ACTIVATIONS, GATE_LAYOUTS, GateLayout

CONCAT, INTERLEAVED = GATE_LAYOUTS["concat"], GATE_LAYOUTS["interleaved"]


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()),
    "relu": lambda x: x * (x > 0),
    "relu_sq": lambda x: (x * (x > 0)) ** 2,
}
GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
FORMULAS |= {name: FORMULAS[of_gate] for name, of_gate in GATED.items()}


def test_every_activation_has_a_formula_and_its_width() -> None:
    assert set(FORMULAS) == set(ACTIVATIONS)
    assert {name: activation.up_width(7) for name, activation in ACTIVATIONS.items()} == {
        name: 14 if name in GATED else 7 for name in FORMULAS
    }


@pytest.mark.parametrize("layout", [CONCAT, INTERLEAVED], ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", FORMULAS)
def test_values(name: str, layout: GateLayout) -> None:
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    activation = ACTIVATIONS[name]
    gate, up = (hidden[:, :4], hidden[:, 4:]) if layout is CONCAT else (hidden[:, ::2], hidden[:, 1::2])
    expected = up * FORMULAS[name](gate) if activation.gated else FORMULAS[name](hidden)
    assert_near(activation(hidden, layout), expected, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMULAS)
def test_low_precision_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    hidden = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = ACTIVATIONS[name](hidden, INTERLEAVED)
    assert out.dtype == dtype
    assert torch.equal(out, ACTIVATIONS[name](hidden.float(), INTERLEAVED).to(dtype))
