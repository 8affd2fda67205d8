"""The public edge: every argument is held against what the call expects, before any communication.

Each finding is a ``ValueError`` (``TypeError`` for what is no tensor at all) that names the rank, the argument, what
was got and what was expected. Tensors come back as they are: nothing is copied before all shapes of a call are right,
and then ``rows_of_tokens``, ``experts_as_read`` and ``for_kernels`` make of them what kernels read. Values on a
device are not read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NoReturn, TypeVar

import torch
from torch import Tensor, nn

from sonic_ep.activation import ACTIVATIONS, GATE_LAYOUTS
from sonic_ep.autograd_utils import for_kernels, raise_if_freed
from sonic_ep.backend import Experts
from sonic_ep.compat import has_tangent
from sonic_ep.config import RouterOptions, is_count
from sonic_ep.distributed.group import EPGroup
from sonic_ep.plan import INDEX_DTYPE, RoutingPlan, malformed_field

ROW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)
# A month.
MOST_SECONDS = 30 * 24 * 3600
SCORE_DTYPES = (*ROW_DTYPES, torch.float64)
# Every rank counts the slots of all of them.
MOST_EXPERTS = 2**16
# Maximum of H and of the rows of w1 for each expert: int32 offsets in a tile of 256 rows, and grids of at most 65535
# blocks of 64 columns.
MOST_WIDTH = 2**21

ObjectT = TypeVar("ObjectT")


@dataclass(frozen=True, kw_only=True)
class ExpertArguments:
    """The experts of a call, as its caller wrote them."""

    w1: object
    w2: object
    b1: object
    b2: object
    activation: object
    gate_layout: object


@dataclass(frozen=True, kw_only=True)
class ArgumentChecker:
    """Checks one argument at a time and says whose it was."""

    group: EPGroup

    def require(self, holds: bool, name: str, got: object, expected: object) -> None:
        """Raise ``ValueError`` unless ``holds``."""
        if not holds:
            raise ValueError(f"{self.group}: {name}: got {got}, expected {expected}")

    def count(self, name: str, value: object, *, least: int = 1) -> None:
        """A whole number of at least ``least``."""
        self.require(is_count(value, least=least), name, repr(value), f"a whole number of at least {least}")

    def whole(self, name: str, value: object) -> None:
        """A whole number that an int64 holds."""
        holds = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
        self.require(holds, name, repr(value), "a whole number of 64 bits")

    def seconds(self, name: str, value: object) -> None:
        """A number of seconds above zero that every clock can count."""
        holds = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MOST_SECONDS
        self.require(holds, name, repr(value), f"a number of seconds above 0, at most {MOST_SECONDS}")

    def torch_device(self, value: object) -> None:
        """A ``torch.device``."""
        if not isinstance(value, torch.device):
            raise TypeError(f"{self.group}: device: got {type(value).__name__}, expected a torch.device")

    def flag(self, name: str, value: object) -> bool:
        """True or False, and nothing that merely counts as one."""
        self.require(isinstance(value, bool), name, repr(value), "True or False")
        return bool(value)

    def dtype(self, name: str, value: object) -> torch.dtype:
        """One of ``ROW_DTYPES``."""
        found = value if isinstance(value, torch.dtype) and value in ROW_DTYPES else None
        self.require(found is not None, name, repr(value), " or ".join(map(str, ROW_DTYPES)))
        assert found is not None
        return found

    def device(self, name: str, value: object) -> torch.device | None:
        """A device, or its name, or None."""
        if value is None or isinstance(value, torch.device):
            return value
        if not isinstance(value, str):
            raise TypeError(f"{self.group}: {name}: got {type(value).__name__}, expected a torch.device or its name")
        try:
            return torch.device(value)
        except RuntimeError:
            raise ValueError(f"{self.group}: {name}: got {value!r}, expected the name of a device") from None

    def named(self, name: str, value: object, choices: Mapping[str, ObjectT]) -> ObjectT:
        """The object that ``value`` names."""
        found = choices.get(value) if isinstance(value, str) else None
        self.require(found is not None, name, repr(value), f"one of {', '.join(map(repr, choices))}")
        assert found is not None
        return found

    def tensor(self, name: str, value: object, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None) -> Tensor:
        """A dense tensor of one of ``dtypes``, on the device of ``like`` or else on one that the group can move.

        Comes back as it is, of PyTorch's own class. Raises ``NotImplementedError`` for one with a tangent.
        """
        value = self._own_tensor(name, value)
        self.require(not value.is_nested, f"layout of {name}", "a nested tensor", torch.strided)
        self.require(value.layout == torch.strided, f"layout of {name}", value.layout, torch.strided)
        self.require(value.dtype in dtypes, f"dtype of {name}", value.dtype, " or ".join(map(str, dtypes)))
        if like is None:
            self._movable(name, value)
        else:
            self.same_device(name, value, like)
        if has_tangent(value):
            raise NotImplementedError(
                f"{self.group}: {name}: got a tensor with a tangent of forward-mode differentiation, expected none: "
                "only backward is differentiated"
            )
        raise_if_freed(self.group, name, value)
        return value

    def _own_tensor(self, name: str, value: object) -> Tensor:
        """``value`` as PyTorch's own class: what a class of the caller's makes of a function does not count here."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.group}: {name}: got {type(value).__name__}, expected a torch.Tensor")
        kind = type(value)
        if kind in (Tensor, nn.Parameter):
            return value
        if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            # Its values are elsewhere, or none: a FakeTensor, a MaskedTensor, a DTensor.
            raise TypeError(f"{self.group}: {name}: got {kind.__name__}, expected a torch.Tensor that holds its values")
        return value.as_subclass(Tensor)

    def same_device(self, name: str, tensor: Tensor, like: Tensor) -> None:
        """On the device of ``like``."""
        self.require(tensor.device == like.device, f"device of {name}", tensor.device, like.device)

    def shape(self, name: str, tensor: Tensor, expected: tuple[int, ...], letters: str) -> None:
        """Exactly the shape ``expected``, which ``letters`` explains."""
        got = tuple(tensor.shape)
        self.require(got == expected, f"shape of {name}", got, f"{expected} = {letters}")

    def _movable(self, name: str, tensor: Tensor) -> None:
        device = tensor.device
        self.require(device.type != "meta", f"device of {name}", device, "a device that holds data")
        aligned_contiguous = self.group.device_types()
        if aligned_contiguous is not None:
            moves = f"one that the process group moves: {', '.join(sorted(aligned_contiguous))}"
            self.require(device.type in aligned_contiguous, f"device of {name}", device, moves)


