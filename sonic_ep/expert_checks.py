"""Checks of the experts' arguments: weights, biases, activation, and how they fit x and E. See ``sonic_ep.checks``."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sonic_ep.activation import ACTIVATIONS, GATE_LAYOUTS, Activation
from sonic_ep.autograd_utils import as_it_lies, for_kernels, trained_as
from sonic_ep.backend import ExpertWeights
from sonic_ep.checks import MOST_WIDTH, ArgumentChecker, described
from sonic_ep.sharding import local_of


@dataclass(frozen=True, kw_only=True)
class ExpertArguments:
    """The experts of a call as the caller passed them."""

    w1: object
    w2: object
    b1: object
    b2: object
    activation: object
    gate_layout: object


def check_activation(checker: ArgumentChecker, value: object) -> Activation:
    """The activation called ``value``, or ``value`` itself."""
    if isinstance(value, Activation):
        return value
    found = ACTIVATIONS.get(value) if isinstance(value, str) else None
    if found is None:
        expected = f"one of {', '.join(map(repr, ACTIVATIONS))}, a sonic_ep.Swiglu or a sonic_ep.Activation"
        checker.require(False, "activation", described(value), expected)
    assert found is not None
    return found


def check_experts(
    checker: ArgumentChecker, x: Tensor, given: ExpertArguments, num_experts: int | None
) -> ExpertWeights:
    """This rank's experts, with shapes that fit x, each other, and the router's E if there is a router."""
    activation = check_activation(checker, given.activation)
    layout = checker.named("gate_layout", given.gate_layout, GATE_LAYOUTS)
    split = isinstance(given.w1, tuple)
    if split and not activation.gated:
        checker.require(
            False, "w1", f"gate and up with activation {activation.name!r}", "one tensor: that activation has no gate"
        )
    w1 = _checked_parts(checker, "w1", given.w1, x, split=split)
    w2 = _check_weight(checker, "w2", given.w2, x)
    _check_w2(checker, x, w2, num_experts)
    rows, width = "I", w2.shape[2]
    if activation.gated and not split:
        rows, width = "2I", activation.up_width(w2.shape[2])
    expected = (w2.shape[0], width, x.shape[-1])
    for place, part in enumerate(w1):
        if part.shape != expected:
            name = f"w1[{place}]" if split else "w1"
            sides = f"(e, {rows}, H), e and I as w2 {tuple(w2.shape)}, H as x {tuple(x.shape)}"
            remedy = _remedy_for_w1(name, tuple(part.shape), expected, activation, split=split)
            checker.require(False, f"shape of {name}", tuple(part.shape), f"{expected} = {sides}{remedy}")
    checker.require(width <= MOST_WIDTH, f"{rows} of w1", width, f"at most {MOST_WIDTH}")
    b1, b2 = _check_biases(checker, x, given, expected[:2], split=split)
    return ExpertWeights(
        w1=(w1[0], w1[1]) if split else w1[0],
        w2=w2,
        b1=b1,
        b2=b2,
        activation=activation,
        # Split gates and ups lie as those of this layout do, in two tensors.
        layout=GATE_LAYOUTS["concat"] if split else layout,
    )


def _check_w2(checker: ArgumentChecker, x: Tensor, w2: Tensor, num_experts: int | None) -> None:
    """(e, H, I), with H of x, and e of the router's E if there is a router."""
    shape, hidden, world_size = tuple(w2.shape), x.shape[-1], checker.group.world_size
    if len(shape) != 3 or shape[1] != hidden:
        stored_otherwise = len(shape) == 3 and shape[2] == hidden
        remedy = ": stored as (e, I, H), pass w2.transpose(1, 2)" if stored_otherwise else ""
        sides = f"(e, {hidden}, I) = (e, H, I), H as x {tuple(x.shape)}"
        checker.require(False, "shape of w2", shape, f"{sides}{remedy}")
    checker.require(shape[0] >= 1, "shape of w2", shape, "at least one expert on this rank")
    if num_experts is not None and shape[0] != num_experts // world_size:
        whole = shape[0] == num_experts
        remedy = ": pass this rank's share of w1 and w2, not all of them" if whole else ""
        share = f"e={num_experts // world_size}: router_w has E={num_experts} experts, the group W={world_size} ranks"
        checker.require(False, "experts of w2", shape[0], f"{share}{remedy}")


