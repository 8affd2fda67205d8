"""From the arguments of a call to what a backend takes: checked, or known from a call like it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from sonic_ep.activation import Activation, Swiglu
from sonic_ep.autograd_utils import for_kernels, joined
from sonic_ep.backend import Backend, ExpertWeights, RouterWeights
from sonic_ep.call_guard import facts_of, facts_of_router
from sonic_ep.call_memory import CallMemory, CallRecord
from sonic_ep.checks import (
    ArgumentChecker,
    check_plan,
    check_routing,
    check_rows_of_plan,
    check_scores,
    check_tokens,
    check_tokens_of_plan,
    refused_for,
    tokens_of,
)
from sonic_ep.config import RouterOptions
from sonic_ep.distributed.max_tokens import MaxTokens
from sonic_ep.expert_checks import ExpertArguments, check_experts, experts_as_read
from sonic_ep.plan import PlanForm, RoutingPlan
from sonic_ep.router_checks import RouterArguments, check_router, check_router_options, router_as_read
from sonic_ep.sharding import is_dtensor, local_of

OPTIONS_KEPT = 64
# Arguments in the order in which callers of this module pass them.
Given = tuple[Any, ...]
EXPERTS = ("w1", "w2", "b1", "b2")


class CheckedCall(NamedTuple):
    """A call of ``moe``, with a router, or of ``moe_routed``, with topk_idx and topk_scores (T, K)."""

    record: CallRecord
    x_TH: Tensor
    experts: ExpertWeights
    router: Any = None
    topk_idx: Any = None
    topk_scores: Any = None


class CallChecks:
    """Checks the calls of one object. A call like an earlier one is known, see ``CallMemory``, and not checked again.

    Raises as ``sonic_ep.checks`` does. Nothing here communicates.
    """

    def __init__(self, checker: ArgumentChecker, backend: Backend, max_tokens: MaxTokens, memory: CallMemory) -> None:
        self._checker = checker
        self._backend = backend
        self._max_tokens = max_tokens
        self._memory = memory
        self._world_size = checker.group.world_size
        self._options_of = lru_cache(OPTIONS_KEPT, typed=True)(partial(check_router_options, checker))

    def moe(self, x: Any, router: Given, experts: Given, options: Given) -> CheckedCall:
        """router: router_w, router_b and correction_bias. experts: w1, w2, b1, b2.

        options: activation, gate_layout, then those of ``check_router_options``.
        """
        experts = self._local(experts)
        record, tokens = self._memory.recall("moe", (x,), (*router, *experts), options)
        if not record.known:
            return self._checked_moe(record, x, router, experts, options)
        self._max_tokens.check(tokens[0])
        weights = RouterWeights(weight=router[0], bias=router[1], correction=router[2])
        return CheckedCall(record, self._rows(record, x), _experts_of(record, experts), weights)

    def _checked_moe(self, record: CallRecord, x: Any, router: Given, experts: Given, options: Given) -> CheckedCall:
        x_any = check_tokens(self._checker, x)
        record.options = self._router_options(*options[2:])
        of_router = RouterArguments(router_w=router[0], router_b=router[1], correction_bias=router[2])
        try:
            weights = check_router(self._checker, x_any, of_router, record.options)
            checked = self._checked_experts(x_any, experts, options, weights.weight.shape[0])
        except ValueError as refused:
            weights_given = {"router_w": router[0], "w1": experts[0], "w2": experts[1]}
            raise refused_for(self._checker, x_any, weights_given, refused) from None
        self._max_tokens.check(tokens_of(x_any))
        held, weights = for_kernels(x_any), router_as_read(weights)
        read = experts_as_read(checked, x_any.dtype)
        x_TH = self._joined_without_tokens(_rows_of(held), read, (weights.weight, weights.bias))
        facts = {**facts_of(x_TH, read), **facts_of_router(weights, record.options)}
        _describe(record, "moe", facts, x_TH, read)
        as_given = (held, weights.weight, weights.bias, weights.correction)
        if read is checked and _compares_by_value(read.activation) and _are_same(as_given, (x, *router)):
            self._memory.keep(record)
        return CheckedCall(record, x_TH, read, weights)

    def moe_routed(self, x: Any, routing: Given, experts: Given, options: Given) -> CheckedCall:
        """routing: topk_idx, topk_scores. experts: w1, w2, b1, b2. options: activation, gate_layout, return_routing."""
        experts = self._local(experts)
        record, tokens = self._memory.recall("moe_routed", (x, *routing), experts, options)
        if not record.known or not tokens[0] == tokens[1] == tokens[2]:
            return self._checked_moe_routed(record, x, routing, experts, options)
        self._max_tokens.check(tokens[0])
        of_experts = _experts_of(record, experts)
        self._backend.check_expert_ids(routing[0], of_experts.w2.shape[0] * self._world_size)
        return CheckedCall(record, self._rows(record, x), of_experts, None, *routing)

    def _checked_moe_routed(
        self, record: CallRecord, x: Any, routing: Given, experts: Given, options: Given
    ) -> CheckedCall:
        x_any = check_tokens(self._checker, x)
        return_routing = self._checker.flag("return_routing", options[2])
        try:
            checked = self._checked_experts(x_any, experts, options, None)
        except ValueError as refused:
            weights_given = {"w1": experts[0], "w2": experts[1]}
            raise refused_for(self._checker, x_any, weights_given, refused) from None
        num_experts = checked.w2.shape[0] * self._world_size
        idx_TK = check_routing(self._checker, routing[0], num_experts, x_any)
        scores_TK = check_scores(self._checker, routing[1], (idx_TK.shape[0], idx_TK.shape[1]), x_any)
        self._max_tokens.check(idx_TK.shape[0])
        held, read = for_kernels(x_any), experts_as_read(checked, x_any.dtype)
        idx_TK, scores_TK = for_kernels(idx_TK), for_kernels(scores_TK)
        scores_TK = scores_TK.float() if return_routing else scores_TK
        self._backend.check_expert_ids(idx_TK, num_experts)
        x_TH = self._joined_without_tokens(_rows_of(held), read)
        _describe(record, "moe_routed", {**facts_of(x_TH, read), "K": idx_TK.shape[1]}, x_TH, read)
        same = read is checked and _are_same((held, idx_TK, scores_TK), (x, *routing))
        if same and _compares_by_value(read.activation):
            self._memory.keep(record)
        return CheckedCall(record, x_TH, read, None, idx_TK, scores_TK)

    def plan(self, topk_idx: Any, num_experts: int) -> tuple[CallRecord, Tensor]:
        """The record, and the ids (T, K)."""
        record, tokens = self._memory.recall("plan", (topk_idx,), (), (num_experts,))
        if record.known:
            self._max_tokens.check(tokens[0])
            self._backend.check_expert_ids(topk_idx, num_experts)
            return record, topk_idx
        idx_TK = check_routing(self._checker, topk_idx, num_experts)
        self._max_tokens.check(idx_TK.shape[0])
        idx_TK = for_kernels(idx_TK)
        self._backend.check_expert_ids(idx_TK, num_experts)
        _describe(record, "plan", {"E": num_experts, "K": idx_TK.shape[1], "device": idx_TK.device.type})
        if idx_TK is topk_idx:
            self._memory.keep(record)
        return record, idx_TK

    def dispatch(self, x: Any, plan: RoutingPlan) -> tuple[CallRecord, PlanForm, Tensor]:
        """The record, the form of the plan, and x (T, H)."""
        form = check_plan(self._checker, plan)
        record, tokens = self._memory.recall("dispatch", (x,), (), (form.device, form.top_k, form.num_experts))
        if record.known and tokens[0] == plan.num_tokens:
            return record, form, self._rows(record, x)
        held = for_kernels(check_tokens_of_plan(self._checker, x, plan))
        x_TH = _rows_of(held)
        _describe(record, "dispatch", facts_of(x_TH))
        if held is x:
            self._memory.keep(record)
        return record, form, x_TH

    def combine(self, rows: Any, topk_scores: Any, plan: RoutingPlan) -> tuple[CallRecord, PlanForm, Tensor, Tensor]:
        """The record, the form of the plan, rows (N, H) and scores (T, K)."""
        form, given = check_plan(self._checker, plan), (rows, topk_scores)
        record, found = self._memory.recall("combine", given, (), (form.device, form.top_k, form.num_experts))
        if record.known and found[0] <= form.row_capacity and found[1] == plan.num_tokens:
            self._backend.check_rows(rows, plan)
            return record, form, rows, topk_scores
        rows_NH = check_rows_of_plan(self._checker, rows, plan)
        scores_TK = check_scores(self._checker, topk_scores, (plan.num_tokens, plan.top_k), rows_NH)
        self._backend.check_rows(rows_NH, plan)
        rows_NH, scores_TK = for_kernels(rows_NH), for_kernels(scores_TK)
        _describe(record, "combine", facts_of(rows_NH))
        if _are_same((rows_NH, scores_TK), given):
            self._memory.keep(record)
        return record, form, rows_NH, scores_TK

    def _checked_experts(self, x_any: Tensor, experts: Given, options: Given, num_experts: int | None) -> ExpertWeights:
        of_experts = dict(zip(EXPERTS, experts, strict=True))
        given = ExpertArguments(**of_experts, activation=options[0], gate_layout=options[1])
        checked = check_experts(self._checker, x_any, given, num_experts)
        self._backend.check_activation(checked.activation)
        return checked

    def _router_options(self, *given: object) -> RouterOptions:
        """``check_router_options``, remembered: calls repeat."""
        try:
            return self._options_of(*given)
        # One that cannot be hashed is wrong, or an error said why it is.
        except TypeError:
            return check_router_options(self._checker, *given)  # type: ignore[arg-type]

    def _local(self, experts: Given) -> Given:
        """The experts with this rank's tensors for DTensors, so that calls with them are known, too."""
        kind = type(experts[1])
        if kind is Parameter or kind is Tensor or not is_dtensor(experts[1]):
            return experts
        return tuple(self._local_part(name, held) for name, held in zip(EXPERTS, experts, strict=True))

    def _local_part(self, name: str, held: Any) -> Any:
        group = self._checker.group
        if not isinstance(held, tuple):
            return local_of(group, name, held)
        return tuple(local_of(group, f"{name}[{place}]", part) for place, part in enumerate(held))

    def _rows(self, record: CallRecord, x: Tensor) -> Tensor:
        """X (T, H) of a call that is known, as the first of its kind had it."""
        x_TH = _rows_of(x) if x.requires_grad or x.ndim != 2 else x
        return joined(x_TH, self._world_size) if record.joins else x_TH

    def _joined_without_tokens(self, x_TH: Tensor, experts: ExpertWeights, router: Given = ()) -> Tensor:
        """x; without tokens it requires a gradient if a weight does, as x of other ranks usually does."""
        weights = (*experts.tensors.values(), *router)
        trained = any(weight is not None and weight.requires_grad for weight in weights)
        return joined(x_TH, self._world_size) if trained and x_TH.shape[0] == 0 else x_TH


