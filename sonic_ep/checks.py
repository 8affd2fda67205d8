"""Every argument of a public call is checked here, before any communication. Values on a device are not read.

A wrong one raises ``ValueError`` (``TypeError`` for a wrong type) with rank, argument, got and expected. Tensors are
returned uncopied: once all shapes are right, ``for_kernels`` copies what kernels cannot read in place.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sonic_ep.activation import ACTIVATIONS, GATE_LAYOUTS, Activation
from sonic_ep.autograd_utils import as_it_lies, for_kernels, raise_if_freed
from sonic_ep.backend import ExpertWeights
from sonic_ep.compat import has_tangent
from sonic_ep.config import is_count
from sonic_ep.distributed.group import EPGroup
from sonic_ep.plan import PlanForm, RoutingPlan, form_of, malformed_field
from sonic_ep.sharding import is_dtensor, local_of

ROW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCORE_DTYPES = (*ROW_DTYPES, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
# Every rank counts the slots of every expert.
MOST_EXPERTS = 2**16
# Of H, and of rows of w1 an expert: int32 offsets in a tile of 256 rows, grids of at most 65535 blocks of 64 columns.
MOST_WIDTH = 2**21
MOST_SECONDS = 30 * 24 * 3600

ObjectT = TypeVar("ObjectT")


@dataclass(frozen=True, kw_only=True)
class ExpertArguments:
    """The experts of a call as the caller passed them."""

    w1: object
    w2: object
    b1: object
    b2: object
    activation: object
    gate_layout: object


@dataclass(frozen=True, kw_only=True)
class ArgumentChecker:
    """Checks one argument at a time; messages begin with this rank."""

    group: EPGroup

    def require(self, holds: bool, name: str, got: object, expected: object) -> None:
        """Raise ``ValueError`` unless ``holds``."""
        if not holds:
            raise ValueError(f"{self.group}: {name}: got {got}, expected {expected}")

    def instance(self, name: str, value: object, kind: type[ObjectT], expected: str) -> ObjectT:
        """``value``, or ``TypeError`` if it is no ``kind``."""
        if not isinstance(value, kind):
            raise TypeError(f"{self.group}: {name}: got {type(value).__name__}, expected {expected}")
        return value

    def count(self, name: str, value: object, *, least: int = 1) -> None:
        """A whole number of at least ``least``."""
        self.require(is_count(value, least=least), name, repr(value), f"a whole number of at least {least}")

    def whole(self, name: str, value: object) -> None:
        """A whole number that fits int64."""
        holds = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
        self.require(holds, name, repr(value), "a whole number of 64 bits")

    def seconds(self, name: str, value: object) -> None:
        """A positive number of seconds."""
        holds = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MOST_SECONDS
        self.require(holds, name, repr(value), f"a number of seconds above 0, at most {MOST_SECONDS}")

    def flag(self, name: str, value: object) -> bool:
        """A bool, not just something with a truth value."""
        self.require(isinstance(value, bool), name, repr(value), "True or False")
        return bool(value)

    def named(self, name: str, value: object, choices: Mapping[str, ObjectT]) -> ObjectT:
        """The entry of ``choices`` called ``value``."""
        found = choices.get(value) if isinstance(value, str) else None
        self.require(found is not None, name, repr(value), f"one of {', '.join(map(repr, choices))}")
        assert found is not None
        return found

    def dtype(self, name: str, value: object) -> torch.dtype:
        """A dtype of rows; None is PyTorch's default."""
        found = torch.get_default_dtype() if value is None else value
        self.require(found in ROW_DTYPES, name, repr(found), " or ".join(map(str, ROW_DTYPES)))
        assert isinstance(found, torch.dtype)
        return found

    def device(self, name: str, value: object) -> torch.device:
        """A device or its name."""
        if not isinstance(value, str):
            return self.instance(name, value, torch.device, "a torch.device or its name")
        try:
            return torch.device(value)
        except RuntimeError:
            raise ValueError(f"{self.group}: {name}: got {value!r}, expected the name of a device") from None

    def transportable(self, name: str, device: torch.device) -> None:
        """A device whose tensors the process group moves; without a process group, any that holds data."""
        self.require(device.type != "meta", name, device, "a device that holds data")
        kinds = self.group.device_types()
        if kinds is not None and device.type not in kinds:
            self.require(False, name, device, f"one that the process group moves: {', '.join(sorted(kinds))}")

    def shape(self, name: str, tensor: Tensor, expected: tuple[int, ...], letters: str) -> None:
        """Exactly the shape ``expected``, which ``letters`` explains."""
        if tensor.shape != expected:
            self.require(False, f"shape of {name}", tuple(tensor.shape), f"{expected} = {letters}")

    def tensor(
        self, name: str, value: object, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None, hint: str = ""
    ) -> Tensor:
        """A dense tensor of one of ``dtypes``, on the device of ``like`` or else on one that the group moves.

        hint: what an error about the dtype says besides.
        Returned uncopied, as a plain ``torch.Tensor``. Raises ``NotImplementedError`` for a forward-mode tangent.
        """
        tensor = self._plain_tensor(name, value)
        # Nothing is formatted for what is right: every call of the layer comes through here some five times.
        if tensor.is_nested or tensor.layout != torch.strided:
            got = "a nested tensor" if tensor.is_nested else tensor.layout
            self.require(False, f"layout of {name}", got, torch.strided)
        if tensor.dtype not in dtypes:
            self.require(False, f"dtype of {name}", tensor.dtype, " or ".join(map(str, dtypes)) + hint)
        if like is None:
            self.transportable(f"device of {name}", tensor.device)
        elif tensor.device != like.device:
            self.require(False, f"device of {name}", tensor.device, like.device)
        if has_tangent(tensor):
            got = "got a tensor with a tangent of forward-mode differentiation, expected none"
            raise NotImplementedError(f"{self.group}: {name}: {got}: only backward is differentiated")
        raise_if_freed(self.group, name, tensor)
        return tensor

    def _plain_tensor(self, name: str, value: object) -> Tensor:
        """``value`` without its subclass, whose ``__torch_function__`` must not change what is computed."""
        tensor = self.instance(name, value, Tensor, "a torch.Tensor")
        kind = type(tensor)
        # A FakeTensor, MaskedTensor or DTensor: its values are elsewhere, or there are none.
        if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            remedy = ": pass its to_local()" if is_dtensor(tensor) else ""
            expected = f"expected a torch.Tensor that holds its values{remedy}"
            raise TypeError(f"{self.group}: {name}: got {kind.__name__}, {expected}")
        return tensor if kind in (Tensor, nn.Parameter) else tensor.as_subclass(Tensor)


