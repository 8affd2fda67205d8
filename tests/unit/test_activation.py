"""Every activation against its textbook formula in fp64, and the gate layouts against plain indexing."""

import math
from collections.abc import Callable

import pytest
import torch
from near import assert_near
from torch import Tensor

from sonic_ep.activation import ACTIVATIONS, GATE_LAYOUTS

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
