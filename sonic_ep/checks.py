"""Every argument of a public call is checked here, before any communication. Values on a device are not read.

A wrong one raises ``ValueError`` (``TypeError`` for a wrong type) with rank, argument, got and expected. Tensors are
returned uncopied: once all shapes are right, ``for_kernels`` copies what kernels cannot read in place.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from sonic_ep.autograd_utils import raise_if_freed
from sonic_ep.backend import MoEOutput, RoutedOutput
from sonic_ep.compat import has_tangent
from sonic_ep.config import is_count
from sonic_ep.distributed.group import EPGroup
from sonic_ep.plan import PlanForm, RoutingPlan, form_of, malformed_field
from sonic_ep.sharding import is_dtensor

ROW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCORE_DTYPES = (*ROW_DTYPES, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
# Every rank counts the slots of every expert.
MOST_EXPERTS = 2**16
# Of H, and of rows of w1 an expert: int32 offsets in a tile of 256 rows, grids of at most 65535 blocks of 64 columns.
MOST_WIDTH = 2**21
MOST_SECONDS = 30 * 24 * 3600
# Of each weight with an H: how many dimensions it has, and which of them H is.
PLACES_OF_H = {"router_w": (2, 1), "w1": (3, 2), "w2": (3, 1)}
SWAPPED = ": cast it, unless ids and scores are swapped (torch.topk returns scores first)"

ObjectT = TypeVar("ObjectT")


@dataclass(frozen=True, kw_only=True)
class ArgumentChecker:
    """Checks one argument at a time; messages begin with this rank."""

    group: EPGroup

    def require(self, holds: bool, name: str, got: object, expected: object) -> None:
        """Raise ``ValueError`` unless ``holds``."""
        if not holds:
            raise self.error(name, got, expected)

    def error(self, name: str, got: object, expected: object) -> ValueError:
        """The error of an argument, or of a part of it, that is wrong."""
        return ValueError(f"{self.group}: {name}: got {got}, expected {expected}")

    def instance(self, name: str, value: object, kind: type[ObjectT], expected: str) -> ObjectT:
        """``value``, or ``TypeError`` if it is no ``kind``."""
        if not isinstance(value, kind):
            raise TypeError(f"{self.group}: {name}: got {type(value).__name__}, expected {expected}")
        return value

    def count(self, name: str, value: object, *, least: int = 1) -> None:
        """A whole number of at least ``least``."""
        if not is_count(value, least=least):
            self.require(False, name, described(value), f"a whole number of at least {least}")

    def whole(self, name: str, value: object) -> None:
        """A whole number that fits int64."""
        holds = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
        self.require(holds, name, described(value), "a whole number of 64 bits")

    def seconds(self, name: str, value: object) -> None:
        """A positive number of seconds."""
        holds = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MOST_SECONDS
        self.require(holds, name, described(value), f"a number of seconds above 0, at most {MOST_SECONDS}")

    def flag(self, name: str, value: object) -> bool:
        """A bool, not just something with a truth value."""
        self.require(isinstance(value, bool), name, described(value), "True or False")
        return bool(value)

    def named(self, name: str, value: object, choices: Mapping[str, ObjectT]) -> ObjectT:
        """The entry of ``choices`` called ``value``."""
        found = choices.get(value) if isinstance(value, str) else None
        self.require(found is not None, name, described(value), f"one of {', '.join(map(repr, choices))}")
        assert found is not None
        return found

    def dtype(self, name: str, value: object) -> torch.dtype:
        """A dtype of rows; None is PyTorch's default."""
        found = torch.get_default_dtype() if value is None else value
        self.require(found in ROW_DTYPES, name, described(found), " or ".join(map(str, ROW_DTYPES)))
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
            remedy = f"torch.cat({name}.unbind())" if tensor.is_nested else f"{name}.to_dense()"
            self.require(False, f"layout of {name}", got, f"{torch.strided}: pass {remedy}")
        if tensor.dtype not in dtypes:
            self.require(False, f"dtype of {name}", tensor.dtype, " or ".join(map(str, dtypes)) + hint)
        if like is None:
            self.transportable(f"device of {name}", tensor.device)
        elif tensor.device != like.device:
            remedy = "move the layer or its input"
            if tensor.is_meta:
                remedy = "it has no values: a layer gets some by to_empty(device=...) and reset_parameters()"
            expected = f"{like.device}, as the tensors before it: {remedy}"
            self.require(False, f"device of {name}", tensor.device, expected)
        if has_tangent(tensor):
            got = "got a tensor with a tangent of forward-mode differentiation, expected none"
            raise NotImplementedError(f"{self.group}: {name}: {got}: only backward is differentiated")
        raise_if_freed(self.group, name, tensor)
        return tensor

    def _plain_tensor(self, name: str, value: object) -> Tensor:
        """``value`` without its subclass, whose ``__torch_function__`` must not change what is computed."""
        if not isinstance(value, Tensor):
            got = f"{name}: got {type(value).__name__}, expected a torch.Tensor"
            raise TypeError(f"{self.group}: {got}{_tensor_inside(value)}")
        tensor: Tensor = value
        kind = type(tensor)
        # A FakeTensor, MaskedTensor or DTensor: its values are elsewhere, or there are none.
        if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            remedy = ": pass its to_local()" if is_dtensor(tensor) else ""
            expected = f"expected a torch.Tensor that holds its values{remedy}"
            raise TypeError(f"{self.group}: {name}: got {kind.__name__}, {expected}")
        return tensor if kind in (Tensor, nn.Parameter) else tensor.as_subclass(Tensor)