def check_tokens(checker: ArgumentChecker, x: object) -> Tensor:
    """``x`` (T, H) or (..., H)."""
    tensor = checker.tensor("x", x, ROW_DTYPES)
    shape = tuple(tensor.shape)
    checker.require(tensor.ndim >= 2 and shape[-1] >= 1, "shape of x", shape, "(T, H) or (..., H), H at least 1")
    checker.require(shape[-1] <= MOST_WIDTH, "hidden size H", shape[-1], f"at most {MOST_WIDTH}")
    return tensor


def check_hidden_size(checker: ArgumentChecker, x: Tensor, router_w: object, w1: object, w2: object) -> None:
    """Blame x, and no weight, where all weights have one H and x has another."""
    ups = w1 if isinstance(w1, tuple) else (w1,)
    given: list[tuple[str, Any, int, int]] = [
        ("router_w", router_w, 2, 1),
        *(("w1", up, 3, 2) for up in ups),
        ("w2", w2, 3, 1),
    ]
    dense = [held for held in given if isinstance(held[1], Tensor) and not held[1].is_nested]
    found = {name: w.shape[at] for name, w, ndim, at in dense if w.ndim == ndim}
    hidden = set(found.values())
    if len(found) >= 2 and len(hidden) == 1 and x.shape[-1] not in hidden:
        shapes = ", ".join(f"{name} {tuple(w.shape)}" for name, w, *_ in dense if name in found)
        expected = f"a last dimension of H={hidden.pop()}, as {shapes}"
        checker.require(False, "shape of x", tuple(x.shape), expected)


def tokens_of(x: Tensor) -> int:
    """T of ``x`` (T, H) or (..., H)."""
    return x.shape[:-1].numel()


def check_experts_divide(checker: ArgumentChecker, num_experts: int) -> None:
    """E is a multiple of W, and at most ``MOST_EXPERTS``."""
    world_size = checker.group.world_size
    checker.require(num_experts <= MOST_EXPERTS, "number of experts E", num_experts, f"at most {MOST_EXPERTS}")
    divides = num_experts % world_size == 0
    checker.require(divides, "number of experts E", num_experts, f"a multiple of the group's W={world_size} ranks")