def check_tokens(checker: ArgumentChecker, x: object) -> Tensor:
    """``x`` (T, H) or (..., H)."""
    tensor = checker.tensor("x", x, ROW_DTYPES)
    shape = tuple(tensor.shape)
    checker.require(tensor.ndim >= 2 and shape[-1] >= 1, "shape of x", shape, "(T, H) or (..., H), H at least 1")
    checker.require(shape[-1] <= MOST_WIDTH, "hidden size H", shape[-1], f"at most {MOST_WIDTH}")
    return tensor


def tokens_of(x: Tensor) -> int:
    """T of ``x`` (T, H) or (..., H)."""
    return x.shape[:-1].numel()


def rows_of_tokens(x: Tensor) -> Tensor:
    """``x`` as kernels read it: (T, H)."""
    return for_kernels(x).flatten(0, -2)


def check_experts_divide(checker: ArgumentChecker, num_experts: int) -> None:
    """W divides E, which is no larger than can be counted."""
    world_size = checker.group.world_size
    checker.require(num_experts <= MOST_EXPERTS, "number of experts E", num_experts, f"at most {MOST_EXPERTS}")
    divides = num_experts % world_size == 0
    checker.require(divides, "number of experts E", num_experts, f"a multiple of the group's W={world_size} ranks")