def _remedy_for_w1(
    name: str, shape: tuple[int, ...], expected: tuple[int, int, int], activation: Activation, *, split: bool
) -> str:
    """What to do about a w1 of ``shape``, where that can be told."""
    held, width, hidden = expected
    if shape == (held, hidden, width):
        return f": stored as (e, H, rows), pass {name}.transpose(1, 2)"
    whole = activation.gated and not split
    if whole and shape == (held, width // 2, hidden):
        return f": {activation.name!r} has a gate and takes 2I rows, an activation without one takes I"
    if not whole and shape == (held, 2 * width, hidden):
        return (
            ": pass gate and up in one tensor as w1 itself"
            if split
            else f": {activation.name!r} has no gate and takes I rows"
        )
    return ""


def _check_biases(
    checker: ArgumentChecker, x: Tensor, given: ExpertArguments, shape: tuple[int, int], *, split: bool
) -> tuple[Tensor | tuple[Tensor, Tensor] | None, Tensor | None]:
    """b1 of ``shape``, gate and up if ``split``, and b2 (e, H); or None and None."""
    biases = [name for name in ("b1", "b2") if getattr(given, name) is not None]
    checker.require(len(biases) != 1, "biases", f"{biases} alone", "b1 and b2, or neither")
    if not biases:
        return None, None
    b1 = _checked_parts(checker, "b1", given.b1, x, split=split)
    b2 = _check_weight(checker, "b2", given.b2, x)
    for place, part in enumerate(b1):
        checker.shape(f"b1[{place}]" if split else "b1", part, shape, "(e, rows of w1)")
    checker.shape("b2", b2, (shape[0], x.shape[-1]), "(e, H), as w2")
    return (b1[0], b1[1]) if split else b1[0], b2


def _check_weight(checker: ArgumentChecker, name: str, value: object, x: Tensor) -> Tensor:
    """In the dtype of x; fp32 where x is of half precision and autocast is on: see ``experts_as_read``."""
    dtypes: tuple[torch.dtype, ...] = (x.dtype,)
    hint = ", the dtype of x: cast this weight to it"
    value = local_of(checker.group, name, value)
    if x.dtype != torch.float32:
        if torch.is_autocast_enabled(x.device.type):
            dtypes, hint = (x.dtype, torch.float32), ": the dtype of x, or fp32, which is cast to it under autocast"
        else:
            hint = ", the dtype of x: cast this weight to it, or call under torch.autocast, which casts fp32 weights"
    return checker.tensor(name, value, dtypes, x, hint)


def _checked_parts(checker: ArgumentChecker, name: str, value: object, x: Tensor, *, split: bool) -> tuple[Tensor, ...]:
    """The tensor, or gate and up if ``split``."""
    if not split:
        checker.require(not isinstance(value, tuple), name, "a tuple", "one tensor, as w1")
        if isinstance(value, list):
            expected = "expected a torch.Tensor, or the tuple (gate, up) for w1 and for b1"
            raise TypeError(f"{checker.group}: {name}: got list, {expected}")
        return (_check_weight(checker, name, value, x),)
    parts = value if isinstance(value, tuple) else ()
    if len(parts) != 2:
        got = f"{len(parts)} tensors" if isinstance(value, tuple) else f"a {type(value).__name__}"
        checker.require(False, name, got, "a tuple of two tensors, gate and up, as w1 is a tuple")
    return tuple(_check_weight(checker, f"{name}[{place}]", part, x) for place, part in enumerate(parts))


def experts_as_read(experts: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """``experts`` in ``dtype`` with tensors that kernels can read: weights of any strides, contiguous biases."""
    read = {name: _weight_as_read(name, tensor, dtype) for name, tensor in experts.tensors.items()}
    copied = any(read[name] is not tensor for name, tensor in experts.tensors.items())
    return experts.with_tensors(read) if copied else experts


def _weight_as_read(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor if tensor.dtype == dtype else tensor.to(dtype)
    # Kernels reckon within a tile in int32.
    as_stored = name.startswith("w") and max(cast.stride()[1:]) <= MOST_WIDTH
    held = as_it_lies(cast) if as_stored else for_kernels(cast)
    return trained_as(tensor, held)