def check_top_k(checker: ArgumentChecker, top_k: int, num_experts: int) -> None:
    """1 <= K <= E."""
    checker.count("top_k", top_k)
    checker.require(top_k <= num_experts, "top_k", top_k, f"at most E={num_experts}")


def check_routing(checker: ArgumentChecker, topk_idx: object, num_experts: int, x: Tensor | None = None) -> Tensor:
    """``topk_idx`` (T, K), for the tokens of ``x`` if given. The ids themselves are checked by the backend."""
    idx_TK = checker.tensor("topk_idx", topk_idx, INDEX_DTYPES, x)
    shape = tuple(idx_TK.shape)
    checker.require(idx_TK.ndim == 2, "shape of topk_idx", shape, "(T, K)")
    checker.count("number of experts E", num_experts)
    check_experts_divide(checker, num_experts)
    checker.require(1 <= shape[1] <= num_experts, "K of topk_idx", shape[1], f"1 to E={num_experts}")
    if x is not None:
        checker.require(shape[0] == tokens_of(x), "tokens of topk_idx", shape[0], f"T={tokens_of(x)}, as x")
    return idx_TK


def check_scores(checker: ArgumentChecker, topk_scores: object, shape: tuple[int, int], like: Tensor) -> Tensor:
    """``topk_scores`` (T, K), any float."""
    scores_TK = checker.tensor("topk_scores", topk_scores, SCORE_DTYPES, like)
    checker.shape("topk_scores", scores_TK, shape, "(T, K), as topk_idx")
    return scores_TK


def check_activation(checker: ArgumentChecker, value: object) -> Activation:
    """The activation called ``value``, or ``value`` itself."""
    if isinstance(value, Activation):
        return value
    found = ACTIVATIONS.get(value) if isinstance(value, str) else None
    expected = f"one of {', '.join(map(repr, ACTIVATIONS))}, a sonic_ep.Swiglu or a sonic_ep.Activation"
    checker.require(found is not None, "activation", repr(value), expected)
    assert found is not None
    return found


def check_experts(
    checker: ArgumentChecker, x: Tensor, given: ExpertArguments, num_experts: int | None
) -> ExpertWeights:
    """This rank's experts, with shapes that fit x, each other, and the router's E if there is a router."""
    activation = check_activation(checker, given.activation)
    layout = checker.named("gate_layout", given.gate_layout, GATE_LAYOUTS)
    split = isinstance(given.w1, tuple)
    checker.require(
        activation.gated or not split, "w1", f"gate and up with activation {activation.name!r}", "one tensor"
    )
    w1 = _checked_parts(checker, "w1", given.w1, x, split=split)
    w2 = _check_weight(checker, "w2", given.w2, x)
    hidden = x.shape[-1]
    checker.require(w2.ndim == 3, "shape of w2", tuple(w2.shape), f"(e, {hidden}, I) = (e, H, I), H as x")
    held = w2.shape[0] if num_experts is None else num_experts // checker.group.world_size
    width = w2.shape[2] if split else activation.up_width(w2.shape[2])
    checker.require(held >= 1, "shape of w2", tuple(w2.shape), "at least one expert on this rank")
    checker.shape(
        "w2", w2, (held, hidden, w2.shape[2]), "(e, H, I), H as x; stored as (e, I, H), pass w2.transpose(1, 2)"
    )
    whole_of_two = activation.gated and not split
    rows = "2I" if whole_of_two else "I"
    letters = f"(e, {rows}, H), H as x; stored as (e, H, {rows}), pass its transpose(1, 2)"
    for place, part in enumerate(w1):
        name = f"w1[{place}]" if split else "w1"
        checker.shape(name, part, (held, width, hidden), letters)
    checker.require(width <= MOST_WIDTH, f"{rows} of w1", width, f"at most {MOST_WIDTH}")
    b1, b2 = _check_biases(checker, x, given, (held, width), split=split)
    return ExpertWeights(
        w1=(w1[0], w1[1]) if split else w1[0],
        w2=w2,
        b1=b1,
        b2=b2,
        activation=activation,
        # Split gates and ups lie as those of this layout do, in two tensors.
        layout=GATE_LAYOUTS["concat"] if split else layout,
    )


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
    checker.shape("b2", b2, (shape[0], x.shape[-1]), "(e, H)")
    return (b1[0], b1[1]) if split else b1[0], b2


