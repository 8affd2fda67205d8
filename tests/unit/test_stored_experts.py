"""What an experts module computes is found by running it: by the formula of ``moe_routed``, or refused."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonic_ep import Activation, Swiglu
from sonic_ep.activation import ACTIVATIONS
from sonic_ep.distributed.group import EPGroup
from sonic_ep.integrations.stored_experts import Refusal, StoredExperts, candidates, proven_activation

EXPERTS, HIDDEN, INTERMEDIATE = 8, 64, 32
REFUSAL = Refusal(group=EPGroup(rank=1, world_size=2), module="Toy", remedy="do otherwise")
Gate = Callable[["Toy", Tensor], Tensor]


def halves(toy: "Toy", h: Tensor) -> tuple[Tensor, Tensor]:
    return h.chunk(2, dim=-1) if toy.is_concatenated else (h[..., ::2], h[..., 1::2])


def silu_gate(toy: "Toy", h: Tensor) -> Tensor:
    gate, up = halves(toy, h)
    return F.silu(gate) * up


def gelu_gate(toy: "Toy", h: Tensor) -> Tensor:
    gate, up = halves(toy, h)
    return up * F.gelu(gate, approximate="tanh")


def relu_gate(toy: "Toy", h: Tensor) -> Tensor:
    gate, up = halves(toy, h)
    return up * gate.relu()


def fp32_gate(toy: "Toy", h: Tensor) -> Tensor:
    return silu_gate(toy, h.float()).to(h.dtype)


def limited_gate(toy: "Toy", h: Tensor) -> Tensor:
    gate, up = halves(toy, h)
    gate, up = gate.clamp(max=toy.limit), up.clamp(-toy.limit, toy.limit)
    return (up + 1) * gate * torch.sigmoid(toy.my_alpha * gate)


def erf_gate(toy: "Toy", h: Tensor) -> Tensor:
    gate, up = halves(toy, h)
    return F.gelu(gate) * up


def clamped_after(toy: "Toy", h: Tensor) -> Tensor:
    gate, up = halves(toy, h)
    return F.silu(gate).clamp(max=toy.limit) * up.clamp(-toy.limit, toy.limit)


def distant_limit(toy: "Toy", h: Tensor) -> Tensor:
    return silu_gate(toy, h.clamp(-1e4, 1e4))


def swapped_gate(toy: "Toy", h: Tensor) -> Tensor:
    up, gate = halves(toy, h)
    return F.silu(gate) * up


class Toy(nn.Module):
    """Experts as other libraries write them."""

    def __init__(self, gate: Gate, *, split: bool = False, device: str = "meta", **flags: bool) -> None:
        super().__init__()
        self.gate, self.split = gate, split
        self.num_experts = EXPERTS
        self.has_gate, self.has_bias = flags.get("has_gate", True), flags.get("has_bias", False)
        self.is_transposed, self.is_concatenated = flags.get("is_transposed", False), flags.get("is_concatenated", True)
        self.limit, self.my_alpha, self.factor = 7.0, 1.5, 1.0
        width = INTERMEDIATE * (2 if self.has_gate and not split else 1)
        self.ups = ("gate_proj", "up_proj") if split else ("gate_up_proj",) if self.has_gate else ("up_proj",)
        for name, (rows, columns) in {
            **dict.fromkeys(self.ups, (width, HIDDEN)),
            "down_proj": (HIDDEN, INTERMEDIATE),
        }.items():
            shape = (columns, rows) if self.is_transposed else (rows, columns)
            setattr(self, name, nn.Parameter(torch.empty(EXPERTS, *shape, device=device)))
            if self.has_bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.empty(EXPERTS, rows, device=device)))

    def linear(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight = getattr(self, name)[expert]
        y = x @ weight if self.is_transposed else x @ weight.T
        return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y

    def forward(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, k = (ids == expert).nonzero(as_tuple=True)
            h = torch.cat([self.linear(name, expert, x[token]) for name in self.ups], dim=-1)
            out = self.linear("down_proj", expert, self.gate(self, h)) * self.factor
            y.index_add_(0, token, out * scores[token, k, None])
        return y


class Shifted(Toy):
    def linear(self, name: str, expert: int, x: Tensor) -> Tensor:
        return super().linear(name, expert, x) + 1


def activation_of(toy: nn.Module) -> Activation:
    return proven_activation(toy, StoredExperts.of(toy, REFUSAL), ("eager",), REFUSAL)


NUMBERS = Swiglu(alpha=1.5, limit=7.0, up_offset=1.0)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("form", ["concat", "interleaved", "split"])
def test_activations_and_layouts_are_found(form: str, has_bias: bool, is_transposed: bool) -> None:
    gates = {silu_gate: "swiglu", gelu_gate: "geglu", relu_gate: "reglu", fp32_gate: "swiglu"}
    flags = {"has_bias": has_bias, "is_transposed": is_transposed, "is_concatenated": form != "interleaved"}
    for gate, expected in ({gate: ACTIVATIONS[name] for gate, name in gates.items()} | {limited_gate: NUMBERS}).items():
        assert activation_of(Toy(gate, split=form == "split", **flags)) == expected


def test_activations_without_a_gate_are_found() -> None:
    pointwise = {"silu": F.silu, "gelu": lambda h: F.gelu(h, approximate="tanh"), "relu": F.relu}
    pointwise["relu_sq"] = lambda h: h.relu().square()
    for name, function in pointwise.items():
        toy = Toy(lambda toy, h, function=function: function(h), has_gate=False)  # type: ignore[misc]
        assert activation_of(toy) == ACTIVATIONS[name]


@pytest.mark.parametrize("gate", [erf_gate, clamped_after, distant_limit, swapped_gate])
def test_another_gate_is_refused(gate: Gate) -> None:
    with pytest.raises(ValueError, match=r"^rank 1 of 2: Toy: got outputs that no activation .*: do otherwise$"):
        activation_of(Toy(gate))


def test_more_arithmetic_than_the_flags_say_is_refused() -> None:
    scaled = Toy(silu_gate)
    scaled.factor = 1 + 1e-5
    mislabelled = Toy(lambda toy, h: F.silu(h[..., ::2]) * h[..., 1::2])
    for toy in (scaled, Shifted(silu_gate), mislabelled):
        with pytest.raises(ValueError, match="no activation"):
            activation_of(toy)


def test_a_module_that_cannot_be_tried_is_refused() -> None:
    replaced, sized, extra, quantized = (Toy(silu_gate) for _ in range(4))
    replaced.forward = lambda *given: Toy.forward(replaced, *given)  # type: ignore[method-assign]
    sized.gate = lambda toy, h: silu_gate(toy, h).view(-1, INTERMEDIATE)
    extra.norm = nn.LayerNorm(HIDDEN)
    quantized.register_buffer("gate_up_proj_scale", torch.ones(1))
    refused = {"replaced in this object": replaced, "RuntimeError": sized, "norm.weight": extra, "_scale": quantized}
    for message, toy in refused.items():
        with pytest.raises(ValueError, match=f"Toy: got .*{message}"):
            activation_of(toy)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_arguments_are_views_of_the_parameters(is_transposed: bool) -> None:
    toy = Toy(silu_gate, has_bias=True, is_transposed=is_transposed, device="cpu")
    given = StoredExperts.of(toy, REFUSAL).arguments(dict(toy.named_parameters()))
    assert given.pop("gate_layout") == "concat"
    shapes = {"w1": (EXPERTS, 2 * INTERMEDIATE, HIDDEN), "w2": (EXPERTS, HIDDEN, INTERMEDIATE)}
    shapes |= {"b1": (EXPERTS, 2 * INTERMEDIATE), "b2": (EXPERTS, HIDDEN)}
    assert {name: tuple(tensor.shape) for name, tensor in given.items()} == shapes
    assert {w.data_ptr() for w in given.values()} == {p.data_ptr() for p in toy.parameters()}


def test_numbers_below_those_of_fp32_are_no_candidates() -> None:
    """An attribute that Swiglu does not take is no error of a module that does not use it."""
    toy = Toy(silu_gate)
    toy.limit, toy.my_alpha = math.inf, math.nan
    assert activation_of(toy) == ACTIVATIONS["swiglu"]
    toy.limit, toy.my_alpha = 1e300, math.inf
    assert activation_of(toy) == ACTIVATIONS["swiglu"]
    for toy.limit in (1e300, 1e-300, math.nan, -1.0):
        assert {one.limit for one in candidates(toy, gated=True) if isinstance(one, Swiglu)} == {math.inf}


def test_each_implementation_has_to_compute_the_same() -> None:
    def gate(toy: Toy, h: Tensor) -> Tensor:
        return (silu_gate if toy.config._experts_implementation == "eager" else relu_gate)(toy, h)

    toy = Toy(gate)
    assert activation_of(toy) == ACTIVATIONS["swiglu"]
    with pytest.raises(ValueError, match="no activation"):
        proven_activation(toy, StoredExperts.of(toy, REFUSAL), ("eager", "batched_mm"), REFUSAL)


def test_the_forward_runs_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        assert activation_of(Toy(lambda toy, h: silu_gate(toy, h) * torch.ones(()))) == ACTIVATIONS["swiglu"]