def described(value: object) -> str:
    """``value`` in a message: of a tensor its form, of another object a short ``repr``."""
    if not isinstance(value, Tensor):
        return " ".join(repr(value).split())[:80]
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__}"
    # Nested tensors have no shape.
    form = "nested" if value.is_nested else f"{value.layout} {tuple(value.shape)}"
    return f"{value.dtype} {form} on {value.device}"


def _tensor_inside(value: object) -> str:
    """Which tensor was meant, where ``value`` has one."""
    if isinstance(value, MoEOutput | RoutedOutput):
        return ": pass its .y"
    return ": pass its weight" if isinstance(value, nn.Module) else ""


def check_tokens(checker: ArgumentChecker, x: object) -> Tensor:
    """``x`` (T, H) or (..., H)."""
    tensor = checker.tensor("x", x, ROW_DTYPES, hint=": pass hidden states of one of these dtypes")
    shape = tuple(tensor.shape)
    if len(shape) < 2 or shape[-1] < 1:
        remedy = ": pass x[None] for one token" if len(shape) == 1 else ""
        checker.require(False, "shape of x", shape, f"(T, H) or (..., H), H at least 1{remedy}")
    checker.require(shape[-1] <= MOST_WIDTH, "hidden size H", shape[-1], f"at most {MOST_WIDTH}")
    return tensor


def refused_for(checker: ArgumentChecker, x: Tensor, weights: Mapping[str, object], error: ValueError) -> ValueError:
    """What to raise where ``error`` refuses a weight: one about x instead, if all weights agree and x alone differs.

    weights: router_w if there is one, w1 and w2, as the caller passed them.
    """
    held = _by_name(weights)
    if held is None:
        return error
    hidden = _wrong_hidden_size(x, held)
    if hidden:
        return checker.error("shape of x", tuple(x.shape), hidden)
    dtype = _wrong_dtype(x, held)
    return checker.error("dtype of x", x.dtype, dtype) if dtype else error


