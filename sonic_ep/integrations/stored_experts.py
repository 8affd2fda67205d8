"""How experts modules of other libraries store their weights, and the proof that ``moe_routed`` computes the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import inf
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sonic_ep.activation import ACTIVATIONS, GATE_LAYOUTS, Activation, Swiglu
from sonic_ep.distributed.group import EPGroup

DOWN = "down_proj"
# By whether there is a gate: the up-projection in one parameter, or gates and ups in two.
UP_NAMES: Mapping[bool, list[tuple[str, ...]]] = {
    True: [("gate_up_proj",), ("gate_proj", "up_proj")],
    False: [("up_proj",)],
}
# Attributes of an experts class, with what holds where it lacks one.
FLAGS = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
FP32 = torch.finfo(torch.float32)
# The number of the activation "quick_gelu".
QUICK_GELU_ALPHA = 1.702


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Makes errors about an experts module. group: of EP. module: its class. remedy: what to do instead."""

    group: EPGroup
    module: str
    remedy: str

    def of(self, got: str, expected: str) -> ValueError:
        """To raise."""
        return ValueError(f"{self.group}: {self.module}: got {got}, expected {expected}: {self.remedy}")


@dataclass(frozen=True, kw_only=True)
class StoredExperts:
    """How an experts module stores its parameters.

    up: names of the up-projection: one parameter, or gates and ups in two. biased: each has a bias, ``<name>_bias``.
    transposed: the parameters are (e, H, 2I or I) and (e, I, H), not (e, 2I or I, H) and (e, H, I).
    """

    up: tuple[str, ...]
    gated: bool
    biased: bool
    transposed: bool
    gate_layout: str

    @classmethod
    def of(cls, experts: nn.Module, refusal: Refusal) -> StoredExperts:
        """What the module's flags and the names of its parameters say. Raises ``ValueError`` for other parameters."""
        flags = {name: bool(getattr(experts, name, default)) for name, default in FLAGS.items()}
        kept = {name for name, _ in (*experts.named_parameters(), *experts.named_buffers())}
        for up in UP_NAMES[flags["has_gate"]]:
            stored = cls(
                up=up,
                gated=flags["has_gate"],
                biased=flags["has_bias"],
                transposed=flags["is_transposed"],
                gate_layout="concat" if flags["is_concatenated"] else "interleaved",
            )
            if set(stored.names) == kept:
                return stored
        expected = " and ".join(stored.names)
        raise refusal.of(f"parameters and buffers {', '.join(sorted(kept))}", f"{expected}, and no others")

    @property
    def names(self) -> tuple[str, ...]:
        """Of all parameters."""
        weights = (*self.up, DOWN)
        return (*weights, *(f"{name}_bias" for name in weights)) if self.biased else weights

    def arguments(self, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
        """w1, w2, b1, b2 and gate_layout of ``moe_routed``: views, no copies."""
        stored = {name: parameters[name] for name in self.names}
        if self.transposed:
            stored |= {name: stored[name].transpose(1, 2) for name in (*self.up, DOWN)}
        given = {"w1": _one_or_two([stored[name] for name in self.up]), "w2": stored[DOWN]}
        if self.biased:
            given |= {"b1": _one_or_two([stored[f"{name}_bias"] for name in self.up]), "b2": stored[f"{DOWN}_bias"]}
        return {**given, "gate_layout": self.gate_layout}


def _one_or_two(parts: list[Tensor]) -> Any:
    return parts[0] if len(parts) == 1 else tuple(parts)


@torch.no_grad()
def proven_activation(
    experts: nn.Module, stored: StoredExperts, implementations: tuple[str, ...], refusal: Refusal
) -> Activation:
    """The activation with which ``moe_routed`` gives what the module's own forward does. ``ValueError`` if none.

    A copy of the module runs in fp64, on the CPU, with two experts of small weights, on tokens of norms from 1e-2 to
    1e5, so that some numbers exceed any limit of a Swiglu. It runs once for each of ``implementations``, values of its
    config's ``_experts_implementation``. Rows have to agree to the rounding of fp32, in which some modules compute.
    """
    if "forward" in vars(experts):
        raise refusal.of("a forward that was replaced in this object", "the forward of its class")
    problem = SmallProblem.of(stored)
    try:
        # A model may be built with another default device.
        with torch.device("cpu"):
            theirs = [problem.by_module(experts, implementation) for implementation in implementations]
    except Exception as error:
        failed = f"a forward that fails with other weights ({type(error).__name__}: {error})"
        raise refusal.of(failed, "one whose sizes follow from its weights") from error
    for activation in candidates(experts, stored.gated):
        ours_TH = problem.by_formula(stored, activation)
        if all(problem.agrees(theirs_TH, ours_TH) for theirs_TH in theirs):
            return activation
    gate = type(getattr(experts, "act_fn", experts)).__name__
    known = ", ".join(name for name, one in ACTIVATIONS.items() if one.gated == stored.gated)
    raise refusal.of(f"outputs that no activation of sonic_ep gives (act_fn: {gate})", f"{known} or a Swiglu")


def candidates(experts: nn.Module, gated: bool) -> Iterator[Activation]:
    """Activations that the module may have. Swiglu's numbers are the attributes named ...alpha and ...limit."""
    yield from (activation for activation in ACTIVATIONS.values() if activation.gated == gated)
    numbers = {name: value for name, value in vars(experts).items() if isinstance(value, int | float)}
    fit = {name: value for name, value in numbers.items() if FP32.tiny <= value <= FP32.max}
    alphas, limits = ({float(value) for name, value in fit.items() if name.endswith(end)} for end in ("alpha", "limit"))
    if gated:
        for alpha, limit, up_offset in product({1.0, QUICK_GELU_ALPHA} | alphas, {inf} | limits, (0.0, 1.0)):
            yield Swiglu(alpha=alpha, limit=limit, up_offset=up_offset)


@dataclass(frozen=True, kw_only=True)
class SmallProblem:
    """Two experts and T tokens in fp64: x (T, H), ids and scores (T, 2), parameters by name.

    Numbers are whole, those of token t times ``SCALES[t % len(SCALES)]``, so that up-projections are exact in fp32 too.
    """

    x_TH: Tensor
    ids_TK: Tensor
    scores_TK: Tensor
    parameters: Mapping[str, Tensor]

    EXPERTS: ClassVar[int] = 2
    HIDDEN: ClassVar[int] = 4
    INTERMEDIATE: ClassVar[int] = 3
    LARGEST: ClassVar[int] = 8
    SCALES: ClassVar[tuple[float, ...]] = tuple(2.0**power for power in (-10, -7, -5, -4, -3, -2, -1, 0, 3, 14))
    ROUNDS: ClassVar[int] = 16

    @classmethod
    def of(cls, stored: StoredExperts) -> SmallProblem:
        """With parameters as the module stores them."""
        generator = torch.Generator("cpu").manual_seed(0)

        def whole(*shape: int) -> Tensor:
            drawn = torch.randint(-cls.LARGEST, cls.LARGEST + 1, shape, generator=generator, device="cpu")
            return drawn.double()

        width = cls.INTERMEDIATE * (2 if stored.gated and len(stored.up) == 1 else 1)
        sizes = dict.fromkeys(stored.up, (width, cls.HIDDEN)) | {DOWN: (cls.HIDDEN, cls.INTERMEDIATE)}
        parameters = {}
        for name, (rows, columns) in sizes.items():
            parameters[name] = whole(cls.EXPERTS, *((columns, rows) if stored.transposed else (rows, columns)))
            parameters[f"{name}_bias"] = whole(cls.EXPERTS, rows)
        scales_T1 = torch.tensor(cls.SCALES, dtype=torch.float64, device="cpu").repeat(cls.ROUNDS).unsqueeze(1)
        ids_TK = torch.tensor([[0, 1], [1, 0], [0, 0], [1, 1]], device="cpu").repeat(len(scales_T1) // 4, 1)
        return cls(
            x_TH=whole(len(scales_T1), cls.HIDDEN) * scales_T1,
            ids_TK=ids_TK,
            scores_TK=whole(len(scales_T1), 2),
            parameters={name: parameters[name] for name in stored.names},
        )

    def by_module(self, experts: nn.Module, implementation: str) -> Tensor:
        """(T, H), by the forward of the module's class, of the implementation that the config names."""
        small = copy.copy(experts)
        config = SimpleNamespace(**vars(getattr(experts, "config", SimpleNamespace())))
        config._experts_implementation = implementation
        vars(small).update(_parameters=dict(self.parameters), num_experts=self.EXPERTS, config=config)
        y_TH: Tensor = type(experts).forward(small, self.x_TH, self.ids_TK, self.scores_TK)
        return y_TH

    def by_formula(self, stored: StoredExperts, activation: Activation) -> Tensor:
        """(T, H), by what ``moe_routed`` computes."""
        given, layout = stored.arguments(self.parameters), GATE_LAYOUTS[stored.gate_layout]
        nothing = self.x_TH.new_zeros(())
        w1, b1, b2 = given["w1"], given.get("b1", nothing), given.get("b2", nothing)
        if len(stored.up) == 2:
            layout, w1 = GATE_LAYOUTS["concat"], torch.cat(w1, dim=1)
            b1 = torch.cat(b1, dim=1) if stored.biased else b1
        h_TKF = torch.einsum("th,tkfh->tkf", self.x_TH, w1[self.ids_TK]) + self._of_slots(b1)
        a_TKI = activation(h_TKF, layout)
        y_TKH = torch.einsum("tki,tkhi->tkh", a_TKI, given["w2"][self.ids_TK]) + self._of_slots(b2)
        return (y_TKH * self.scores_TK.unsqueeze(2)).sum(dim=1)

    def agrees(self, got_TH: Tensor, expected_TH: Tensor) -> bool:
        """Whether each row is within the rounding of fp32, of its norm or of that usual of its scale, if larger."""
        if got_TH.shape != expected_TH.shape:
            return False
        units = 2 * (self.HIDDEN + self.INTERMEDIATE + self.EXPERTS)
        size_RN = expected_TH.norm(dim=1).view(self.ROUNDS, len(self.SCALES))
        distance_RN = (got_TH - expected_TH).norm(dim=1).view_as(size_RN)
        size_RN = size_RN.maximum(size_RN.square().mean(dim=0).sqrt())
        return bool((distance_RN <= units * FP32.eps * size_RN).all())

    def _of_slots(self, bias: Tensor) -> Tensor:
        return bias[self.ids_TK] if bias.ndim else bias