def _check_weight(checker: ArgumentChecker, name: str, value: object, x: Tensor) -> Tensor:
    """In the dtype of x; fp32 where x is of half precision and autocast is on: see ``experts_as_read``."""
    dtypes = [x.dtype]
    value = local_of(checker.group, name, value)
    if x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type):
        dtypes.append(torch.float32)
    hint = _dtype_hint(x, value.dtype) if isinstance(value, Tensor) and value.dtype not in dtypes else ""
    return checker.tensor(name, value, tuple(dtypes), x, hint)


def _dtype_hint(x: Tensor, dtype: torch.dtype) -> str:
    """What to do where a weight of ``dtype`` meets x."""
    hint = f", the dtype of x: pass x.to({dtype}), or cast the layer to {x.dtype}"
    if dtype == torch.float32:
        return f"{hint}; under torch.autocast({x.device.type!r}) fp32 weights are cast to the dtype of x"
    # What a norm or a residual returns.
    return f"{hint}; under autocast x may be fp32 after a norm" if x.dtype == torch.float32 else hint


def _checked_parts(checker: ArgumentChecker, name: str, value: object, x: Tensor, *, split: bool) -> tuple[Tensor, ...]:
    """The tensor, or gate and up if ``split``."""
    if not split:
        checker.require(not isinstance(value, tuple), name, "a tuple", "one tensor, as w1")
        if isinstance(value, list):
            expected = "expected a torch.Tensor, or the tuple (gate, up) for w1 and for b1"
            raise TypeError(f"{checker.group}: {name}: got list, {expected}")
        return (_check_weight(checker, name, value, x),)
    parts = value if isinstance(value, tuple) else ()
    got = f"{len(parts)} tensors" if isinstance(value, tuple) else f"a {type(value).__name__}"
    checker.require(len(parts) == 2, name, got, "a tuple of two tensors, gate and up")
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
    # Reentrant checkpointing runs the first forward without gradients, which a copy would not require.
    return held.requires_grad_() if tensor.requires_grad and not held.requires_grad else held


def check_plan(checker: ArgumentChecker, plan: object) -> PlanForm:
    """The form of a plan of this rank and group whose tensors have kept theirs. Values are not read."""
    plan, group = checker.instance("plan", plan, RoutingPlan, "a RoutingPlan"), checker.group
    form = form_of(plan)
    if form is None:
        malformed = str(malformed_field(plan))
        checker.require(False, f"{malformed} of plan", _described(getattr(plan, malformed)), "it as ep.plan made it")
    assert form is not None
    if plan.rank != group.rank or form.world_size != group.world_size:
        checker.require(False, "plan", f"a plan for rank {plan.rank} of {form.world_size}", f"one for {group}")
    return form


def _described(value: object) -> str:
    if type(value) is not Tensor:
        return repr(value)[:80]
    # Nested tensors have no shape.
    form = "nested" if value.is_nested else f"{value.layout} {tuple(value.shape)}"
    return f"{value.dtype} {form} on {value.device}"


def check_tokens_of_plan(checker: ArgumentChecker, x: object, plan: RoutingPlan) -> Tensor:
    """``x`` (T, H) or (..., H), with as many tokens as the plan has on this rank."""
    tensor = check_tokens(checker, x)
    checker.require(tensor.device == plan.slot_of_row.device, "device of x", tensor.device, plan.slot_of_row.device)
    tokens = tokens_of(tensor)
    checker.require(tokens == plan.num_tokens, "tokens of x", tokens, f"T={plan.num_tokens} of the plan")
    return tensor


def check_rows_of_plan(checker: ArgumentChecker, rows: object, plan: RoutingPlan) -> Tensor:
    """``rows`` (N, H) of the plan, N at most R. That no valid row is missing is checked by the backend."""
    rows_RH = checker.tensor("rows", rows, ROW_DTYPES)
    device = plan.slot_of_row.device
    checker.require(rows_RH.device == device, "device of rows", rows_RH.device, device)
    shape = tuple(rows_RH.shape)
    fits = rows_RH.ndim == 2 and shape[0] <= plan.row_capacity and shape[1] >= 1
    checker.require(fits, "shape of rows", shape, f"(N, H), N from plan.rows() to R={plan.row_capacity}")
    checker.require(shape[1] <= MOST_WIDTH, "hidden size H", shape[1], f"at most {MOST_WIDTH}")
    return rows_RH