def _rows_of(x: Tensor) -> Tensor:
    """(T, H). A view, in which the gradients of one call are summed."""
    return x.view(-1, x.shape[-1])


def _experts_of(record: CallRecord, experts: Given) -> ExpertWeights:
    w1, w2, b1, b2 = experts
    assert record.activation is not None
    assert record.layout is not None
    return ExpertWeights(w1=w1, w2=w2, b1=b1, b2=b2, activation=record.activation, layout=record.layout)


def _compares_by_value(activation: Activation) -> bool:
    """Whether equal ones compute the same. One of the caller's own may not, and may hold tensors: none is kept."""
    return activation.is_builtin or type(activation) is Swiglu


def _are_same(read: Sequence[object], given: Sequence[object]) -> bool:
    """Whether nothing was copied: a call like this one would have to be again."""
    return all(one is other for one, other in zip(read, given, strict=True))


def _describe(
    record: CallRecord,
    name: str,
    facts: dict[str, object],
    x_TH: Tensor | None = None,
    experts: ExpertWeights | None = None,
) -> None:
    """Note what ranks compare of a call, and what the checks have found."""
    record.facts = (("call", name), *facts.items())
    record.x_trained = x_TH is not None and torch.is_grad_enabled() and x_TH.requires_grad
    record.joins = record.x_trained and x_TH is not None and x_TH.shape[0] == 0
    if experts is not None:
        record.activation, record.layout = experts.activation, experts.layout