def check_router(checker: ArgumentChecker, x: Tensor, router_w: object, options: RouterOptions) -> Tensor:
    """``router_w`` (E, H) in fp32 or as x, with W a divisor of E and 1 <= K <= E."""
    dtypes = tuple(dict.fromkeys((x.dtype, torch.float32)))
    weight_EH = checker.tensor("router_w", router_w, dtypes, x)
    shape = tuple(weight_EH.shape)
    hidden = x.shape[-1]
    fits = weight_EH.ndim == 2 and shape[0] >= 1 and shape[1] == hidden
    checker.require(fits, "shape of router_w", shape, f"(E, {hidden}) = (E, H), E at least 1")
    check_experts_divide(checker, shape[0])
    checker.count("top_k", options.top_k)
    checker.require(options.top_k <= shape[0], "top_k", options.top_k, f"at most E={shape[0]}")
    return weight_EH


def check_routing(checker: ArgumentChecker, topk_idx: object, num_experts: int, like: Tensor | None = None) -> Tensor:
    """``topk_idx`` (T, K) with W a divisor of E and 1 <= K <= E, of the tokens of x ``like`` if there is one.

    The backend checks the ids themselves.
    """
    idx_TK = checker.tensor("topk_idx", topk_idx, INDEX_DTYPES, like)
    shape = tuple(idx_TK.shape)
    checker.require(idx_TK.ndim == 2, "shape of topk_idx", shape, "(T, K)")
    checker.count("number of experts E", num_experts)
    check_experts_divide(checker, num_experts)
    checker.require(1 <= shape[1] <= num_experts, "K of topk_idx", shape[1], f"1 to E={num_experts}")
    if like is not None:
        checker.require(shape[0] == tokens_of(like), "tokens of topk_idx", shape[0], f"T={tokens_of(like)}, as x")
    return idx_TK


def check_scores(checker: ArgumentChecker, topk_scores: object, shape: tuple[int, int], like: Tensor) -> Tensor:
    """``topk_scores`` (T, K), any float."""
    scores_TK = checker.tensor("topk_scores", topk_scores, SCORE_DTYPES, like)
    checker.shape("topk_scores", scores_TK, shape, "(T, K), as topk_idx")
    return scores_TK


def check_experts(checker: ArgumentChecker, x: Tensor, arguments: ExpertArguments, num_experts: int | None) -> Experts:
    """This rank's experts, of shapes that fit x, each other, and the router's E if there is one."""
    activation = checker.named("activation", arguments.activation, ACTIVATIONS)
    layout = checker.named("gate_layout", arguments.gate_layout, GATE_LAYOUTS)
    w1 = checker.tensor("w1", arguments.w1, (x.dtype,), x)
    w2 = checker.tensor("w2", arguments.w2, (x.dtype,), x)
    hidden = x.shape[-1]
    checker.require(w2.ndim == 3, "shape of w2", tuple(w2.shape), f"(e, {hidden}, I) = (e, H, I)")
    held = w2.shape[0] if num_experts is None else num_experts // checker.group.world_size
    width = activation.up_width(w2.shape[2])
    checker.require(held >= 1, "shape of w2", tuple(w2.shape), "at least one expert on this rank")
    checker.shape("w2", w2, (held, hidden, w2.shape[2]), "(e, H, I)")
    checker.shape("w1", w1, (held, width, hidden), "(e, 2I, H)" if activation.gated else "(e, I, H)")
    checker.require(width <= MOST_WIDTH, "2I of w1" if activation.gated else "I of w1", width, f"at most {MOST_WIDTH}")
    given = [name for name in ("b1", "b2") if getattr(arguments, name) is not None]
    checker.require(len(given) != 1, "biases", f"{given} alone", "b1 and b2, or neither")
    b1 = _check_bias(checker, x, "b1", arguments.b1, (held, width))
    b2 = _check_bias(checker, x, "b2", arguments.b2, (held, hidden))
    return Experts(w1=w1, w2=w2, b1=b1, b2=b2, activation=activation, layout=layout)