def _by_name(weights: Mapping[str, object]) -> dict[str, Tensor] | None:
    """The weights by name, gate and up apart; None if one is no tensor with a shape and a dtype."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        for place, part in enumerate(value if isinstance(value, tuple) else (value,)):
            plain = isinstance(part, Tensor) and (type(part) in (Tensor, nn.Parameter) or is_dtensor(part))
            if not plain or part.is_nested:
                return None
            found[f"{name}[{place}]" if isinstance(value, tuple) else name] = part
    return found


def _wrong_hidden_size(x: Tensor, held: Mapping[str, Tensor]) -> str:
    """What x should be, if all weights have one H and x another."""
    places = {name: PLACES_OF_H[name.partition("[")[0]] for name in held}
    if any(w.ndim != places[name][0] for name, w in held.items()):
        return ""
    sizes, hidden = {w.shape[places[name][1]] for name, w in held.items()}, x.shape[-1]
    # Weights of experts that lie the other way round agree with each other, too.
    lie_otherwise = "router_w" not in held and held["w2"].shape[2] == hidden
    if len(sizes) != 1 or hidden in sizes or lie_otherwise:
        return ""
    shapes = ", ".join(f"{name} {tuple(w.shape)}" for name, w in held.items())
    return f"a last dimension of H={sizes.pop()}, as {shapes}: pass x of the layer's hidden size"


def _wrong_dtype(x: Tensor, held: Mapping[str, Tensor]) -> str:
    """What x should be, if all weights have one dtype and x another. A router in fp32 fits every x."""
    voting = {name: w.dtype for name, w in held.items() if name != "router_w" or w.dtype != torch.float32}
    dtypes = set(voting.values())
    if len(dtypes) != 1 or x.dtype in dtypes or not dtypes <= set(ROW_DTYPES):
        return ""
    dtype, device = dtypes.pop(), x.device.type
    autocast = torch.is_autocast_enabled(device)
    if autocast and dtype == torch.float32:
        return ""
    remedy = f"pass x.to({dtype}), or cast the layer with layer.to({x.dtype})"
    if dtype == torch.float32:
        remedy += f", or call it under torch.autocast({device!r}), which casts fp32 weights to the dtype of x"
    elif autocast and x.dtype == torch.float32:
        remedy += " (under autocast, norms and sums may return fp32)"
    return f"{dtype}, as {', '.join(voting)}: {remedy}"


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
    idx_TK = checker.tensor("topk_idx", topk_idx, INDEX_DTYPES, x, SWAPPED)
    shape = tuple(idx_TK.shape)
    if len(shape) != 2:
        flat = ": pass topk_idx.flatten(0, -2)" if len(shape) > 2 else ""
        checker.require(False, "shape of topk_idx", shape, f"(T, K), one row for each token{flat}")
    checker.count("number of experts E", num_experts)
    check_experts_divide(checker, num_experts)
    checker.require(1 <= shape[1] <= num_experts, "K of topk_idx", shape[1], f"1 to E={num_experts}")
    if x is not None:
        checker.require(shape[0] == tokens_of(x), "tokens of topk_idx", shape[0], f"T={tokens_of(x)}, as x")
    return idx_TK


def check_scores(checker: ArgumentChecker, topk_scores: object, shape: tuple[int, int], like: Tensor) -> Tensor:
    """``topk_scores`` (T, K), any float."""
    scores_TK = checker.tensor("topk_scores", topk_scores, SCORE_DTYPES, like, SWAPPED)
    checker.shape("topk_scores", scores_TK, shape, "(T, K), as topk_idx")
    return scores_TK


def check_plan(checker: ArgumentChecker, plan: object) -> PlanForm:
    """The form of a plan of this rank and group whose tensors have kept theirs. Values are not read."""
    plan, group = (
        checker.instance("plan", plan, RoutingPlan, "a RoutingPlan: pass what ep.plan returned"),
        checker.group,
    )
    form = form_of(plan)
    if form is None:
        malformed = str(malformed_field(plan))
        checker.require(False, f"{malformed} of plan", described(getattr(plan, malformed)), "it as ep.plan made it")
    assert form is not None
    if plan.rank != group.rank or form.world_size != group.world_size:
        checker.require(
            False,
            "plan",
            f"a plan for rank {plan.rank} of {form.world_size}",
            f"one for {group}: make it with plan() of this object",
        )
    return form


def check_tokens_of_plan(checker: ArgumentChecker, x: object, plan: RoutingPlan) -> Tensor:
    """``x`` (T, H) or (..., H), with as many tokens as the plan has on this rank."""
    tensor = check_tokens(checker, x)
    checker.require(tensor.device == plan.slot_of_row.device, "device of x", tensor.device, plan.slot_of_row.device)
    tokens = tokens_of(tensor)
    checker.require(
        tokens == plan.num_tokens,
        "tokens of x",
        tokens,
        f"T={plan.num_tokens} of the plan: pass the x whose topk_idx made it",
    )
    return tensor


def check_rows_of_plan(checker: ArgumentChecker, rows: object, plan: RoutingPlan) -> Tensor:
    """``rows`` (N, H) of the plan, N at most R. That no valid row is missing is checked by the backend."""
    rows_RH = checker.tensor("rows", rows, ROW_DTYPES)
    device = plan.slot_of_row.device
    checker.require(rows_RH.device == device, "device of rows", rows_RH.device, device)
    shape = tuple(rows_RH.shape)
    fits = rows_RH.ndim == 2 and shape[0] <= plan.row_capacity and shape[1] >= 1
    checker.require(
        fits,
        "shape of rows",
        shape,
        f"(N, H), N from plan.rows() to R={plan.row_capacity}: pass one row for each of dispatch",
    )
    checker.require(shape[1] <= MOST_WIDTH, "hidden size H", shape[1], f"at most {MOST_WIDTH}")
    return rows_RH
