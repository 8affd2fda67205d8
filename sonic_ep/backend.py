"""The protocols that both backends implement, what calls return, and the registry that imports a backend on demand.

What every call makes anew is not frozen: that would take four times as long.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from sonic_ep.activation import Activation, GateLayout
from sonic_ep.call_memory import CallRecord
from sonic_ep.config import AUTO, EPConfig, RouterOptions
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import EPGroup
from sonic_ep.errors import BackendUnavailableError
from sonic_ep.plan import RoutingPlan


@dataclass(kw_only=True, eq=False)
class ExpertWeights:
    """This rank's experts: w1 (e, 2I or I, H), w2 (e, H, I), and b1 (e, 2I or I), b2 (e, H) or both None.

    Or w1 is split in gate and up, each (e, I, H), and so is b1, each (e, I): the layout is then "concat". Weights may
    have any strides.
    """

    w1: Tensor | tuple[Tensor, Tensor]
    w2: Tensor
    b1: Tensor | tuple[Tensor, Tensor] | None
    b2: Tensor | None
    activation: Activation
    layout: GateLayout

    @property
    def up_weights(self) -> tuple[Tensor, ...]:
        """The weight of each up-projection: one, or two if gate and up are split."""
        return self.w1 if isinstance(self.w1, tuple) else (self.w1,)

    @property
    def up_biases(self) -> tuple[Tensor | None, ...]:
        """The bias of each up-projection, or None."""
        return self.b1 if isinstance(self.b1, tuple) else (self.b1,) * len(self.up_weights)

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Weights and biases by name: w1, w2, b1, b2; "w1[0]", "w1[1]", w2, "b1[0]", "b1[1]", b2 if split."""
        given = {"w1": self.w1, "w2": self.w2, "b1": self.b1, "b2": self.b2}
        found: dict[str, Tensor] = {}
        for name, held in given.items():
            if isinstance(held, tuple):
                found |= {f"{name}[{place}]": part for place, part in enumerate(held)}
            elif held is not None:
                found[name] = held
        return found

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "ExpertWeights":
        """These experts with other weights and biases, named as in ``tensors``."""
        given: dict[str, Any] = {name: tensors.get(name) for name in ("w1", "w2", "b1", "b2")}
        split = {name: (tensors[f"{name}[0]"], tensors[f"{name}[1]"]) for name in given if f"{name}[0]" in tensors}
        return replace(self, **{**given, **split})


@dataclass(kw_only=True, eq=False)
class RouterWeights:
    """The router: weight (E, H), as x or fp32; bias (E,), as x or fp32, or None; correction (E,) fp32, or None."""

    weight: Tensor
    bias: Tensor | None = None
    correction: Tensor | None = None


@dataclass(kw_only=True, eq=False)
class Routing:
    """What a router returns: logits (T, E) fp32, topk_idx (T, K) int64, topk_scores (T, K) fp32.

    staged: what a backend has done for the layer that follows, or None.
    """

    logits: Tensor
    topk_idx: Tensor
    topk_scores: Tensor
    staged: Any = None


@dataclass(kw_only=True, eq=False)
class Slots:
    """topk_idx (T, K), int32 or int64, and topk_scores (T, K), any float, of this rank's tokens. max_tokens: C.

    distinct: the router guarantees ids in range, no expert twice in a token. staged: as in ``Routing``.
    """

    topk_idx: Tensor
    topk_scores: Tensor
    max_tokens: int
    distinct: bool
    staged: Any = None


@dataclass(kw_only=True, eq=False)
class LayerOutput:
    """y (..., H) of this rank's tokens; counts (E,) int32, a copy; expert_ids (W, C, K) int32, the plan's own."""

    y: Tensor
    counts: Tensor
    expert_ids: Tensor


class MoEOutput(NamedTuple):
    """What ``moe`` returns. A tuple, so that module hooks, FSDP and reentrant checkpointing find its tensors.

    y: as x. router_logits: (T, E) fp32, differentiable. tokens_per_expert: (E,) int32, slots routed to each expert.
    topk_idx: (T, K) int64, best first. topk_scores: (T, K) fp32, differentiable, the factors in y.
    Until backward, write none of router_logits, topk_idx and topk_scores in place: it may need them.
    """

    y: Tensor
    router_logits: Tensor
    tokens_per_expert: Tensor
    topk_idx: Tensor
    topk_scores: Tensor


class RoutedOutput(NamedTuple):
    """What ``moe_routed`` returns with ``return_routing``: y as x, and the fields that ``MoEOutput`` has, too.

    topk_idx: the caller's. topk_scores: the caller's, in fp32.
    """

    y: Tensor
    tokens_per_expert: Tensor
    topk_idx: Tensor
    topk_scores: Tensor


class DispatchPrimitive(Protocol):
    """Moves rows of tokens to the ranks of their experts, with the same bits in both backends."""

    def receive(self, x_TH: Tensor, plan: RoutingPlan) -> Tensor:
        """Collective. The rows that this rank receives, in the mode's own layout."""

    def source_of_row(self, plan: RoutingPlan) -> Tensor | None:
        """The received row of each canonical row, (rows,) or (R,) integers; None if received in canonical order."""


class CombinePrimitive(Protocol):
    """Returns rows of experts to their tokens and sums them, in the order and with the rounding of its mode."""

    def combine(self, rows_NH: Tensor, scores_WCK: Tensor | None, plan: RoutingPlan) -> Tensor:
        """Collective. Each token's sum over k of score * row, (T, H). Without scores each is 1."""