def experts_as_read(experts: Experts) -> Experts:
    """``experts`` as kernels read them."""
    return replace(
        experts,
        w1=for_kernels(experts.w1),
        w2=for_kernels(experts.w2),
        b1=None if experts.b1 is None else for_kernels(experts.b1),
        b2=None if experts.b2 is None else for_kernels(experts.b2),
    )


def _check_bias(checker: ArgumentChecker, x: Tensor, name: str, bias: object, shape: tuple[int, int]) -> Tensor | None:
    if bias is None:
        return None
    tensor = checker.tensor(name, bias, (x.dtype,), x)
    checker.shape(name, tensor, shape, "(e, outputs)")
    return tensor


def check_plan(checker: ArgumentChecker, plan: object) -> RoutingPlan:
    """A plan that was made for this rank of a group of this size, its fields held as they were made.

    That is kind, dtype, form in memory, device and shape of each. Their values are not read: who changes those gets
    other numbers, or reads memory that is not a plan's.
    """
    if not isinstance(plan, RoutingPlan):
        raise TypeError(f"{checker.group}: plan: got {type(plan).__name__}, expected a RoutingPlan")
    malformed = malformed_field(plan)
    if malformed is not None:
        _refuse_field(checker, malformed, getattr(plan, malformed))
    if (plan.rank, plan.world_size) != (checker.group.rank, checker.group.world_size):
        checker.require(False, "plan", f"a plan for rank {plan.rank} of {plan.world_size}", f"one for {checker.group}")
    return plan


def _refuse_field(checker: ArgumentChecker, name: str, got: object) -> NoReturn:
    if name == "num_tokens":
        raise ValueError(f"{checker.group}: num_tokens of plan: got {got!r}, expected a whole number of 0 to C")
    if type(got) is not Tensor:
        raise TypeError(f"{checker.group}: {name} of plan: got {type(got).__name__}, expected a torch.Tensor")
    # Of a nested one there is no shape, and of a sparse one no stride.
    form = "nested" if got.is_nested else f"{got.layout} {tuple(got.shape)}"
    raise ValueError(
        f"{checker.group}: {name} of plan: got {got.dtype} {form} on {got.device}, expected contiguous {INDEX_DTYPE} "
        "of the shape and on the device that belong to the other fields, as the plan was made"
    )


def check_tokens_of_plan(checker: ArgumentChecker, x: object, plan: RoutingPlan) -> Tensor:
    """``x`` (T, H) or (..., H), of as many tokens as the plan has here."""
    tensor = check_tokens(checker, x)
    checker.same_device("x", tensor, plan.slot_of_row)
    tokens = tokens_of(tensor)
    if tokens != plan.num_tokens:
        checker.require(False, "tokens of x", tokens, f"T={plan.num_tokens} of the plan")
    return tensor


def check_rows_of_plan(checker: ArgumentChecker, rows: object, plan: RoutingPlan) -> Tensor:
    """``rows`` (R, H) in the plan's canonical order."""
    rows_RH = checker.tensor("rows", rows, ROW_DTYPES)
    checker.same_device("rows", rows_RH, plan.slot_of_row)
    shape = tuple(rows_RH.shape)
    fits = rows_RH.ndim == 2 and shape[0] == plan.row_capacity and shape[1] >= 1
    checker.require(fits, "shape of rows", shape, f"({plan.row_capacity}, H) = (R, H)")
    checker.require(shape[1] <= MOST_WIDTH, "hidden size H", shape[1], f"at most {MOST_WIDTH}")
    return rows_RH