class Backend(Protocol):
    """One implementation of the layer. Arguments are checked already; methods that move data are collective.

    record: of the calls with the facts of this one, for what a backend keeps for the next.
    """

    def meet(self, device: torch.device) -> None:
        """Collective. A barrier: on the current stream of ``device``, or on the host if that is the CPU."""

    def route(
        self, x_TH: Tensor, weights: RouterWeights, options: RouterOptions, max_tokens: int, record: CallRecord
    ) -> Routing:
        """Logits, choices and scores of this rank's tokens. Collective in backward, and in forward on ``fast``."""

    def check_expert_ids(self, topk_idx_TK: Tensor, num_experts: int) -> None:
        """Raise ``ValueError`` for ids outside -1..E-1, or flag them on the device. Not collective."""

    def check_rows(self, rows_NH: Tensor, plan: RoutingPlan) -> None:
        """Raise ``ValueError`` for fewer rows than the plan has valid, if the host knows. Not collective."""

    def plan(
        self,
        topk_idx_TK: Tensor,
        *,
        num_experts: int,
        max_tokens: int,
        distinct: bool,
        record: CallRecord,
        step: int = 0,
        object_number: int = 0,
    ) -> RoutingPlan:
        """The plan of this routing. distinct: as in ``Slots``. step, object_number: of the plan."""

    def dispatch(self, x_TH: Tensor, plan: RoutingPlan, record: CallRecord) -> Tensor:
        """(R, H) in canonical row order; rows past the valid ones are unspecified. Differentiable."""

    def combine(self, rows_NH: Tensor, topk_scores_TK: Tensor, plan: RoutingPlan, record: CallRecord) -> Tensor:
        """(T, H) of N rows, at most R. Differentiable in rows and scores. Does not read rows past the valid ones."""

    def layer(
        self, x_TH: Tensor, slots: Slots, experts: ExpertWeights, shape: torch.Size, record: CallRecord
    ) -> LayerOutput:
        """Plan, dispatch, experts, combine. ``shape``: of y, (..., H)."""

    # A backend that runs any activation, waits on the host only and holds no memory needs none of these.

    def check_activation(self, activation: Activation) -> None:
        """Raise ``ValueError`` for an activation that the backend cannot run. Not collective."""
        return

    def check(self) -> None:
        """Raise what the device has flagged since the last host sync."""
        return

    def explain(self, error: RuntimeError) -> None:
        """Raise, from ``error``, the error of a kernel's wait that caused it; nothing if there is none."""
        return

    def leave(self, tag: int = 0) -> None:
        """This rank makes no further call: stop other ranks' kernels waiting for it. tag: to show them, if not LEFT."""
        return

    def tags_shown(self) -> Mapping[int, int]:
        """The tags that kernels of other ranks show while they wait for this rank, which has queued none, by rank."""
        return {}

    def holds_memory(self) -> bool:
        """Whether ``close`` has memory to free."""
        return False

    def raise_in_backward(self) -> None:
        """No later call can raise the error of a backward: from now on the backward raises it."""
        return

    def detach(self) -> None:
        """Drop all references; graphs keep what backward needs."""
        return

    def close(self) -> None:
        """Free what the backend holds. A later backward raises."""
        return


class BackendModule(Protocol):
    """The functions that a backend's package exports."""

    def unavailable_reasons(self, group: EPGroup) -> tuple[str, ...]:
        """Every reason why the backend cannot run here; empty if it can."""

    def auto_reasons(self) -> tuple[str, ...]:
        """Why ``"auto"`` skips the backend although it runs when requested by name."""

    def create(self, collectives: BoundedCollectives, config: EPConfig) -> Backend:
        """The backend for the group of ``collectives``, which also knows the current step."""


# In the order of preference of "auto". Imported on demand, so that the reference needs no triton.
BACKEND_PACKAGES: Mapping[str, str] = MappingProxyType({"fast": "sonic_ep.fast", "reference": "sonic_ep.reference"})


@dataclass(frozen=True, kw_only=True)
class BackendChoice:
    """The chosen backend, and why those preferred to it were not chosen."""

    name: str
    why: str
    module: BackendModule


def unavailable_reasons(name: str, group: EPGroup) -> tuple[str, ...]:
    """Every reason why backend ``name`` cannot run here; empty if it can."""
    return _load(name).unavailable_reasons(group)


def choose_backend(name: str, group: EPGroup) -> BackendChoice:
    """Backend ``name``; for ``"auto"``, the first that can run. Else ``BackendUnavailableError`` with every reason."""
    if name not in (AUTO, *BACKEND_PACKAGES):
        expected = ", ".join(repr(word) for word in (AUTO, *BACKEND_PACKAGES))
        raise ValueError(f"{group}: backend: got {name!r}, expected one of {expected}")
    refused: list[str] = []
    for candidate in BACKEND_PACKAGES if name == AUTO else (name,):
        module = _load(candidate)
        reasons = module.unavailable_reasons(group)
        passed_over = module.auto_reasons() if name == AUTO and not reasons else ()
        if not (reasons or passed_over):
            why = "; ".join(refused) if refused else "asked for by name" if name != AUTO else "the preferred one"
            return BackendChoice(name=candidate, why=why, module=module)
        verb = "cannot run here" if reasons else "is taken by name only"
        refused.append(f"backend {candidate!r} {verb}: " + "; ".join(reasons or passed_over))
    raise BackendUnavailableError(f"{group}: " + "; ".join(refused))


def _load(name: str) -> BackendModule:
    return cast(BackendModule, importlib.import_module(BACKEND_PACKAGES[name]))
